"""Exact cosine search in numpy: the oracle the other indexes are measured against.

Shapes: N products, Q queries, D dim, k results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.errors import ConfigError, explain


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
    """Brute force over all vectors, in blocks of queries.

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
        norm_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        self.ids = list(ids)
        self.vectors_ND = (vectors_ND / np.maximum(norm_N1, 1e-12)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, vectors_QD: np.ndarray, k: int, block: int = 256) -> np.ndarray:
        """Row numbers [Q, min(k, N)] of the nearest products, best first."""
        found = [
            top_k(vectors_QD[start : start + block] @ self.vectors_ND.T, k)
            for start in range(0, len(vectors_QD), block)
        ]
        return np.concatenate(found) if found else np.zeros((0, min(k, len(self))), dtype=np.int64)

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
        norm_Q1 = np.linalg.norm(vectors_QD, axis=1, keepdims=True)
        unit_QD = vectors_QD / np.maximum(norm_Q1, 1e-12)
        rows_QK = self.rows(unit_QD, k)
        ids = [[self.ids[i] for i in row] for row in rows_QK]
        cosines = [
            (self.vectors_ND[row] @ q).tolist() for q, row in zip(unit_QD, rows_QK, strict=True)
        ]
        return ids, cosines


def recall_against(found: Sequence[Sequence[str]], exact: Sequence[Sequence[str]]) -> float:
    """Mean share of the exact neighbours that were found; 1 when there is nothing to find.

    >>> recall_against([["a", "b"], ["c", "x"]], [["a", "b"], ["c", "d"]])
    0.75
    """
    shares = [len(set(f) & set(e)) / len(e) for f, e in zip(found, exact, strict=True) if len(e)]
    return float(np.mean(shares)) if shares else 1.0
