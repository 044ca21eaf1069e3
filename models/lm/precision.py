"""Where bf16 arithmetic pays: a setting permits it, the device decides.

On a CPU without bf16 instructions torch emulates them: measured there, a training step takes more
than ten times as long as in float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def has_bf16(device: str) -> bool:
    """Whether `device` ("cpu", "cuda", "cuda:1", "mps") computes bf16 in hardware."""
    import torch

    kind = device.split(":")[0]
    if kind == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("sve_bf16"))
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


@contextlib.contextmanager
def weights_cast(modules: Iterable[torch.nn.Module], bf16: bool) -> Iterator[None]:
    """The modules' own weights in bf16 inside, where `bf16` permits it and their device has it.

    Afterwards they are the very tensors they were. autocast casts a weight anew in every forward:
    one of a single token spends a third of its time on that.
    """
    import torch

    kept = {p: p.data for module in modules for p in module.parameters(recurse=False)}
    for weight, data in kept.items():
        if bf16 and has_bf16(data.device.type):
            weight.data = data.to(torch.bfloat16)
    try:
        yield
    finally:
        for weight, data in kept.items():
            weight.data = data


def autocast(device: str, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where `bf16` permits it and `device` has it; otherwise nothing."""
    import torch

    if not (bf16 and has_bf16(device)):
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.split(":")[0], dtype=torch.bfloat16)
