"""Exact cosine search in numpy: the oracle the other indexes are measured against.

Shapes: N products, Q queries, D dim, k results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from models.errors import ConfigError, explain

PRODUCTS_AT_ONCE = 8192
"""Products whose scores are in memory at once."""


def top_k(scores_QN: np.ndarray, k: int) -> np.ndarray:
    """Column numbers [Q, min(k, N)] of the largest scores, best first; ties: the lower column.

    >>> top_k(np.array([[0.1, 0.9, 0.9, 0.3]]), 3).tolist()
    [[1, 2, 3]]
    """
    k = min(k, scores_QN.shape[1])
    if k == 0:
        return np.zeros((len(scores_QN), 0), dtype=np.int64)
    kth_Q1 = -np.partition(-scores_QN, k - 1, axis=1)[:, k - 1 : k]
    rows = []
    for row, kth in zip(scores_QN, kth_Q1[:, 0], strict=True):
        candidates = np.flatnonzero(row >= kth)
        rows.append(candidates[np.argsort(-row[candidates], kind="stable")][:k])
    return np.array(rows, dtype=np.int64).reshape(len(scores_QN), k)


class ExactIndex:
    """Brute force over all vectors, in blocks of queries and of products.

    Args:
        ids: product ids [N]; vectors_ND: their vectors, normalised here.

    Raises:
        ConfigError: another number of ids than of vectors.
    """

    def __init__(self, ids: Sequence[str], vectors_ND: np.ndarray) -> None:
        if len(ids) != len(vectors_ND):
            raise ConfigError(
                explain(f"{len(ids)} ids", f"{len(vectors_ND)}, one a vector", "pass them together")
            )
        self.ids = list(ids)
        self.vectors_ND = _unit(vectors_ND).astype(np.float32, copy=False)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, vectors_QD: np.ndarray, k: int, block: int = 256) -> np.ndarray:
        """Row numbers [Q, min(k, N)] of the nearest products, best first; ties: the lower row."""
        found = [
            _running_top(self._blocks(), vectors_QD[start : start + block], k)[0]
            for start in range(0, len(vectors_QD), block)
        ]
        return np.concatenate(found) if found else np.zeros((0, min(k, len(self))), dtype=np.int64)

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row numbers [B], vectors [B, D]), in order."""
        for start in range(0, len(self), PRODUCTS_AT_ONCE):
            vectors_BD = self.vectors_ND[start : start + PRODUCTS_AT_ONCE]
            yield np.arange(start, start + len(vectors_BD)), vectors_BD

    def search(
        self, vectors_QD: np.ndarray, k: int, where: str | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Product ids and cosines, best first.

        Raises:
            ConfigError: a filter was given; this index keeps no columns.
        """
        if where is not None:
            raise ConfigError(
                explain(f"filter {where!r} on an exact index", "None", "use a LanceIndex")
            )
        unit_QD = _unit(vectors_QD)
        rows_QK = self.rows(unit_QD, k)
        ids = [[self.ids[i] for i in row] for row in rows_QK]
        cosines = [
            (self.vectors_ND[row] @ q).tolist() for q, row in zip(unit_QD, rows_QK, strict=True)
        ]
        return ids, cosines


def exact_top(
    batches: Iterable[tuple[list[str], np.ndarray]], queries_QD: np.ndarray, k: int
) -> tuple[list[list[str]], np.ndarray]:
    """The k nearest of a stream of (ids [B], vectors [B, D]): ids [Q][k], cosines [Q, k].

    Holds one batch and the best so far; ties: the earlier one. Vectors are normalised here.
    """
    unit = (
        (np.array(ids, object), _unit(np.asarray(vectors_BD, np.float32)))
        for ids, vectors_BD in batches
    )
    ids_QK, best_QK = _running_top(unit, _unit(np.asarray(queries_QD, np.float32)), k)
    return [list(row) for row in ids_QK], best_QK


def _running_top(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], queries_QD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [Q, K] and scores [Q, K] of the k nearest in a stream of (labels [B],
    vectors [B, D]), best first; ties: the earlier one."""
    labels_QK = np.zeros((len(queries_QD), 0), np.int64)
    best_QK = np.zeros((len(queries_QD), 0), np.float32)
    for labels_B, vectors_BD in batches:
        scores_QB = queries_QD @ vectors_BD.T
        columns_QK = top_k(scores_QB, k)
        best_QK = np.hstack([best_QK, np.take_along_axis(scores_QB, columns_QK, 1)])
        labels_QK = np.hstack([labels_QK, labels_B[columns_QK]])
        order_QK = top_k(best_QK, k)
        best_QK = np.take_along_axis(best_QK, order_QK, 1)
        labels_QK = np.take_along_axis(labels_QK, order_QK, 1)
    return labels_QK, best_QK


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    norm_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.maximum(norm_N1, 1e-12)


def recall_with_ties(
    found: Sequence[Sequence[str]],
    found_scores: Sequence[Sequence[float]],
    exact: Sequence[Sequence[str]],
    exact_scores: np.ndarray | Sequence[Sequence[float]],
    k: int,
    tolerance: float = 1e-5,
) -> float:
    """Recall@k where a product as near as the k-th exact one counts, whichever of them came first.

    Catalogues hold copies: of ten equal products, no ten are more right than others. A result
    counts when it is among the first k exact ones or its cosine reaches the k-th one's.

    >>> recall_with_ties([["a", "x"]], [[0.9, 0.5]], [["a", "b", "c"]], [[0.9, 0.5, 0.4]], 2)
    1.0
    >>> recall_with_ties([["a", "c"]], [[0.9, 0.4]], [["a", "b", "c"]], [[0.9, 0.5, 0.4]], 2)
    0.5
    """
    shares = []
    rows = zip(found, found_scores, exact, exact_scores, strict=True)
    for ids, scores, truth, true_scores in rows:
        wanted = set(truth[:k])
        if wanted:
            last = true_scores[len(wanted) - 1] - tolerance
            pairs = zip(ids[:k], scores[:k], strict=True)
            shares.append(sum(i in wanted or s >= last for i, s in pairs) / len(wanted))
    return float(np.mean(shares)) if shares else 1.0
