"""pass@k against values worked out by hand, and against every subset."""

from __future__ import annotations

from itertools import combinations

import pytest

from models.evaluation.pass_at_k import pass_at_k


def test_hand_values() -> None:
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - (3 / 5) * (2 / 4))
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - (3 / 5) * (2 / 4) * (1 / 3))
    assert pass_at_k(5, 2, 4) == 1.0  # three wrong ones: no four of them
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 5, 1) == 1.0


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_it_is_the_share_of_subsets_with_a_right_one(correct: int, k: int) -> None:
    right = [i < correct for i in range(5)]
    subsets = list(combinations(right, k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= k <= n"):
        pass_at_k(n, correct, k)
