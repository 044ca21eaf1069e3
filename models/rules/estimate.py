"""A first estimate of the grade from the evidence alone, learned from all labelled pairs.

Consumes labelled pairs and their evidence -> produces a linear model, and for a pair a number in
[1, 4] that stands in the prompt right before the judge's grade. A 135M judge sees a few hundred
pairs in its minutes; the linear model sees all of them in seconds, and hands on what they say about
words. What the words mean is left to the judge.

A training query's own labels are left out when its own pairs are read (cross-fitting by query), so
that the estimate is as good in training as it will be on new queries, no better.

Tensor legend: N pairs, F features (with a constant).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from models.rules.evidence import NUM_FEATURES, Evidence
from models.types import GRADES, Pair, Query

FOLDS = 5
MAX_PAIRS = 20_000
"""Pairs read at most: the error of so few weights is far below that of the labels by then."""
RIDGE = 0.03
"""Weight of the squared norm, the features scaled to unit variance, per pair."""
KNOTS = 33
"""Points of the monotone curve from the linear model's value to the estimate."""


def features(evidence: Evidence) -> list[float]:
    """What the estimate is linear in, [F]: counts, overlap, its products, a constant."""
    found, missing = len(evidence.found), len(evidence.missing)
    present = sum(p for _, p in evidence.excluded)
    values: list[float] = [
        found / max(1, found + missing),
        min(missing, 4),
        min(found + missing, 8),
        present,
        len(evidence.excluded) - present,
        evidence.price_ok is True,
        evidence.price_ok is False,
        *(evidence.kind == k for k in ("same", "sibling", "other")),
    ]
    overlap = [0.0] * NUM_FEATURES if evidence.overlap is None else evidence.overlap.features()
    products = [a * b for a, b in combinations_with_replacement(overlap, 2)]
    return [*map(float, values), *overlap, *products, 1.0]


@dataclass(frozen=True)
class GradeEstimate:
    """weights: [1 + FOLDS][F], of all training queries and of all but one fold's.

    knots: values of the linear model, increasing, that stand for estimates evenly from 1 to 4.
    trained: ids of the training queries.
    """

    weights: Sequence[Sequence[float]]
    knots: Sequence[float]
    trained: frozenset[str]

    @classmethod
    def fit(cls, pairs: Sequence[Pair], gather: Callable[[Pair], Evidence]) -> GradeEstimate | None:
        """Ridge regression on the rating, then a monotone curve that makes grades equally frequent.

        None without pairs.
        """
        if not pairs:
            return None
        if len(pairs) > MAX_PAIRS:
            pairs = random.Random(0).sample(pairs, MAX_PAIRS)
        x_NF = np.array([features(gather(p)) for p in pairs])
        y_N = np.array([p.rating for p in pairs])
        fold_N = np.array([_fold(p.query) for p in pairs])
        weights = [_ridge(x_NF, y_N)]
        value_N = np.empty(len(pairs))
        for k in range(FOLDS):
            weights.append(_ridge(x_NF[fold_N != k], y_N[fold_N != k]))
            value_N[fold_N == k] = x_NF[fold_N == k] @ weights[-1]
        count = Counter(p.grade for p in pairs)
        knots = _quantiles(value_N, np.array([1 / count[p.grade] for p in pairs]))
        trained = frozenset(p.query.query_id for p in pairs)
        return cls([w.tolist() for w in weights], knots.tolist(), trained)

    def __call__(self, query: Query, evidence: Evidence) -> float:
        """The grade in [1, 4] that the evidence speaks for, were all grades equally frequent."""
        row = 1 + _fold(query) if query.query_id in self.trained else 0
        value = np.dot(self.weights[row], features(evidence))
        return float(np.interp(value, self.knots, np.linspace(GRADES[0], GRADES[-1], KNOTS)))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {"weights": self.weights, "knots": self.knots, "trained": sorted(self.trained)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> GradeEstimate:
        """Inverse of `to_json`."""
        return cls(body["weights"], body["knots"], frozenset(body["trained"]))


def _fold(query: Query) -> int:
    return hashlib.sha256(query.query_id.encode()).digest()[0] % FOLDS


def _ridge(x_NF: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """argmin_b mean (y - b x)^2 + RIDGE |s b|^2, [F], the constant free; 2.5 without pairs."""
    if not len(x_NF):
        return np.array([0.0] * (x_NF.shape[1] - 1) + [float(np.mean(GRADES))])
    mean_F, scale_F = x_NF.mean(0), np.maximum(x_NF.std(0), 1e-6)
    mean_F[-1], scale_F[-1] = 0.0, 1.0
    z_NF = (x_NF - mean_F) / scale_F
    penalty_F = np.full(len(scale_F), RIDGE)
    penalty_F[-1] = 0.0
    gram_FF = z_NF.T @ z_NF / len(z_NF) + np.diag(penalty_F)
    weights_F = np.linalg.solve(gram_FF, z_NF.T @ y_N / len(z_NF)) / scale_F
    weights_F[-1] -= weights_F[:-1] @ mean_F[:-1]
    return weights_F


def _quantiles(value_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """Weighted quantiles at KNOTS even levels, increasing."""
    order = np.argsort(value_N, kind="stable")
    level_N = np.cumsum(weight_N[order]) / weight_N.sum()
    return np.interp(np.linspace(0, 1, KNOTS), level_N, value_N[order])
