"""An approximate index against the exact scan: which setting passes, and whether any does.

Consumes an index and probe vectors -> produces the smallest nprobes and refine factor whose
recall@10 passes the gate, or a refusal. The scan reads the table batch by batch, so that a table
larger than memory can be measured; where the exact neighbours are known, nothing is scanned.

Shapes: P probes, D dim, k results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.errors import ConfigError, explain
from models.index.config import IndexConfig, Kind
from models.index.exact import recall_with_ties
from models.index.facts import IndexFacts, Trial
from models.index.lance import LanceIndex
from models.index.nearest import NearestProducts

GATED_K, DEEP_K = 10, 100
"""Recall is gated at 10 results, and told at 100 as well."""
SCAN_PROBES = 20
"""Probes of an exact index: a scan is only checked and timed, nothing is chosen."""


@dataclass(frozen=True)
class Measured:
    """The chosen setting, what it reaches, and all that was tried."""

    nprobes: int | None
    refine: int | None
    probes: int
    recall_at_10: float
    recall_at_100: float | None
    times_ms: tuple[float, ...]
    unindexed_rows: int
    trials: tuple[Trial, ...]
    nearest: NearestProducts
    """What it was measured against."""


def measure(
    index: LanceIndex,
    kind: Kind,
    config: IndexConfig,
    probes_PD: np.ndarray,
    setting: tuple[int, int] | None = None,
    known: NearestProducts | None = None,
) -> Measured:
    """Find the smallest setting that passes: first the number of partitions, with the most
    refinement, then the refinement. Where none passes, the best one tried is reported.

    probes_PD: query vectors; the first `config.sample` are used (of a scan: `SCAN_PROBES`).
    setting: (nprobes, refine) to measure instead of looking for one; at the gate's depth alone.
    known: the exact neighbours; scanned for where they do not reach deep enough. With them a scan
    is measured at the gate's depth alone.
    """
    count = config.sample if kind != "exact" else min(config.sample, SCAN_PROBES)
    probes_PD = np.asarray(probes_PD[:count], np.float32)
    fast = setting is not None or (kind == "exact" and known is not None)
    depth = GATED_K if fast else DEEP_K
    nearest = known
    if nearest is None or not nearest.reach(len(probes_PD), min(depth, len(index))):
        nearest = NearestProducts.scan(index.vector_batches(), probes_PD)
    truth = nearest.ids[: len(probes_PD)], nearest.scores[: len(probes_PD)]
    trials: list[Trial] = []

    def recall_of(nprobes: int, refine: int) -> float:
        found, scores = index.with_setting(nprobes, refine).search(probes_PD, GATED_K)
        recall = recall_with_ties(found, scores, *truth, GATED_K)
        trials.append(Trial(nprobes=nprobes, refine=refine, recall_at_10=recall))
        return recall

    chosen = None if kind == "exact" else setting or _smallest(recall_of, config)
    final = index.with_setting(*(chosen or (None, None)))
    found, scores, times_ms = _timed(final, probes_PD, GATED_K)
    recall_at_100 = None
    if depth == DEEP_K:
        deep, deep_scores = final.search(probes_PD, DEEP_K)
        recall_at_100 = recall_with_ties(deep, deep_scores, *truth, DEEP_K)
    return Measured(
        nprobes=final.nprobes,
        refine=final.refine,
        probes=len(probes_PD),
        recall_at_10=recall_with_ties(found, scores, *truth, GATED_K),
        recall_at_100=recall_at_100,
        times_ms=tuple(times_ms),
        unindexed_rows=index.unindexed_rows(),
        trials=tuple(trials),
        nearest=nearest,
    )


def _smallest(recall_of: Callable[[int, int], float], config: IndexConfig) -> tuple[int, int]:
    most = config.refine[-1]
    passing = (n for n in config.nprobes if recall_of(n, most) >= config.min_recall)
    nprobes = next(passing, config.nprobes[-1])
    cheaper = (r for r in config.refine[:-1] if recall_of(nprobes, r) >= config.min_recall)
    return nprobes, next(cheaper, most)


def _timed(
    index: LanceIndex, probes_PD: np.ndarray, k: int
) -> tuple[list[list[str]], list[list[float]], list[float]]:
    """Ids, cosines and milliseconds of every probe, searched one by one as a shopper's is."""
    ids, scores, times_ms = [], [], []
    for probe_1D in np.split(probes_PD, len(probes_PD)):
        started = time.perf_counter()
        found, cosines = index.search(probe_1D, k)
        times_ms.append(1000 * (time.perf_counter() - started))
        ids += found
        scores += cosines
    return ids, scores, times_ms


def check(facts: IndexFacts, expected_rows: int | None = None) -> None:
    """The gate: nothing that fails here may be published.

    Raises:
        ConfigError: rows are missing, recall is too low, or too many rows are outside the index.
    """
    config = facts.config
    if expected_rows is not None and facts.rows != expected_rows:
        got = f"{facts.rows} rows in the index table"
        raise ConfigError(explain(got, f"{expected_rows}, one a product", "build the index again"))
    if facts.recall_at_10 < config.min_recall:
        setting = "" if facts.nprobes is None else f" (nprobes {facts.nprobes}"
        setting += "" if facts.refine is None else f", refine {facts.refine})"
        raise ConfigError(
            explain(
                f"recall@10 {facts.recall_at_10:.3f} of the {facts.kind} index against the exact "
                f"one{setting}",
                f"at least {config.min_recall}",
                "use kind ivf_sq, ivf_flat or exact, allow larger nprobes and refine, or lower "
                "min_recall knowingly",
            )
        )
    share = facts.unindexed_rows / max(1, facts.rows)
    if facts.kind != "exact" and share > config.max_unindexed:
        got = f"{facts.unindexed_rows} of {facts.rows} rows outside the vector index"
        expected = f"at most {100 * config.max_unindexed:g} %"
        raise ConfigError(explain(got, expected, "build the index again, or raise max_unindexed"))


def percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    """p50 and p95, under the names of `IndexFacts`."""
    p50_ms, p95_ms = np.percentile(times_ms, [50, 95])
    return {"latency_p50_ms": float(p50_ms), "latency_p95_ms": float(p95_ms)}
