"""A first estimate of the grade from words alone, learned from up to MAX_PAIRS labelled pairs.

Consumes labelled pairs and their evidence -> produces an additive model, and for a pair a number in
[1, 4] that stands in the prompt right before the judge's grade. A 135M judge sees a few hundred
pairs in its minutes; this model sees tens of thousands in less than one, and hands on what they say
about words.

A training query's own labels are left out when its own pairs are read (cross-fitting by query), so
that the estimate is as good in training as it will be on new queries, no better. One path remains:
the evidence of other queries' pairs comes from a kind lexicon that knows this query's labels.

Tensor legend: N pairs, F features, B basis functions (with a constant).
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

from models.rules.association import Occurrences, WordAssociations, Words, words_of
from models.rules.evidence import NUM_FEATURES, Evidence
from models.text import normalise
from models.types import GRADES, Pair, Product, Query

FOLDS = 5
MAX_PAIRS = 40_000
"""Pairs read at most: half a minute's work."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Weights of the squared norm that are tried, the features scaled to unit variance, per pair."""
BENDS = 9
"""Points at which a feature's own curve may bend: its quantiles."""
BENT_FROM = 1000
"""Training queries from which on curves bend: stores with 84 and 237 lost by it, and had too few to
notice (infra/LOG.md)."""
KNOTS = 33
"""Points of the monotone curve from the model's value to the estimate."""


def features(evidence: Evidence) -> list[float]:
    """What the estimate knows of a pair but for its very words, [F]: counts and overlap."""
    found, missing = len(evidence.found), len(evidence.missing)
    present = sum(p for _, p in evidence.excluded)
    overlap = [0.0] * NUM_FEATURES if evidence.overlap is None else evidence.overlap.features()
    values: list[float] = [
        found / max(1, found + missing),
        min(missing, 4),
        min(found + missing, 8),
        present,
        len(evidence.excluded) - present,
        evidence.price_ok is True,
        evidence.price_ok is False,
        *(evidence.kind == k for k in ("same", "sibling", "other")),
        *(evidence.belief or (0.0, 0.0)),
        evidence.belief is None,
    ]
    return [*map(float, values), *overlap]


@dataclass(frozen=True)
class AdditiveModel:
    """A sum of one curve a feature, products of overlaps, and a constant; learned by ridge.

    bends: [F], where each feature's curve may bend; empty for one that takes two values or fewer.
    weights: [B]. knots: [KNOTS] ratings, never falling, that stand for grades evenly from 1 to 4.
    """

    associations: WordAssociations
    bends: Sequence[Sequence[float]]
    weights: Sequence[float]
    knots: Sequence[float]

    @classmethod
    def fit(
        cls,
        x_NF: np.ndarray,
        y_N: np.ndarray,
        grade_N: np.ndarray,
        fold_N: np.ndarray,
        occurrences: Occurrences,
        bent: bool,
        without: int | None = None,
    ) -> AdditiveModel:
        """Overlap first; then what words shift, of which each pair's own fold is left out; then
        the knots, which make all grades equally frequent among what is predicted of unseen folds.

        y_N: ratings. bent: whether curves may bend. without: a fold that nothing is learned from.
        """
        read_N = fold_N != without
        plain_NB = _basis(x_NF, [()] * x_NF.shape[1])
        residual_N = y_N - _cross_fitted(plain_NB, y_N, fold_N, read_N)[1]
        x_NF = np.hstack([occurrences.shifts(residual_N, without), x_NF])
        bends = [_bends(column_N[read_N]) if bent else [] for column_N in x_NF.T]
        basis_NB = _basis(x_NF, bends)
        penalty, unseen_N = _cross_fitted(basis_NB, y_N, fold_N, read_N)
        weights_B = _ridge(basis_NB[read_N], y_N[read_N], penalty)
        grades = grade_N[read_N].tolist()
        count = Counter(grades)
        knots = _quantiles(unseen_N[read_N], np.array([1 / count[g] for g in grades]))
        words = occurrences.associations(residual_N, without)
        return cls(words, bends, weights_B.tolist(), knots.tolist())

    def __call__(self, x_NF: np.ndarray, words: Sequence[Words]) -> np.ndarray:
        """The rating expected of each pair, [N]."""
        shifts_NS = np.array([self.associations.shifts(w) for w in words])
        return _basis(np.hstack([shifts_NS, x_NF]), self.bends) @ np.asarray(self.weights)

    def grade(self, rating: float) -> float:
        """The grade in [1, 4] that a rating stands for; where knots coincide, their middle."""
        at, place = np.unique(self.knots, return_inverse=True)
        levels = np.linspace(GRADES[0], GRADES[-1], len(self.knots))
        return float(np.interp(rating, at, np.bincount(place, levels) / np.bincount(place)))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        learned = {"bends": self.bends, "weights": self.weights, "knots": self.knots}
        return {"shift": self.associations.shift, **learned}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> AdditiveModel:
        """Inverse of `to_json`."""
        words = WordAssociations(body["shift"])
        return cls(words, body["bends"], body["weights"], body["knots"])


@dataclass(frozen=True)
class GradeEstimate:
    """models: [1 + FOLDS], of all training queries and of all but one fold's.

    trained: normalised texts of the training queries: one text may have several ids.
    """

    models: Sequence[AdditiveModel]
    trained: frozenset[str]

    @classmethod
    def fit(cls, pairs: Sequence[Pair], gather: Callable[[Pair], Evidence]) -> GradeEstimate | None:
        """A model of all pairs and one without each fold; None without pairs."""
        if not pairs:
            return None
        if len(pairs) > MAX_PAIRS:
            pairs = random.Random(0).sample(pairs, MAX_PAIRS)
        x_NF = np.array([features(gather(p)) for p in pairs])
        words = [words_of(p.query, p.product) for p in pairs]
        y_N, grade_N = np.array([p.rating for p in pairs]), np.array([p.grade for p in pairs])
        fold_N = np.array([_fold(p.query, FOLDS) for p in pairs])
        texts = [normalise(p.query.text) for p in pairs]
        occurrences = Occurrences(words, texts, fold_N, FOLDS)
        bent = len(set(texts)) >= BENT_FROM
        models = [
            AdditiveModel.fit(x_NF, y_N, grade_N, fold_N, occurrences, bent, without)
            for without in (None, *range(FOLDS))
        ]
        return cls(models, frozenset(texts))

    def __call__(self, query: Query, product: Product, evidence: Evidence) -> float:
        """The grade in [1, 4] that words speak for, were all grades equally frequent."""
        new = normalise(query.text) not in self.trained
        model = self.models[0 if new else 1 + _fold(query, len(self.models) - 1)]
        return model.grade(model(np.array([features(evidence)]), [words_of(query, product)])[0])

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        models = [model.to_json() for model in self.models]
        return {"models": models, "trained_texts": sorted(self.trained)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> GradeEstimate:
        """Inverse of `to_json`."""
        models = [AdditiveModel.from_json(model) for model in body["models"]]
        return cls(models, frozenset(body["trained_texts"]))


def _fold(query: Query, folds: int) -> int:
    return hashlib.sha256(normalise(query.text).encode()).digest()[0] % folds


def _bends(column_N: np.ndarray) -> list[float]:
    """Distinct quantiles of a feature; none where its curve would be a line."""
    if not len(column_N):
        return []
    found = np.unique(np.quantile(column_N, np.linspace(0, 1, BENDS)))
    return found.tolist() if len(found) > 2 else []


def _basis(x_NF: np.ndarray, bends: Sequence[Sequence[float]]) -> np.ndarray:
    """What the model is linear in, [N, B]: features, a hat at each bend, products, a constant.

    A hat is 1 at its bend and falls to 0 at the bends beside it, so that their sum is any curve
    that is straight between bends and level outside.
    """
    columns = [x_NF]
    for column_N, at in zip(x_NF.T, bends, strict=True):
        if len(at):
            hats = np.eye(len(at))
            columns.append(np.stack([np.interp(column_N, at, hat) for hat in hats], axis=1))
    overlap_NF = x_NF[:, -NUM_FEATURES:]
    pairs = combinations_with_replacement(range(NUM_FEATURES), 2)
    columns.append(np.stack([overlap_NF[:, i] * overlap_NF[:, j] for i, j in pairs], axis=1))
    columns.append(np.ones((len(x_NF), 1)))
    return np.hstack(columns)


def _cross_fitted(
    x_NB: np.ndarray, y_N: np.ndarray, fold_N: np.ndarray, read_N: np.ndarray
) -> tuple[float, np.ndarray]:
    """What the other folds that are read predict of each pair, [N], by the penalty of RIDGES whose
    squared error on pairs that are read is least, the largest of equals; that penalty first.

    Shifts of words, where `x_NB` has them, know the folds that are left out a little.
    """
    predicted = {penalty: np.empty(len(y_N)) for penalty in RIDGES}
    errors = dict.fromkeys(RIDGES, 0.0)
    for fold in range(FOLDS):
        fold_is_N = fold_N == fold
        own_N, rest_N = read_N & fold_is_N, read_N & ~fold_is_N
        for penalty, weights_B in _ridges(x_NB[rest_N], y_N[rest_N], RIDGES).items():
            predicted[penalty][fold_is_N] = x_NB[fold_is_N] @ weights_B
            errors[penalty] += float(np.square(y_N[own_N] - predicted[penalty][own_N]).sum())
    best = min(errors, key=lambda penalty: (errors[penalty], -penalty))
    return best, predicted[best]


def _ridge(x_NB: np.ndarray, y_N: np.ndarray, penalty: float) -> np.ndarray:
    """argmin_b mean (y - b x)^2 + penalty |s b|^2, [B], the constant free; 2.5 without pairs."""
    return _ridges(x_NB, y_N, [penalty])[penalty]


def _ridges(
    x_NB: np.ndarray, y_N: np.ndarray, penalties: Sequence[float]
) -> dict[float, np.ndarray]:
    if not len(x_NB):
        constant_B = np.array([0.0] * (x_NB.shape[1] - 1) + [float(np.mean(GRADES))])
        return dict.fromkeys(penalties, constant_B)
    mean_B, scale_B = x_NB.mean(0), np.maximum(x_NB.std(0), 1e-6)
    mean_B[-1], scale_B[-1] = 0.0, 1.0
    z_NB = (x_NB - mean_B) / scale_B
    gram_BB, cross_B = z_NB.T @ z_NB / len(z_NB), z_NB.T @ y_N / len(z_NB)
    out = {}
    for penalty in penalties:
        diagonal_B = np.full(len(scale_B), penalty)
        diagonal_B[-1] = 0.0
        weights_B = np.linalg.solve(gram_BB + np.diag(diagonal_B), cross_B) / scale_B
        weights_B[-1] -= weights_B[:-1] @ mean_B[:-1]
        out[penalty] = weights_B
    return out


def _quantiles(value_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """Weighted quantiles at KNOTS even levels, never falling; the middle grade without values."""
    if not len(value_N):
        return np.full(KNOTS, np.mean(GRADES))
    order = np.argsort(value_N, kind="stable")
    level_N = np.cumsum(weight_N[order]) / weight_N.sum()
    return np.interp(np.linspace(0, 1, KNOTS), level_N, value_N[order])
