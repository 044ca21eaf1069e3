"""Divergence from the reference policy: a per-token estimate and an exact categorical one."""

from __future__ import annotations

import torch


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """exp(ref - logp) - (ref - logp) - 1: unbiased for KL(pi || ref) under pi, never negative.

    The estimator of GRPO and of TRL, element by element, in nats [TaoSR1 s3.3].

    >>> k3(torch.zeros(1), torch.log(torch.tensor([2.0]))).item() == 2 - torch.log(
    ...     torch.tensor(2.0)
    ... ).item() - 1
    True
    """
    gap = ref_logp - logp
    return torch.exp(gap) - gap - 1.0


def categorical_kl(logp_QK: torch.Tensor, ref_logp_QK: torch.Tensor) -> torch.Tensor:
    """KL(pi || ref) = sum_i pi_i (log pi_i - log ref_i), exact over K [TaoSearchEmb s3.2].

    Args:
        logp_QK, ref_logp_QK: normalised log-probs over the same candidates; -inf in both marks a
            padded candidate, which adds 0.

    Returns:
        [Q] in nats; 0 where the two agree.

    >>> half, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> round(categorical_kl(half, skewed).item(), 4)
    0.1438
    """
    padded = torch.isneginf(logp_QK)
    safe = logp_QK.masked_fill(padded, 0.0)
    gap = safe - ref_logp_QK.masked_fill(padded, 0.0)
    return (safe.exp() * gap).masked_fill(padded, 0.0).sum(-1)
