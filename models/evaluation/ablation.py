"""The judge's ablation: every row's metrics, averaged over seeds, with intervals over queries.

Consumes what each judge answered on the same held-out pairs, once a seed -> produces plain rows,
one a judge and metric. Intervals are 95 % percentile ones of the mean over seeds: queries are drawn
with replacement, the same draws for every row and seed, so that the difference to the row before is
a paired one. They do not hold training noise: that is the spread, the standard deviation over
seeds, of a difference the one of seed with seed.

Shapes: B resamples, N pairs, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import DataContractError, explain
from models.evaluation.pass_at_k import pass_at_k
from models.evaluation.query_bootstrap import (
    grade_metrics_under,
    query_weights,
    ratio_under,
    spearman_under,
)
from models.evaluation.tiers import MEDIAN
from models.teacher.response import Order, parse_response
from models.types import GRADES

Answer = Mapping[str, Any]
"""query_id, product_id, grade, p [4] (majority: `said`), and response, finished where decoded."""
Sample = Mapping[str, Any]
"""query_id, product_id, n, correct: responses drawn for one pair, and how many have its grade."""

COMPARED = "macro_f1"
"""The metric whose difference to the row before is reported."""


@dataclass(frozen=True)
class Answered:
    """One judge and one seed: answers on all pairs, and sampled responses where there are some."""

    answers: Sequence[Answer]
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class Row:
    """One judge: its name, its response format, and one `Answered` a seed."""

    name: str
    order: Order
    seeds: Sequence[Answered]


def majority_row(answers: Sequence[Answer], grade: int) -> Row:
    """The judge that always says `grade`, on the pairs of `answers`."""
    keys = ("query_id", "product_id", "grade")
    constant = [{**{k: a[k] for k in keys}, "said": grade} for a in answers]
    return Row("majority", "label_only", [Answered(constant)])


def ablation_rows(
    rows: Sequence[Row], num_samples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """One record a row and metric: judge, metric, mean, low, high, spread, seeds, n.

    spread: None for one seed. n: pairs, or responses or prompts where the metric is about those.
    Metric `macro_f1_gain` is the difference to the row before; `median_...` reads the median of
    P(grade), which is CumPT uncalibrated, all others the most likely grade. A metric a row does not
    have (no probabilities, no steps) has no record.

    Raises:
        DataContractError: rows about different pairs.
    """
    pairs = _pairs(rows[0].seeds[0].answers)
    query_of = {q: i for i, q in enumerate(dict.fromkeys(q for q, _, _ in pairs))}
    weights_BQ = query_weights(len(query_of), num_samples, seed)
    out: list[dict[str, Any]] = []
    before_SB: np.ndarray | None = None
    for row in rows:
        by_seed, counts = [], dict[str, int]()
        for answered in row.seeds:
            if _pairs(answered.answers) != pairs:
                raise DataContractError(
                    explain(f"other pairs in {row.name!r}", "the same ones", "use one store")
                )
            metrics, counts = _metrics(answered, row.order, query_of, weights_BQ)
            by_seed.append(metrics)
        compared_SB = np.array([m[COMPARED] for m in by_seed])
        for metric in (m for m in by_seed[0] if all(m in other for other in by_seed)):
            values_SB = np.array([m[metric] for m in by_seed])
            if np.isfinite(values_SB[:, 0].mean()):  # a grade that is nowhere has no F1
                out.append(_record(row.name, metric, values_SB, counts[metric]))
        if before_SB is not None:
            same = len(before_SB) == len(compared_SB)
            gain_SB = compared_SB - (before_SB if same else before_SB.mean(0))
            record = _record(row.name, f"{COMPARED}_gain", gain_SB, counts[COMPARED])
            out.append(record if same else record | {"spread": None})
        before_SB = compared_SB
    return out


def _pairs(answers: Sequence[Answer]) -> list[tuple[str, str, int]]:
    return [(a["query_id"], a["product_id"], a["grade"]) for a in answers]


def _record(name: str, metric: str, values_SB: np.ndarray, n: int) -> dict[str, Any]:
    """Column 0 holds the metric itself, the others its resamples."""
    mean_B = values_SB.mean(0)
    low, high = np.nanpercentile(mean_B[1:], [2.5, 97.5])
    seeds = len(values_SB)
    return {
        "judge": name,
        "metric": metric,
        "mean": float(mean_B[0]),
        "low": float(low),
        "high": float(high),
        "spread": float(values_SB[:, 0].std(ddof=1)) if seeds > 1 else None,
        "seeds": seeds,
        "n": n,
    }


def _metrics(
    answered: Answered, order: Order, query_of: Mapping[str, int], weights_BQ: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Every metric under every row of weights, and how many items it is about."""
    answers = answered.answers
    gold_N = np.array([a["grade"] for a in answers])
    query_N = np.array([query_of[a["query_id"]] for a in answers])
    told = "said" in answers[0]
    p_NL = None if told else np.array([a["p"] for a in answers], dtype=np.float64)
    said_N = np.array([a["said"] for a in answers]) if p_NL is None else p_NL.argmax(1) + 1
    out = grade_metrics_under(gold_N, said_N, query_N, weights_BQ)
    if p_NL is not None:
        expected_N = p_NL @ np.array(GRADES)
        rating_N = np.array([a["rating"] for a in answers])
        out["spearman"] = spearman_under(expected_N, rating_N, query_N, weights_BQ)
        median = grade_metrics_under(gold_N, MEDIAN.grades(p_NL), query_N, weights_BQ)
        out |= {f"median_{name}": median[name] for name in ("macro_f1", "kappa")}
    counts = dict.fromkeys(out, len(answers))
    for more, n in (
        _reasoning(answers, order, query_of, weights_BQ),
        _passes(answered.samples, query_of, weights_BQ),
    ):
        out |= more
        counts |= n
    return out, counts


def _reasoning(
    answers: Sequence[Answer], order: Order, query_of: Mapping[str, int], weights_BQ: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Rule adherence and contradiction rate of greedy responses, as in `reasoning_metrics`, but
    that nothing stated is no rate at all."""
    spoken = [a for a in answers if "response" in a]
    if order == "label_only" or not spoken:
        return {}, {}
    read = [parse_response(a["response"], order, a["finished"]) for a in spoken]
    query_M = np.array([query_of[a["query_id"]] for a in spoken])
    stated_M = np.array([r.states_both for r in read], float)
    broken_M = np.array([r.contradicting for r in read], float)
    sound_M = np.array([r.sound for r in read], float)
    ones_M = np.ones(len(read))
    out = {"rule_adherence": ratio_under(sound_M, ones_M, query_M, weights_BQ)}
    if stated_M.any():
        out["contradiction_rate"] = ratio_under(broken_M, stated_M, query_M, weights_BQ)
    return out, {"rule_adherence": len(read), "contradiction_rate": int(stated_M.sum())}


def _passes(
    samples: Sequence[Sample], query_of: Mapping[str, int], weights_BQ: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """pass@1..n over the sampled pairs; right is the gold grade, whatever the steps say."""
    if not samples:
        return {}, {}
    query_M = np.array([query_of[s["query_id"]] for s in samples])
    ones_M = np.ones(len(samples))
    passes = {
        f"pass@{k}": np.array([pass_at_k(s["n"], s["correct"], k) for s in samples])
        for k in range(1, min(s["n"] for s in samples) + 1)
    }
    return {
        name: ratio_under(pass_M, ones_M, query_M, weights_BQ) for name, pass_M in passes.items()
    }, dict.fromkeys(passes, len(samples))
