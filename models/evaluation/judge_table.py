"""The judge table: majority, zero-shot, after each stage, and CumPT, overall and by segment.

Consumes the answers of several judges to the same test pairs -> produces plain rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.evaluation.judge import (
    grade_metrics,
    majority_grade,
    probability_metrics,
    reasoning_metrics,
)
from models.evaluation.tiers import CumPT
from models.store import Store
from models.teacher.check import known_verdicts
from models.teacher.response import Order, parse_response

Answer = Mapping[str, Any]
"""query_id, product_id, grade, rating, p [4]; response, finished where reasoning was decoded."""


def judge_rows(
    answers: Mapping[str, Sequence[Answer]], store: Store, order: Order, cumpt: CumPT
) -> list[dict[str, Any]]:
    """One row per judge and segment ("all" first); the last judge is also read by CumPT."""
    pairs = next(iter(answers.values()))
    gold_N = np.array([a["grade"] for a in pairs])
    segments_N = np.array([store.query_by_id[a["query_id"]].segment for a in pairs])
    majority = majority_grade([p.grade for p in store.pairs("train")])
    rows: list[dict[str, Any]] = []
    for segment in ("all", *sorted(set(segments_N.tolist()))):
        mask_N = segments_N == segment if segment != "all" else np.ones(len(pairs), bool)
        head = {"segment": segment, "n": int(mask_N.sum())}
        constant_N = np.full(int(mask_N.sum()), majority)
        rows.append({"judge": "majority", **head, **grade_metrics(gold_N[mask_N], constant_N)})
        for name, given in answers.items():
            rows.append({"judge": name, **head, **_row(given, mask_N, store, order)})
        last, p_NL = list(answers.items())[-1][0], _probabilities(list(answers.values())[-1])
        cumpt_N = cumpt.grades(p_NL[mask_N])
        rows.append({"judge": f"{last} + CumPT", **head, **grade_metrics(gold_N[mask_N], cumpt_N)})
    return rows


def _row(
    given: Sequence[Answer], mask_N: np.ndarray, store: Store, order: Order
) -> dict[str, float]:
    p_NL = _probabilities(given)[mask_N]
    kept = [a for a, keep in zip(given, mask_N, strict=True) if keep]
    gold_N = np.array([a["grade"] for a in kept])
    spoken = [a for a in kept if "response" in a]
    responses = [parse_response(a["response"], order, a["finished"]) for a in spoken]
    gold = gold_verdicts(store)
    verdicts = [gold.get((a["query_id"], a["product_id"])) for a in spoken]
    return {
        **grade_metrics(gold_N, p_NL.argmax(1) + 1),
        **probability_metrics(gold_N, p_NL, np.array([a["rating"] for a in kept])),
        **reasoning_metrics(responses, verdicts),
        "reasoned": float(len(spoken)),
    }


def _probabilities(given: Sequence[Answer]) -> np.ndarray:
    return np.array([a["p"] for a in given], dtype=np.float64)


def gold_verdicts(store: Store) -> dict[tuple[str, str], Any]:
    """What the store says of its test pairs, where that does not contradict the grade."""
    known = {p.key: known_verdicts(p) for p in store.pairs("test")}
    return {key: verdicts for key, verdicts in known.items() if verdicts is not None}
