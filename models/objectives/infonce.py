"""InfoNCE with in-batch and global random negatives, and a guard against false negatives.

query, positive and negative vectors -> one loss.

Shapes: B pairs, N global negatives, P = B + N columns of the pool, D dim.

Departures from the paper: known positives of a query and copies of its own positive are masked out
of its negatives, and pairs carry weights (graded labels). Both are off by default.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def infonce(
    q_BD: torch.Tensor,
    pos_BD: torch.Tensor,
    global_ND: torch.Tensor | None = None,
    tau: float = 0.05,
    masked_BP: torch.Tensor | None = None,
    weight_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log e^{s(q,d+)/tau} / (sum_B e^{s(q,d)/tau} + sum_G e^{s(q,d)/tau}) [TaoSearchEmb s3.1].

    s is the cosine, in float32 under autocast too: tau is so small that bf16 would move the
    logits by a tenth. The mean over pairs, weighted by `weight_B` when given.

    Args:
        q_BD, pos_BD: query i and its positive product i; any length, normalised here.
        global_ND: products drawn from the whole catalogue, shared by all queries of the batch.
        tau: temperature > 0; tau = 1/scale of MultipleNegativesRankingLoss.
        masked_BP: True where pool column p is no honest negative of query b (`false_negatives`).
            The positive itself (the diagonal) is never masked.
        weight_B: weights >= 0 of the pairs; if all are 0 the loss is 0.

    >>> one = torch.eye(2)
    >>> round(infonce(one, one, tau=1.0).item(), 4)  # log(1 + e^-1)
    0.3133
    """
    pool_PD = pos_BD if global_ND is None else torch.cat([pos_BD, global_ND])
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD = functional.normalize(q_BD.float(), dim=-1)
        score_BP = q_BD @ functional.normalize(pool_PD.float(), dim=-1).T / tau
    target_B = torch.arange(len(q_BD), device=q_BD.device)
    if masked_BP is not None:
        masked_BP = masked_BP.clone()
        masked_BP[target_B, target_B] = False
        score_BP = score_BP.masked_fill(masked_BP, float("-inf"))
    loss_B = functional.cross_entropy(score_BP, target_B, reduction="none")
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp(min=1e-12)


def false_negatives(
    positives: list[set[str]], pos_ids: list[str], global_ids: list[str]
) -> torch.Tensor:
    """True where a pool column is a known positive of the row's query, or a copy of its positive.

    Args:
        positives: the known positive product ids of each query of the batch [B].
        pos_ids: the product id of each pair [B]; global_ids: of each global negative [N].

    Returns:
        bool [B, B + N]. The diagonal is False: it is the positive, not a negative.

    >>> false_negatives([{"a"}, {"b"}], ["a", "b"], ["b", "c"]).int().tolist()
    [[0, 0, 0, 0], [0, 0, 1, 0]]
    """
    pool = [*pos_ids, *global_ids]
    rows = [
        [(p in known or p == own) and column != row for column, p in enumerate(pool)]
        for row, (known, own) in enumerate(zip(positives, pos_ids, strict=True))
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(pos_ids), len(pool))
