"""The retriever's ablation: what each row did on each test query, and the table made of it.

Consumes a ranked run -> produces {metric: {query_id: (numerator, weight)}}; consumes those of one
row's seeds -> produces means with intervals over queries, overall and by segment.

A metric is sum(numerator) / sum(weight): weight 1 where it is a mean over queries, the number of
relevant products where it pools (query, product) pairs (Hitrate). An interval is the 95 %
percentile bootstrap over queries of the seeds' mean, so it says how far the queries may mislead,
not how far the seeds scatter: that is `<metric>_sd`, over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from models.errors import explain
from models.evaluation.retrieval import (
    Grades,
    JudgeGood,
    goodrate,
    per_query,
    relevant,
    top,
)
from models.evaluation.significance import paired_bootstrap
from models.types import Product, Query

Parts = Mapping[str, Mapping[str, tuple[float, float]]]
"""{metric: {query_id: (numerator, weight)}}."""
NAN = float("nan")
PICKS_AT_ONCE = 1 << 20
"""Queries drawn at once by the bootstrap: 24 MB."""


def row_parts(
    run: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Grades],
    queries: Mapping[str, Query],
    products: Mapping[str, Product],
    quality: Mapping[str, float],
    good: JudgeGood | None = None,
    ks: Sequence[int] = (10, 100),
    good_k: int = 10,
    lexical: Mapping[str, Sequence[str]] | None = None,
    truth: JudgeGood | None = None,
) -> dict[str, dict[str, tuple[float, float]]]:
    """Every metric of one run, by query; what cannot be measured for a query is left out.

    Args:
        good: the judge's word on the products shown; None: no Goodrate.
        truth: the same by a store that knows, on every query: true_goodrate; None: there is none.
        lexical: the BM25 run that bm25_overlap@10 compares with and `hybrid_*` fuses with.
    """
    plain = per_query(run, qrels, queries, products, None, quality, ks, lexical=lexical)
    out = {
        metric: {q: (v, 1.0) for q, v in values.items() if not math.isnan(v)}
        for metric, values in plain.items()
    }
    for k in ks:
        wanted = {q: relevant(grades) for q, grades in qrels.items()}
        out[f"hitrate@{k}"] = {
            q: (float(len(w.intersection(top(run.get(q, ()), k)))), float(len(w)))
            for q, w in wanted.items()
            if w
        }
    for name, word in (("goodrate", good), ("true_goodrate", truth)):
        if word is None:
            continue
        shown = {q: [products[p] for p in top(run.get(q, ()), good_k)] for q in qrels}
        rates = {q: goodrate(word(queries[q], found), good_k) for q, found in shown.items()}
        kept = {q: (v, 1.0) for q, v in rates.items() if not math.isnan(v)}
        out[f"{name}@{good_k}"] = kept
    return out


def over_seeds(seeds: Sequence[Parts]) -> dict[str, dict[str, tuple[float, float]]]:
    """The mean over seeds of each query's numerator and weight, where every seed has it.

    >>> over_seeds([{"m": {"q": (0.0, 1.0)}}, {"m": {"q": (1.0, 1.0)}}])
    {'m': {'q': (0.5, 1.0)}}
    """
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for metric in seeds[0]:
        shared = [q for q in seeds[0][metric] if all(q in s.get(metric, ()) for s in seeds)]
        out[metric] = {
            q: (
                sum(s[metric][q][0] for s in seeds) / len(seeds),
                sum(s[metric][q][1] for s in seeds) / len(seeds),
            )
            for q in shared
        }
    return out


def interval(
    parts: Sequence[tuple[float, float]], num_samples: int = 2_000, seed: int = 0
) -> tuple[float, float, float]:
    """sum(numerator) / sum(weight) and its 95 % bootstrap interval over queries; NaN for none.

    >>> interval([(1.0, 1.0), (3.0, 3.0)])
    (1.0, 1.0, 1.0)
    """
    if not parts:
        return NAN, NAN, NAN
    values_Q2 = np.asarray(parts, dtype=np.float64)
    rng = np.random.default_rng(seed)
    sums_S2 = np.empty((num_samples, 2))
    samples = max(1, PICKS_AT_ONCE // len(values_Q2))
    for start in range(0, num_samples, samples):
        part_C2 = sums_S2[start : start + samples]
        picks_CQ = rng.integers(0, len(values_Q2), (len(part_C2), len(values_Q2)))
        part_C2[:] = values_Q2[picks_CQ].sum(1)
    low, high = np.percentile(sums_S2[:, 0] / sums_S2[:, 1], [2.5, 97.5])
    numerator, weight = values_Q2.sum(0)
    return float(numerator / weight), float(low), float(high)


def table_rows(
    rows: Mapping[str, Sequence[Parts]],
    segments: Mapping[str, str],
    against: str | None = None,
    compared: Sequence[str] = ("ndcg@10",),
) -> list[dict[str, float | str]]:
    """One row a run and segment ("all" first): run, segment, n, seeds, and each metric.

    Args:
        rows: {run: the parts of each of its seeds}, in the order of the table.
        segments: segment of every query.
        against: the run that `compared` metrics of the others are compared with, query by query.

    Returns:
        rows with <metric>, <metric>_low, <metric>_high, with several seeds <metric>_sd, and for
        `compared` <metric>_diff, <metric>_diff_low, <metric>_diff_high, <metric>_diff_p where both
        runs were measured on some query.
    """
    means = {run: over_seeds(seeds) for run, seeds in rows.items()}
    out: list[dict[str, float | str]] = []
    for run, seeds in rows.items():
        for segment in ("all", *sorted(set(segments.values()))):
            inside = {q for q, name in segments.items() if segment in ("all", name)}
            row: dict[str, float | str] = {
                "run": run,
                "segment": segment,
                "n": float(len(inside)),
                "seeds": float(len(seeds)),
            }
            for metric, values in means[run].items():
                kept = [part for q, part in values.items() if q in inside]
                names = (metric, f"{metric}_low", f"{metric}_high")
                row |= dict(zip(names, interval(kept), strict=True))
                if len(seeds) > 1:
                    row[f"{metric}_sd"] = _scatter(seeds, metric, inside)
            if against is not None and against in means and run != against:
                row |= _differences(means[run], means[against], inside, compared)
            out.append(row)
    return out


def _scatter(seeds: Sequence[Parts], metric: str, inside: set[str]) -> float:
    """Sample standard deviation over seeds of the metric on these queries."""
    each = []
    for parts in seeds:
        kept = [part for q, part in parts[metric].items() if q in inside]
        if kept:
            numerator, weight = np.sum(kept, axis=0)
            each.append(numerator / weight)
    return float(np.std(each, ddof=1)) if len(each) > 1 else NAN


def _differences(
    mine: Parts, theirs: Parts, inside: set[str], compared: Sequence[str]
) -> dict[str, float]:
    out: dict[str, float] = {}
    for metric in compared:
        if metric not in mine or metric not in theirs:
            continue
        shared = [q for q in mine[metric] if q in theirs[metric] and q in inside]
        if not shared:
            continue  # not measured; a bootstrap over no query would say that nothing differs
        if any(part[q][1] != 1.0 for part in (mine[metric], theirs[metric]) for q in shared):
            expected = "one in which every query weighs the same"
            raise ValueError(explain(f"{metric} compared query by query", expected, "leave it out"))
        found = paired_bootstrap(
            [mine[metric][q][0] for q in shared],
            [theirs[metric][q][0] for q in shared],
            num_samples=2_000,
        )
        out |= {
            f"{metric}_diff": found.diff,
            f"{metric}_diff_low": found.low,
            f"{metric}_diff_high": found.high,
            f"{metric}_diff_p": found.p,
        }
    return out
