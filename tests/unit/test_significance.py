"""The paired bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.errors import ConfigError
from models.evaluation.significance import mean_interval, paired_bootstrap


def test_a_clear_winner() -> None:
    result = paired_bootstrap([0.6] * 30, [0.5] * 30)
    assert result.diff == pytest.approx(0.1)
    assert (result.low, result.high) == pytest.approx((0.1, 0.1))
    assert (result.win, result.tie, result.loss) == (30, 0, 0)
    assert result.significant and result.p == 1 / 10_000


def test_equal_runs_differ_by_nothing() -> None:
    result = paired_bootstrap([0.1, 0.9], [0.1, 0.9])
    assert (result.diff, result.low, result.high, result.p) == (0, 0, 0, 1)
    assert (result.win, result.tie, result.loss, result.significant) == (0, 2, 0, False)


def test_interval_has_the_width_of_the_standard_error() -> None:
    delta = np.random.default_rng(0).normal(0.0, 1.0, 400)
    result = paired_bootstrap(delta, np.zeros(400), num_samples=4000)
    width = 2 * 1.96 * delta.std() / math.sqrt(400)
    assert result.high - result.low == pytest.approx(width, rel=0.05)
    assert result.low < delta.mean() < result.high


def test_swapping_the_runs_mirrors_the_result() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(50), rng.random(50)
    one, other = paired_bootstrap(a, b, seed=3), paired_bootstrap(b, a, seed=3)
    assert (one.diff, one.low, one.high) == pytest.approx((-other.diff, -other.high, -other.low))
    assert (one.win, one.loss, one.p) == (other.loss, other.win, pytest.approx(other.p))


def test_nan_queries_are_left_out_of_both() -> None:
    result = paired_bootstrap([1.0, float("nan"), 1.0], [0.0, 1.0, float("nan")])
    assert (result.n, result.win, result.diff) == (1, 1, 1.0)


def test_no_query_at_all_is_no_difference() -> None:
    assert paired_bootstrap([], []).p == 1.0
    assert math.isnan(mean_interval([float("nan")])[0])


def test_unaligned_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="align"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_the_seed_decides() -> None:
    values = np.random.default_rng(2).random(40)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
