"""CumPT: grades and tiers from cumulative probability, one threshold [TaoSR1 s3.4].

Consumes P(grade) -> produces a grade and an online tier. Pure numpy; N pairs.
"""

from __future__ import annotations

import enum

import numpy as np


class Tier(enum.StrEnum):
    """What the search page shows."""

    GOOD = "Good"
    MID = "Mid"
    BAD = "Bad"


TIER_OF_GRADE = {4: Tier.GOOD, 3: Tier.GOOD, 2: Tier.MID, 1: Tier.BAD}


def cumpt_grades(probabilities_NL: np.ndarray, beta_cum: float) -> np.ndarray:
    """The first grade, from 4 down, at which the cumulative probability reaches beta_cum.

    P4 >= b -> 4; P4 + P3 >= b -> 3; P4 + P3 + P2 >= b -> 2; otherwise 1 [TaoSR1 s3.4].

    >>> cumpt_grades(np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.0]]), 0.5).tolist()
    [3, 1]
    """
    cumulative_NL = np.cumsum(probabilities_NL[:, ::-1], axis=1)
    cumulative_NL[:, -1] = np.inf
    return 4 - np.argmax(cumulative_NL >= beta_cum, axis=1)


def calibrate_beta(
    probabilities_NL: np.ndarray, grades_N: np.ndarray, grid: int = 99
) -> tuple[float, float]:
    """The threshold with the best macro-F1 on validation, and that F1; ties go to the middle.

    Raises:
        ValueError: no pairs.
    """
    from sklearn.metrics import f1_score

    if len(grades_N) == 0:
        raise ValueError("got no validation pairs; expected some; label a few validation queries")
    betas = np.linspace(0.01, 0.99, grid)
    labels = sorted(set(grades_N.tolist()))
    scores = np.array(
        [
            f1_score(
                grades_N,
                cumpt_grades(probabilities_NL, b),
                labels=labels,
                average="macro",
                zero_division=0,
            )
            for b in betas
        ]
    )
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    return float(betas[best[len(best) // 2]]), float(scores.max())
