"""Greedy reasoning for pairs: what the judge says when it is asked why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.judge.scoring import ScoringJudge
from models.lm.rollout import sample
from models.types import Pair


def decode_greedy(
    judge: ScoringJudge, pairs: Sequence[Pair], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """(response text, finished) for each pair, in order; [] for no pairs."""
    encoder = judge.encoder
    groups = sample(
        judge.model,
        [encoder.prompt(p.query, p.product) for p in pairs],
        group_size=1,
        max_new_tokens=max_new_tokens,
        end_id=encoder.end_id,
        generator=torch.Generator(device=judge.model.device),
        temperature=0.0,
        desc="reasoning",
    )
    return [(encoder.decode(group[0].ids), group[0].finished) for group in groups]
