"""Whether one run beats another on the same queries: paired bootstrap, and who wins how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.errors import ConfigError, explain


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate minus baseline, over the queries both have.

    low, high: 95 % percentile interval of the mean difference. p: two-sided. win, tie, loss:
    numbers of queries. n: queries.
    """

    diff: float
    low: float
    high: float
    p: float
    win: int
    tie: int
    loss: int
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    candidate: Sequence[float],
    baseline: Sequence[float],
    num_samples: int = 10_000,
    seed: int = 0,
    tolerance: float = 1e-9,
    clusters: Sequence[str] | None = None,
) -> Comparison:
    """Resample queries with replacement; mean difference, 95 % interval, p, win/tie/loss.

    clusters: the query of each value where there are several a query (judged pairs): a query is
    drawn with all of its values, as they are not independent.

    p = 2 min(P(mean* <= 0), P(mean* >= 0)), at most 1 and never below 1/num_samples. No query at
    all, or all differences 0, gives diff 0, interval [0, 0] and p 1. Pairs with a NaN are left out.

    Raises:
        ConfigError: two lists of different length.

    >>> c = paired_bootstrap([1.0, 1.0, 0.5], [0.0, 1.0, 0.0])
    >>> c.diff, c.win, c.tie, c.loss, c.n
    (0.5, 2, 1, 0, 3)
    """
    if len(candidate) != len(baseline):
        raise ConfigError(
            explain(
                f"{len(candidate)} and {len(baseline)} values",
                "one of each a query",
                "align both runs on the same query ids",
            )
        )
    delta = np.asarray(candidate, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    known = ~np.isnan(delta)
    delta = delta[known]
    n = len(delta)
    win, loss = int((delta > tolerance).sum()), int((delta < -tolerance).sum())
    if win == loss == 0:
        return Comparison(0.0, 0.0, 0.0, 1.0, 0, n, 0, n)
    if clusters is None:
        means = _resampled_means(delta, num_samples, seed)
    else:
        query_N = np.unique(np.asarray(clusters)[known], return_inverse=True)[1]
        sums, counts = np.bincount(query_N, delta), np.bincount(query_N).astype(np.float64)
        drawn_sums = _resampled_means(sums, num_samples, seed)
        means = drawn_sums / _resampled_means(counts, num_samples, seed)  # the same draws
    low, high = np.percentile(means, [2.5, 97.5])
    tail = 2.0 * min(float((means <= 0).mean()), float((means >= 0).mean()))
    p = min(1.0, max(tail, 1.0 / num_samples))
    return Comparison(float(delta.mean()), float(low), float(high), p, win, n - win - loss, loss, n)


def _resampled_means(values: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """Means of `num_samples` bootstrap samples, a million draws in memory at a time."""
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // len(values))
    means = [
        values[rng.integers(0, len(values), (min(rows, num_samples - start), len(values)))].mean(1)
        for start in range(0, num_samples, rows)
    ]
    return np.concatenate(means)


def mean_interval(
    values: Sequence[float], num_samples: int = 2_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval over queries; NaN are left out, none at all gives NaN.

    >>> mean_interval([2.0, 2.0])
    (2.0, 2.0, 2.0)
    """
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if len(kept) == 0:
        return (float("nan"),) * 3
    low, high = np.percentile(_resampled_means(kept, num_samples, seed), [2.5, 97.5])
    return float(kept.mean()), float(low), float(high)
