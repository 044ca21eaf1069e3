"""CumPT and its calibration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.evaluation.tiers import TIER_OF_GRADE, Tier, calibrate_beta, cumpt_grades


@pytest.mark.parametrize(
    ("p", "beta", "grade"),
    [
        ([0.1, 0.1, 0.2, 0.6], 0.5, 4),
        ([0.1, 0.1, 0.4, 0.4], 0.5, 3),
        ([0.1, 0.4, 0.3, 0.2], 0.5, 3),
        ([0.1, 0.5, 0.2, 0.2], 0.5, 2),
        ([0.6, 0.2, 0.1, 0.1], 0.5, 1),
        ([0.0, 0.0, 0.0, 1.0], 0.99, 4),
    ],
)
def test_first_grade_whose_cumulative_probability_reaches_beta(
    p: list[float], beta: float, grade: int
) -> None:
    assert cumpt_grades(np.array([p]), beta).tolist() == [grade]


@given(st.integers(0, 10_000), st.floats(0.02, 0.5), st.floats(0.0, 0.49))
def test_a_higher_beta_never_raises_a_grade(seed: int, beta: float, more: float) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(4), size=8)
    assert (cumpt_grades(p, beta + more) <= cumpt_grades(p, beta)).all()


def test_tiers() -> None:
    assert [TIER_OF_GRADE[g] for g in (4, 3, 2, 1)] == [Tier.GOOD, Tier.GOOD, Tier.MID, Tier.BAD]


def test_calibration_finds_the_threshold_that_separates() -> None:
    gold = np.array([4, 4, 1, 1])
    p = np.array([[0.4, 0.0, 0.3, 0.3]] * 2 + [[0.9, 0.1, 0.0, 0.0]] * 2)
    beta, f1 = calibrate_beta(p, gold)
    assert f1 == 1.0 and cumpt_grades(p, beta).tolist() == [4, 4, 1, 1]
    assert beta <= 0.3


def test_calibration_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="no validation pairs"):
        calibrate_beta(np.zeros((0, 4)), np.zeros(0, int))
