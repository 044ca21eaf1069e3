"""bf16: a setting permits it, the device decides."""

from __future__ import annotations

import pytest
import torch

from models.lm import precision
from models.lm.precision import autocast, has_bf16, weights_cast

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


@pytest.mark.parametrize("permitted", [True, False])
def test_weights_are_cast_inside_and_the_same_tensors_afterwards(
    permitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    kept = LINEAR.weight.data_ptr()
    with pytest.raises(RuntimeError, match="decoding failed"), weights_cast([LINEAR], permitted):
        assert LINEAR.weight.dtype == (torch.bfloat16 if permitted else torch.float32)
        raise RuntimeError("decoding failed")
    assert LINEAR.weight.dtype == torch.float32 and LINEAR.weight.data_ptr() == kept
    LINEAR(torch.ones(2, 4)).sum().backward()
    assert LINEAR.weight.grad is not None and LINEAR.weight.grad.dtype == torch.float32
