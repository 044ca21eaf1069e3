"""Several rankings as one: reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Sequence

RRF_K = 60
"""The constant of the paper."""


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[str]], k: int, constant: int = RRF_K
) -> list[tuple[str, float]]:
    """(id, sum over rankings of 1 / (constant + rank)), best first; ties: the first seen.

    >>> fused = reciprocal_rank_fusion([["a", "b"], ["b", "c"]], 2, constant=0)
    >>> fused == [("b", 1 / 2 + 1), ("a", 1.0)]
    True
    """
    scores: dict[str, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (constant + rank)
    return sorted(scores.items(), key=lambda pair: -pair[1])[:k]
