"""Measures of drift by hand: nothing on equal data, much on drift that was built in."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from models.evaluation import drift
from models.evaluation.drift import (
    confidence,
    coordinated_sample,
    entropy,
    jensen_shannon,
    mean_shift,
    mix,
    mmd,
    new_term_share,
)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cloud(seed: int, centre: float = 0.0, size: int = 64) -> np.ndarray:
    """Unit vectors around one direction, moved along another by `centre`."""
    rows = np.random.default_rng(seed).normal(0, 0.3, (size, 8))
    rows[:, 0] += 1.0
    rows[:, 1] += centre
    return unit(rows)


def test_the_examples_hold() -> None:
    assert doctest.testmod(drift).failed == 0


def test_a_sample_depends_on_the_set_and_overlaps_with_that_of_a_larger_one() -> None:
    texts = [f"query {i}" for i in range(200)]
    first = coordinated_sample(texts, 20)
    assert first == coordinated_sample(reversed(texts), 20) and len(set(first)) == 20
    more = coordinated_sample([*texts, *(f"other {i}" for i in range(20))], 20)
    # a tenth of the set is new: independent draws of 20 of 220 would share two
    assert len(set(first) & set(more)) >= 15


def test_new_terms_are_weighed_by_frequency_and_stemmed() -> None:
    known = {"run", "shoe"}
    assert new_term_share([("running shoes", 5.0)], known) == 0.0
    # terms: run shoe (weight 3 each), zyx shoe (1 each); new mass 1 of 8
    assert new_term_share([("run shoe", 3.0), ("zyx shoe", 1.0)], known) == 1 / 8
    assert new_term_share([("zyx", 2.0)], set()) == 1.0
    assert new_term_share([("the of", 2.0)], known) == 0.0, "no term at all"


def test_jensen_shannon_by_hand() -> None:
    p, q = {"a": 0.5, "b": 0.5}, {"a": 1.0}
    # m = {a: .75, b: .25}; KL(p|m) = .5 log2(.5/.75) + .5 log2(.5/.25), KL(q|m) = log2(1/.75)
    expected = (0.5 * math.log2(2 / 3) + 0.5 * math.log2(2) + math.log2(4 / 3)) / 2
    assert jensen_shannon(p, q) == pytest.approx(expected)
    assert jensen_shannon(q, p) == pytest.approx(expected)
    assert jensen_shannon(p, dict(reversed(p.items()))) == 0.0
    assert jensen_shannon({}, {}) == 0.0 and jensen_shannon({}, p) == 1.0


def test_an_eighth_of_the_traffic_moving_is_about_the_default_limit() -> None:
    """What `MonitorConfig.segment_shift` says of its limit."""
    before = mix((f"s{i}", 1.0) for i in range(6))
    after = before | {"s0": before["s0"] + 0.125, "s1": before["s1"] - 0.125}
    assert jensen_shannon(before, after) == pytest.approx(0.041, abs=0.001)


def test_mix_of_nothing_is_empty() -> None:
    assert mix([]) == {} and mix([("a", 0.0)]) == {}


def test_mean_shift_by_hand() -> None:
    right, up = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    both = np.concatenate([right, up])
    assert mean_shift(right, up) == pytest.approx(1.0)
    assert mean_shift(right, both) == pytest.approx(1 - 1 / math.sqrt(2))
    assert mean_shift(right, right) == 0.0
    balanced = np.array([[1.0, 0.0], [-1.0, 0.0]])
    assert mean_shift(balanced, right) == 1.0 and mean_shift(balanced, balanced) == 0.0


def test_mmd_by_hand() -> None:
    x, y = np.array([[0.0], [0.0]]), np.array([[1.0], [1.0]])
    # distances: 0 twice, 1 four times; median 1; k(x, y) = e^-1, all others 1
    assert mmd(x, y) == pytest.approx(2 - 2 * math.exp(-1))
    assert mmd(x, x) == 0.0
    # one point far out: most distances are 0, so the largest is the scale
    far = np.array([[0.0], [0.0], [0.0], [2.0]])
    near = np.zeros((4, 1))
    # 6 of its 12 pairs and 4 of the 16 across have the far point
    within, across = (6 + 6 * math.exp(-1)) / 12, (12 + 4 * math.exp(-1)) / 16
    assert mmd(near, far) == pytest.approx(1 + within - 2 * across)


def test_mmd_tells_a_moved_cloud_from_another_draw_of_the_same() -> None:
    same = [mmd(cloud(0, size=size), cloud(1, size=size)) for size in (16, 64, 256)]
    assert mmd(cloud(0), cloud(0)) == 0.0
    assert max(same) < 0.02 < 0.1 < mmd(cloud(0), cloud(1, centre=0.6))


def test_confidence_and_entropy_by_hand() -> None:
    sure, torn = [1.0, 0.0, 0.0, 0.0], [0.25] * 4
    p_PL = np.array([sure, torn], np.float32)
    assert confidence(p_PL) == pytest.approx((1 + 0.25) / 2)
    assert entropy(p_PL) == pytest.approx((0 + math.log(4)) / 2)
