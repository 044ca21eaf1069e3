"""CumPT and its calibration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.evaluation.tiers import (
    MEDIAN,
    TIER_OF_GRADE,
    Tier,
    calibrate,
    cumpt_grades,
    scarce,
    sharpened,
)
from models.types import GRADES


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
    cumpt, f1 = calibrate(p, gold)
    assert f1 == 1.0 and cumpt.grades(p).tolist() == [4, 4, 1, 1]
    assert 0.1 < cumpt.beta <= 0.3 and cumpt.sharpness == 1.0


def test_flat_posteriors_are_sharpened() -> None:
    """The largest of four close probabilities is right every time: no beta alone can say so."""
    gold = np.array([1, 2, 3, 4] * 5)
    p = np.full((20, 4), 0.24)
    p[np.arange(20), gold - 1] = 0.28
    cumpt, f1 = calibrate(p, gold)
    assert f1 == 1.0 and cumpt.sharpness == 8.0
    assert max((cumpt_grades(p, b) == gold).mean() for b in np.linspace(0.01, 0.99, 99)) <= 0.5


@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0, 8.0]))
def test_sharpening_keeps_order_and_sums_to_one(seed: int, sharpness: float) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(4, 0.1), size=8)
    out = sharpened(p, sharpness)
    assert np.allclose(out.sum(1), 1) and (out.argmax(1) == p.argmax(1)).all()
    assert (out.max(1) >= p.max(1) - 1e-12).all()


@given(st.integers(0, 10_000))
def test_the_median_is_least_far_away_in_expectation(seed: int) -> None:
    p_NL = np.random.default_rng(seed).dirichlet(np.full(4, 0.5), size=8)
    grades = np.array(GRADES)
    distance_NL = p_NL @ np.abs(grades[:, None] - grades[None])
    read_N = MEDIAN.grades(p_NL)
    assert np.allclose(distance_NL[np.arange(8), read_N - 1], distance_NL.min(1))


def test_the_median_sees_the_middle_between_two_likely_ends() -> None:
    p_NL = np.array([[0.4, 0.11, 0.1, 0.39], [0.4, 0.05, 0.15, 0.4], [0.6, 0.0, 0.0, 0.4]])
    assert MEDIAN.grades(p_NL).tolist() == [2, 3, 1]


def test_a_grade_is_scarce_where_training_has_it_and_validation_does_not() -> None:
    train = np.repeat([1, 2, 3, 4], [50, 5, 4, 50])
    assert scarce(np.repeat([1, 2, 4], [60, 4, 60]), train) == [2]
    assert scarce(np.repeat([1, 2, 4], [60, 5, 60]), train) == [], "3 is as good as unknown"


def test_calibration_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="no validation pairs"):
        calibrate(np.zeros((0, 4)), np.zeros(0, int))
