"""DPO and its relatives on summed log-probabilities.

log-probs of chosen and rejected under policy and reference -> one loss and what users watch.
Shapes: B pairs. Pure torch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from models.errors import ConfigError, explain

DpoLoss = Literal["sigmoid", "ipo", "robust"]


def dpo_loss(
    chosen_B: torch.Tensor,
    rejected_B: torch.Tensor,
    ref_chosen_B: torch.Tensor,
    ref_rejected_B: torch.Tensor,
    beta: float,
    kind: DpoLoss = "sigmoid",
    label_smoothing: float = 0.0,
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """-E log sigmoid(beta * ((logp+ - ref+) - (logp- - ref-))) [TaoSR1 s3.2].

    All inputs are log-probs **summed** over response tokens (a mean is another algorithm).
    ipo: (margin - 1 / (2 beta))^2 on the unscaled margin, by token where `tokens` has the lengths
    of chosen and rejected, as in TRL: the target is one number, a sum grows with the text. robust:
    label noise `label_smoothing`. At the reference the sigmoid loss is log 2.

    Raises:
        ConfigError: an unknown kind.

    >>> z = torch.zeros(2)
    >>> round(dpo_loss(z, z, z, z, beta=0.1)[0].item(), 4)
    0.6931
    """
    margin_B = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)
    if kind == "sigmoid":
        loss_B = -F.logsigmoid(beta * margin_B)
    elif kind == "ipo":
        num_chosen_B, num_rejected_B = (1, 1) if tokens is None else tokens
        mean_B = (chosen_B - ref_chosen_B) / num_chosen_B
        mean_B = mean_B - (rejected_B - ref_rejected_B) / num_rejected_B
        loss_B = (mean_B - 1 / (2 * beta)) ** 2
    elif kind == "robust":
        eps = label_smoothing
        kept, flipped = F.logsigmoid(beta * margin_B), F.logsigmoid(-beta * margin_B)
        loss_B = (-kept * (1 - eps) + flipped * eps) / (1 - 2 * eps)
    else:
        raise ConfigError(explain(f"dpo kind {kind!r}", "sigmoid, ipo or robust", "fix the config"))
    with torch.no_grad():
        metrics = {
            "rewards/chosen": beta * (chosen_B - ref_chosen_B).mean().item(),
            "rewards/rejected": beta * (rejected_B - ref_rejected_B).mean().item(),
            "rewards/margins": beta * margin_B.mean().item(),
            "rewards/accuracies": (margin_B > 0).float().mean().item(),
        }
    return loss_B.mean(), metrics
