"""What words of items say of queries' words: learned from other folds, and from enough queries."""

from __future__ import annotations

import numpy as np
import pytest

from models.rules.association import (
    MIN_QUERIES,
    SHRINK,
    Occurrences,
    WordAssociations,
    words_of,
)
from models.types import Product, Query


def pairs_of(
    *rows: tuple[str, str, int, float],
) -> tuple[Occurrences, np.ndarray]:
    """Occurrences of (query, title, fold, residual) rows, a query each, and the residuals."""
    words = [words_of(Query(str(i), q), Product(str(i), t)) for i, (q, t, _, _) in enumerate(rows)]
    fold_N = np.array([fold for _, _, fold, _ in rows])
    ids = [str(i) for i in range(len(rows))]
    return Occurrences(words, ids, fold_N, 3), np.array([r for _, _, _, r in rows])


BULBS = [("lamp", "bulb", fold, 1.0) for fold in (0, 0, 1, 1, 2, 2)]
SHADES = [("lamp", "shade", fold, -0.5) for fold in (0, 0, 1, 1, 2, 2)]


def test_shifts_are_shrunk_means_of_what_overlap_got_wrong() -> None:
    found = pairs_of(*BULBS, *SHADES)[0].associations(pairs_of(*BULBS, *SHADES)[1], None)
    assert found.shift == {
        "lamp": {
            "bulb": pytest.approx(6 * 1.0 / (6 + SHRINK)),
            "shade": pytest.approx(6 * -0.5 / (6 + SHRINK)),
        }
    }
    both = found.shifts((("lamp", "unheard"), ("bulb", "shade", "red")))
    assert both == pytest.approx([0.1875, 0.375, -0.1875, 0.09375])
    assert found.shifts((("sofa",), ("bulb",))) == [0.0] * 4


def test_a_pair_is_read_without_its_own_fold() -> None:
    """Fold 0's bulbs went wrong the other way: they are told of the others, not of themselves."""
    rows = [(q, t, f, -9.0 if f == 0 else r) for q, t, f, r in BULBS]
    occurrences, residual_N = pairs_of(*rows)
    shifts_NS = occurrences.shifts(residual_N, None)
    assert shifts_NS[:2, 0] == pytest.approx(4 / (4 + SHRINK))
    assert (shifts_NS[2:, 0] < 0).all()


def test_a_fold_that_is_not_read_changes_nothing() -> None:
    rows = [(q, t, f, 100.0 if f == 2 else r) for q, t, f, r in BULBS]
    (plain, plain_N), (lying, lying_N) = pairs_of(*BULBS, *BULBS), pairs_of(*rows, *rows)
    assert plain.associations(plain_N, 2) == lying.associations(lying_N, 2)
    assert np.array_equal(plain.shifts(plain_N, 2), lying.shifts(lying_N, 2))
    assert plain.associations(plain_N, None) != lying.associations(lying_N, None)


def test_words_of_too_few_queries_say_nothing_however_many_their_pairs() -> None:
    few = MIN_QUERIES - 1
    words = [words_of(Query("q", "lamp"), Product("p", "bulb"))] * 30
    for queries in (few, few + 1):
        ids = [f"q{i % queries}" for i in range(30)]
        occurrences = Occurrences(words, ids, np.zeros(30, dtype=int), 3)
        found = occurrences.associations(np.ones(30), None)
        assert bool(found.shift) == (queries > few)
        assert occurrences.shifts(np.ones(30), None).any() == np.False_, "one fold knows no other"


def test_a_training_pair_is_read_as_a_new_one_would_be() -> None:
    """By what is learned without its fold."""
    occurrences, residual_N = pairs_of(*BULBS, *SHADES, *BULBS)
    shifts_NS = occurrences.shifts(residual_N, None)
    others: WordAssociations = occurrences.associations(residual_N, 1)
    assert shifts_NS[2] == pytest.approx(others.shifts((("lamp",), ("bulb",))), abs=1e-4)
    assert shifts_NS[8] == pytest.approx(others.shifts((("lamp",), ("shade",))), abs=1e-4)
