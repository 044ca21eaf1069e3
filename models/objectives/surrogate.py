"""The clipped policy-gradient surrogate, the truncated one, and the three ways of averaging them.

log-probs + advantages -> the surrogate, element by element -> one number to maximise.

Shapes: B sequences, T tokens; `clipped_surrogate` takes any shapes that broadcast.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from models.errors import ConfigError, explain


def clipped_surrogate(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), rho = exp(logp - old_logp) [TaoSR1 s3.3].

    Unreduced, to be maximised. `clip_high` = 0.28 is DAPO's clip-higher. `old_logp` and
    `advantages` are constants: pass them detached. Equal log-probs give rho = 1, and the gradient
    of plain REINFORCE.

    Returns:
        the surrogate, and a bool tensor: True where the clip cut the gradient off.

    >>> surrogate, clipped = clipped_surrogate(
    ...     torch.log(torch.tensor([2.0, 2.0])), torch.zeros(2), torch.tensor([1.0, -1.0])
    ... )
    >>> [round(x, 6) for x in surrogate.tolist()], clipped.tolist()
    ([1.2, -2.0], [True, False])
    """
    rho = torch.exp(logp - old_logp)
    bounded = rho.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipped = ((rho < 1.0 - clip_low) & (advantages < 0)) | (
        (rho > 1.0 + clip_high) & (advantages > 0)
    )
    return torch.minimum(rho * advantages, bounded * advantages), clipped


def truncated_surrogate(
    logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor, max_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(c, rho) A, its gradient min(c, rho) A grad logp; rho = exp(logp - old), c = max_ratio.

    Truncated importance sampling for responses drawn by a guided sampler, whose log-probs are
    `old_logp` [TaoSR-AGRL s3.agr]. Unlike a clip, a truncated ratio keeps its (bounded) gradient:
    a token that the policy likes better than the sampler did is still learned from. Unreduced, to
    be maximised.

    Returns:
        the surrogate, and a bool tensor: True where the ratio was truncated.

    >>> logp = torch.log(torch.tensor([0.2, 0.8])).requires_grad_()
    >>> value, cut = truncated_surrogate(logp, torch.log(torch.tensor([0.4, 0.4])), 3.0, 1.0)
    >>> value.sum().backward()
    >>> [round(x, 4) for x in logp.grad.tolist()], cut.tolist()
    ([1.5, 3.0], [False, True])
    """
    gap = logp - old_logp
    bound = math.log(max_ratio)
    weight = torch.exp(gap.detach().clamp(max=bound))
    return weight * advantages * torch.exp(gap - gap.detach()), gap.detach() > bound


def reduce_objective(
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    kind: Literal["grpo", "dapo", "dr_grpo"],
    max_tokens: int,
) -> torch.Tensor:
    """The reduction that `kind` names; `max_tokens` matters to dr_grpo alone."""
    if kind == "dapo":
        return reduce_dapo(values_BT, mask_BT)
    if kind == "dr_grpo":
        return reduce_dr_grpo(values_BT, mask_BT, max_tokens)
    return reduce_grpo(values_BT, mask_BT)


def reduce_grpo(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """1/B sum_i 1/|o_i| sum_t x_it: every sequence weighs the same [TaoSR1 s3.3].

    A sequence with an empty mask adds 0 and still counts in B (as in TRL); no sequence at all
    gives 0.

    >>> x, m = torch.tensor([[1.0, 1.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> reduce_grpo(x, m).item()
    2.5
    """
    mask = mask_BT.to(values_BT.dtype)
    per_sequence = (values_BT * mask).sum(1) / mask.sum(1).clamp(min=1.0)
    return per_sequence.sum() / max(len(per_sequence), 1)


def reduce_dapo(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """sum_it x_it / sum_i |o_i|: every token weighs the same [DAPO s3.3].

    An empty mask gives 0.

    >>> x, m = torch.tensor([[1.0, 1.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> reduce_dapo(x, m).item()
    2.0
    """
    mask = mask_BT.to(values_BT.dtype)
    return (values_BT * mask).sum() / mask.sum().clamp(min=1.0)


def reduce_dr_grpo(values_BT: torch.Tensor, mask_BT: torch.Tensor, max_tokens: int) -> torch.Tensor:
    """sum_it x_it / (B max_tokens): no bias towards short or long answers [DrGRPO s3.1].

    Raises:
        ConfigError: `max_tokens` < 1.

    >>> x, m = torch.tensor([[1.0, 1.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> reduce_dr_grpo(x, m, max_tokens=3).item()
    1.0
    """
    if max_tokens < 1:
        raise ConfigError(
            explain(f"max_tokens {max_tokens}", "at least 1", "pass the response budget in tokens")
        )
    mask = mask_BT.to(values_BT.dtype)
    return (values_BT * mask).sum() / (max(len(values_BT), 1) * max_tokens)
