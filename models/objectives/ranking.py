"""Ranking a positive ahead of its own negatives: InfoNCE, a hinge, and DPO on similarities.

similarities of the positive and of H negatives -> one loss. These are what the paper compares
Retrieval-GRPO with; it names them and prints no formula, so the forms are ours [TaoSearchEmb s4.2].

Shapes: B pairs, H negatives of a pair. Pure torch.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from models.objectives.dpo import dpo_loss


def hard_infonce(pos_B: torch.Tensor, neg_BH: torch.Tensor, tau: float = 0.05) -> torch.Tensor:
    """-log e^{s+/tau} / (e^{s+/tau} + sum_h e^{s_h/tau}), mean over pairs [TaoSearchEmb s4.2].

    >>> round(hard_infonce(torch.zeros(1), torch.zeros(1, 3), tau=1.0).item(), 4)  # log 4
    1.3863
    """
    scores_BP = torch.cat([pos_B[:, None], neg_BH], dim=1) / tau
    return -functional.log_softmax(scores_BP, dim=1)[:, 0].mean()


def margin_ranking(pos_B: torch.Tensor, neg_BH: torch.Tensor, margin: float = 0.1) -> torch.Tensor:
    """max(0, margin - s+ + s_h), mean over pairs and negatives [TaoSearchEmb s4.2].

    >>> round(margin_ranking(torch.tensor([0.5]), torch.tensor([[0.45, 0.2]])).item(), 4)
    0.025
    """
    return functional.relu(margin - pos_B[:, None] + neg_BH).mean()


def similarity_dpo(
    pos_B: torch.Tensor,
    neg_BH: torch.Tensor,
    ref_pos_B: torch.Tensor,
    ref_neg_BH: torch.Tensor,
    tau: float = 0.05,
    beta: float = 0.1,
) -> torch.Tensor:
    """-log sigmoid(beta/tau ((s+ - ref+) - (s_h - ref_h))), mean over pairs [TaoSearchEmb s4.2].

    DPO with the policy of Retrieval-GRPO, log pi(d|q) = s/tau - log Z(q): Z cancels in the
    difference, so similarities stand for log-probs. log 2 at the reference.

    >>> s, n = torch.tensor([0.5]), torch.tensor([[0.1]])
    >>> round(similarity_dpo(s, n, s, n).item(), 4)
    0.6931
    """
    wide = [x[:, None].expand_as(neg_BH).reshape(-1) / tau for x in (pos_B, ref_pos_B)]
    flat = [x.reshape(-1) / tau for x in (neg_BH, ref_neg_BH)]
    loss, _ = dpo_loss(wide[0], flat[0], wide[1], flat[1], beta)
    return loss
