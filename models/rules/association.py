"""Which words of items go with which words of queries, beyond the words they share.

Consumes labelled pairs and what an estimate without these words got wrong -> produces a shift of
the grade a (query word, item word). "lamp" asks for a bulb and for a shade, and overlap cannot tell
which of them people accept; the labels can, wherever a store has enough of them.

Shapes: N pairs, C occurrences (a word of a pair's query with a word of its item), K distinct ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.text import product_text, terms
from models.types import Product, Query

MIN_QUERIES = 3
"""Queries that must hold both words. Choosing words by how far they shift instead chooses noise: it
loses all that the shifts are worth (infra/LOG.md)."""
SHRINK = 10.0
"""Pairs without any shift that are added to each mean."""
ITEM_WORDS = 24
"""Words of an item's line that are looked at; titles open with what the thing is."""
NUM_SHIFTS = 4
"""Length of `WordAssociations.shifts`."""

Words = tuple[tuple[str, ...], tuple[str, ...]]
"""Terms of a query, and the first of an item's."""


def words_of(query: Query, product: Product) -> Words:
    """What is looked up of a pair."""
    return terms(query.text), terms(product_text(product))[:ITEM_WORDS]


@dataclass(frozen=True)
class WordAssociations:
    """shift: {query term: {item term: grades above what was expected, shrunk}}."""

    shift: Mapping[str, Mapping[str, float]]

    def shifts(self, words: Words) -> list[float]:
        """Sum, largest, least and mean shift of a pair's words; zeros where none is known."""
        found = [
            known[there]
            for asked in words[0]
            if (known := self.shift.get(asked)) is not None
            for there in words[1]
            if there in known
        ]
        if not found:
            return [0.0] * NUM_SHIFTS
        return [sum(found), max(found), min(found), sum(found) / len(found)]


class Occurrences:
    """Which words occur together in labelled pairs; queries come in folds.

    fold_N: of each pair; pairs of one query are in one fold.
    """

    def __init__(
        self, words: Sequence[Words], query_N: Sequence[str], fold_N: np.ndarray, folds: int
    ) -> None:
        number: dict[tuple[str, str], int] = {}
        rows, keys = [], []
        for row, (asked, there) in enumerate(words):
            for a in asked:
                for b in there:
                    rows.append(row)
                    keys.append(number.setdefault((a, b), len(number)))
        self._keys, self._folds = list(number), folds
        self._row_C, self._key_C = np.array(rows, dtype=np.int64), np.array(keys, dtype=np.int64)
        self._fold_C = fold_N[self._row_C]
        ids = {q: i for i, q in enumerate(dict.fromkeys(query_N))}
        query_C = np.array([ids[q] for q in query_N], dtype=np.int64)[self._row_C]
        _, first = np.unique(query_C * len(number) + self._key_C, return_index=True)
        self._count_FK = self._by_fold(np.ones(len(keys)))
        once_C = np.zeros(len(keys))
        once_C[first] = 1
        self._queries_FK = self._by_fold(once_C)

    def shifts(self, residual_N: np.ndarray, without: int | None) -> np.ndarray:
        """Shifts of each pair's words as pairs of other folds than its own have them.

        without: a fold that is not read at all; its pairs get what all others say.

        Returns:
            [N, NUM_SHIFTS], as `WordAssociations.shifts`.
        """
        sum_FK = self._by_fold(residual_N[self._row_C])
        out_NS = np.zeros((len(residual_N), NUM_SHIFTS))
        for fold in range(self._folds):
            mean_K, known_K = self._means(sum_FK, {fold, without})
            own_C = (self._fold_C == fold) & known_K[self._key_C]
            row_C, value_C = self._row_C[own_C], mean_K[self._key_C[own_C]]
            count_N = np.bincount(row_C, minlength=len(out_NS))
            sum_N = np.bincount(row_C, value_C, minlength=len(out_NS))
            most_N, least_N = np.full(len(out_NS), -np.inf), np.full(len(out_NS), np.inf)
            np.maximum.at(most_N, row_C, value_C)
            np.minimum.at(least_N, row_C, value_C)
            found_N = count_N > 0
            mean_N = sum_N / np.maximum(count_N, 1)
            out_NS[found_N] = np.stack([sum_N, most_N, least_N, mean_N], axis=1)[found_N]
        return out_NS

    def associations(self, residual_N: np.ndarray, without: int | None) -> WordAssociations:
        """What new pairs are read with, learned from all folds but `without`."""
        sum_FK = self._by_fold(residual_N[self._row_C])
        mean_K, known_K = self._means(sum_FK, {without})
        out: dict[str, dict[str, float]] = defaultdict(dict)
        for key in np.flatnonzero(known_K):
            asked, there = self._keys[key]
            out[asked][there] = round(float(mean_K[key]), 4)
        return WordAssociations(dict(out))

    def _means(
        self, sum_FK: np.ndarray, left_out: set[int | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shrunk mean residual of every word pair, and whether enough queries hold it."""
        read = [f for f in range(self._folds) if f not in left_out]
        mean_K = sum_FK[read].sum(0) / (self._count_FK[read].sum(0) + SHRINK)
        return mean_K, self._queries_FK[read].sum(0) >= MIN_QUERIES

    def _by_fold(self, value_C: np.ndarray) -> np.ndarray:
        """[folds, K]: sums of a value over the occurrences of each word pair."""
        size = self._folds * len(self._keys)
        flat = np.bincount(self._fold_C * len(self._keys) + self._key_C, value_C, minlength=size)
        return flat.reshape(self._folds, len(self._keys))
