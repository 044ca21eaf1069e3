"""bf16: a setting permits it, the device decides."""

from __future__ import annotations

import pytest
import torch

from models.lm import precision
from models.lm.precision import autocast, has_bf16

LINEAR = torch.nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("permitted", "able", "dtype"),
    [
        (True, True, torch.bfloat16),
        (True, False, torch.float32),
        (False, True, torch.float32),
        (False, False, torch.float32),
    ],
)
def test_bf16_needs_both_the_setting_and_the_device(
    permitted: bool, able: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(precision, "has_bf16", lambda device: asked.append(device) or able)
    with autocast("cpu", permitted):
        assert LINEAR(torch.ones(2, 4)).dtype == dtype
    assert asked == ["cpu"] * permitted


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "sve_bf16", None])
def test_a_processor_is_asked_for_its_instructions(
    flag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"avx512_f": True} | ({flag: True} if flag else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert has_bf16.__wrapped__("cpu") == (flag is not None)


def test_an_unknown_device_computes_in_float32() -> None:
    assert not has_bf16.__wrapped__("mps")
