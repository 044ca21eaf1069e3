"""CumPT: grades and tiers from cumulative probability, one threshold [TaoSR1 s3.4].

Consumes P(grade) -> produces a grade and an online tier. Pure numpy; N pairs.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from models.evaluation.judge import class_f1
from models.types import GRADES


class Tier(enum.StrEnum):
    """What the search page shows."""

    GOOD = "Good"
    MID = "Mid"
    BAD = "Bad"


BETAS = np.linspace(0.01, 0.99, 99)
SHARPNESSES = (1.0, 2.0, 4.0, 8.0)
"""At 8 the reading is close to argmax."""
WINDOW = 7
"""Thresholds, .01 apart; a few hundred pairs move F1 by more than its true slope over them."""

TIER_OF_GRADE = {4: Tier.GOOD, 3: Tier.GOOD, 2: Tier.MID, 1: Tier.BAD}


@dataclass(frozen=True)
class CumPT:
    """A calibrated reading of P(grade) [TaoSR1 s3.4].

    beta: the one threshold. sharpness: P is raised to it and normalised first; 1 is the paper.
    Ours: the posteriors of a small judge are flat, and a cumulative sum of flat ones passes any
    beta at a middle grade whatever the most likely grade is.
    """

    beta: float
    sharpness: float = 1.0

    def grades(self, probabilities_NL: np.ndarray) -> np.ndarray:
        """The first grade, from 4 down, at which the cumulative probability reaches beta.

        >>> CumPT(0.5).grades(np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.0]])).tolist()
        [3, 1]
        >>> CumPT(0.5, sharpness=8).grades(np.array([[0.1, 0.2, 0.3, 0.4]])).tolist()
        [4]
        """
        return cumpt_grades(sharpened(probabilities_NL, self.sharpness), self.beta)


MEDIAN = CumPT(0.5)
"""The middle of P(grade), from which a label is least far away in expectation. It needs no
calibration; the most likely grade leaves out the ones between two likely ends."""
ENOUGH = 5
"""Validation pairs of a grade. With fewer of one, validation says nothing of where it begins, and
`MEDIAN` is the better reading."""


def scarce(grades_N: np.ndarray, known_M: np.ndarray) -> list[int]:
    """Grades that have `ENOUGH` of the known labels and fewer than that among `grades_N`.

    >>> scarce(np.array([1] * 9 + [4] * 9), np.array([1] * 5 + [2] * 5 + [3] * 4 + [4] * 5))
    [2]
    """
    return [g for g in GRADES if (grades_N == g).sum() < ENOUGH and (known_M == g).sum() >= ENOUGH]


def sharpened(probabilities_NL: np.ndarray, sharpness: float) -> np.ndarray:
    """p^s / sum p^s, a row each; computed from p / max p, so that nothing underflows to 0 / 0."""
    top_N1 = probabilities_NL.max(axis=1, keepdims=True)
    powers_NL = (probabilities_NL / top_N1) ** sharpness
    out: np.ndarray = powers_NL / powers_NL.sum(axis=1, keepdims=True)
    return out


def cumpt_grades(probabilities_NL: np.ndarray, beta_cum: float) -> np.ndarray:
    """The first grade, from 4 down, at which the cumulative probability reaches beta_cum.

    P4 >= b -> 4; P4 + P3 >= b -> 3; P4 + P3 + P2 >= b -> 2; otherwise 1 [TaoSR1 s3.4].

    >>> cumpt_grades(np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.0]]), 0.5).tolist()
    [3, 1]
    """
    cumulative_NL = np.cumsum(probabilities_NL[:, ::-1], axis=1)
    cumulative_NL[:, -1] = np.inf
    return 4 - np.argmax(cumulative_NL >= beta_cum, axis=1)


def calibrate(probabilities_NL: np.ndarray, grades_N: np.ndarray) -> tuple[CumPT, float]:
    """The reading with the best macro-F1 on validation [TaoSR1 s3.4], and its F1 there.

    Best by F1 averaged over `WINDOW` neighbouring thresholds (ours), so that a lucky spike is no
    optimum. Ties: the smallest sharpness, then the middle of the thresholds.

    Raises:
        ValueError: no pairs.
    """
    if len(grades_N) == 0:
        raise ValueError("got no validation pairs; expected some; label a few validation queries")
    best: tuple[float, CumPT, float] | None = None
    for sharpness in SHARPNESSES:
        p_NL = sharpened(probabilities_NL, sharpness)
        raw = np.array(
            [np.mean([*class_f1(grades_N, cumpt_grades(p_NL, b)).values()]) for b in BETAS]
        )
        padded = np.pad(raw, WINDOW // 2, mode="reflect")
        smooth = np.convolve(padded, np.full(WINDOW, 1 / WINDOW), mode="valid")
        if best is None or smooth.max() > best[0] + 1e-9:
            tied = np.flatnonzero(smooth >= smooth.max() - 1e-9)
            at = tied[len(tied) // 2]
            best = (smooth.max(), CumPT(round(float(BETAS[at]), 4), sharpness), float(raw[at]))
    assert best is not None
    return best[1], best[2]
