"""Where bf16 arithmetic pays: a setting permits it, the device decides.

On a CPU without bf16 instructions torch emulates them: measured there, a training step takes more
than ten times as long as in float32.
"""

from __future__ import annotations

import contextlib
import functools


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


def autocast(device: str, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where `bf16` permits it and `device` has it; otherwise nothing."""
    import torch

    if not (bf16 and has_bf16(device)):
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.split(":")[0], dtype=torch.bfloat16)
