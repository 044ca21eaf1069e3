"""How far today's data has moved from the data a champion was trained on. Pure mathematics.

Consumes two sides of the same kind (the reference first or last as each signature says) ->
produces one number, 0 when both are the same. No paper describes these; the formulas are standard.

Shapes: N and M texts, D dim, P pairs, L grades.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from models.text import normalise, terms


def coordinated_sample(texts: Iterable[str], size: int) -> list[str]:
    """The `size` distinct texts with the smallest hash, in the order of their hashes.

    Texts that differ in case and spaces alone are one (`text.normalise`). The sample depends on the
    set of texts alone, and sets that overlap give samples that overlap, so that a comparison sees
    what differs and not the draw (bottom-k sampling).

    >>> coordinated_sample(["b", "a", "b "], 9) == coordinated_sample(["a", "b"], 9)
    True
    """
    distinct: dict[str, str] = {}
    for text in texts:
        key = hashlib.sha1(normalise(text).encode()).hexdigest()
        distinct[key] = min(text, distinct.get(key, text))
    return [distinct[key] for key in sorted(distinct)[:size]]


def new_term_share(texts: Iterable[tuple[str, float]], known: Collection[str]) -> float:
    """Share of term mass that the reference never used: sum w [t unknown] / sum w.

    texts: (text, weight), e.g. a query and its frequency; each term of a text counts w once.
    known: the reference's terms (`text.terms`). No term at all gives 0.

    >>> new_term_share([("red sofa", 3.0), ("red lamp", 1.0)], {"red", "sofa"})
    0.125
    """
    total = new = 0.0
    for text, weight in texts:
        for term in terms(text):
            total += weight
            new += weight * (term not in known)
    return new / total if total else 0.0


def mix(labels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of each label by weight; {} where there is no weight.

    >>> mix([("a", 1.0), ("b", 2.0), ("a", 1.0)])
    {'a': 0.5, 'b': 0.5}
    """
    mass: dict[str, float] = {}
    for label, weight in labels:
        mass[label] = mass.get(label, 0.0) + weight
    total = math.fsum(mass.values())
    return {label: value / total for label, value in mass.items()} if total > 0 else {}


def jensen_shannon(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    """JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 in bits: 0 for equal mixes, 1 for disjoint.

    Chosen over the population stability index because a label that one side lacks needs no floor.
    Two empty mixes give 0; one empty mix gives 1.

    >>> jensen_shannon({"a": 1.0}, {"b": 1.0}), jensen_shannon({"a": 1.0}, {"a": 1.0})
    (1.0, 0.0)
    """
    if not p or not q:
        return float(bool(p) != bool(q))
    total = 0.0
    for label in sorted(p.keys() | q.keys()):
        a, b = p.get(label, 0.0), q.get(label, 0.0)
        middle = (a + b) / 2
        total += sum(x * math.log2(x / middle) for x in (a, b) if x > 0) / 2
    return min(1.0, max(0.0, total))


def mean_shift(reference_ND: np.ndarray, today_MD: np.ndarray) -> float:
    """1 - cosine of the two mean vectors, in [0, 2].

    A mean of 0 has no direction: 0 when both are 0, else 1.
    """
    a_D, b_D = (x.mean(0, dtype=np.float64) for x in (reference_ND, today_MD))
    norms = float(np.linalg.norm(a_D) * np.linalg.norm(b_D))
    if norms == 0:
        return float(bool(a_D.any()) != bool(b_D.any()))
    return max(0.0, 1.0 - float(a_D @ b_D) / norms)


def mmd(reference_ND: np.ndarray, today_MD: np.ndarray) -> float:
    """Squared maximum mean discrepancy, E k(x, x') + E k(y, y') - 2 E k(x, y), with a Gaussian
    kernel whose squared width is the median squared distance of the pooled points.

    The unbiased estimate (Gretton et al. 2012, eq. 3; pairs of a point with itself left out), cut
    at 0: so 0 for equal samples, and 0 on average for two samples of one distribution, whatever
    their size. In [0, 2]; 0 where all points coincide.
    """
    both = np.concatenate([reference_ND, today_MD]).astype(np.float64)
    square = (both**2).sum(1)
    distances = np.maximum(square[:, None] + square[None] - 2 * both @ both.T, 0.0)
    width = float(np.median(distances[np.triu_indices(len(both), 1)])) if len(both) > 1 else 0.0
    if width <= 0:
        # most points coincide: any spread is then the scale
        width = float(distances.max())
    if width <= 0:
        return 0.0
    kernel = np.exp(-distances / width)
    n = len(reference_ND)
    across = float(kernel[:n, n:].mean())
    return max(0.0, _within(kernel[:n, :n]) + _within(kernel[n:, n:]) - 2 * across)


def _within(kernel_NN: np.ndarray) -> float:
    """Mean over pairs of different points; 1, as of a point with itself, where there is one."""
    n = len(kernel_NN)
    return 1.0 if n < 2 else float((kernel_NN.sum() - np.trace(kernel_NN)) / (n * (n - 1)))


def confidence(probabilities_PL: np.ndarray) -> float:
    """Mean of the largest probability, in [1 / L, 1]."""
    return float(probabilities_PL.max(1).mean(dtype=np.float64))


def entropy(probabilities_PL: np.ndarray) -> float:
    """Mean entropy in nats, in [0, log L]; 0 log 0 is 0."""
    p_PL = np.asarray(probabilities_PL, np.float64)
    logs_PL = np.log(p_PL, where=p_PL > 0, out=np.zeros_like(p_PL))
    return float(-(p_PL * logs_PL).sum(1).mean())
