"""Hard negatives: near a query for the SFT encoder, and poor for the judge [TaoSearchEmb s4.2].

Consumes an encoder, an index of the catalogue, a store's train queries and a judge -> produces
hard_negatives.jsonl. The paper's method needs none; its rivals in the table do.

Never mined: what people judged grade 3 or 4, a query's positive by an event where events
count, and copies of them.
What nobody judged is the judge's to say, so a judge that is wrong makes false negatives; the share
of mined products that people judged, and judged poor as well, is returned.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.embedder.config import MiningConfig
from models.embedder.encoder import encode
from models.embedder.pairs import Copies, every_positive, known_positives
from models.errors import DataContractError, explain
from models.index.base import VectorIndex
from models.rewards.relevance import JudgeRelevance, read_out
from models.store import Store

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

FILE = "hard_negatives.jsonl"
QUERIES_AT_ONCE = 16
"""Queries judged between two progress reports."""
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class HardNegative:
    """One mined product: its cosine and rank (from 1) for the encoder, P3 + P4 for the judge."""

    query_id: str
    product_id: str
    similarity: float
    rank: int
    good: float


def mine(
    encoder: SentenceTransformer,
    index: VectorIndex,
    store: Store,
    relevance: JudgeRelevance,
    config: MiningConfig,
    progress: OnProgress = lambda done, total, what: None,
) -> tuple[list[HardNegative], dict[str, float]]:
    """The nearest products of train queries that the judge calls poor, nearest first.

    Returns:
        the negatives, and counts: queries, queries_without (no product was poor), candidates (read
        by the judge), negatives, similarity (mean), agreed (share of those people judged too that
        they gave grade 1 or 2; NaN when they judged none), search_s, judge_s.

    Raises:
        DataContractError: nothing was mined.
    """
    pairs = every_positive(store, 3, config.interactions)
    copies = Copies(store.product_by_id)
    known = {q: copies.all_of(ids) for q, ids in known_positives(store, pairs).items()}
    asked_for = list(dict.fromkeys(p.query_id for p in pairs))
    order = np.random.default_rng(config.seed).permutation(len(asked_for))[: config.max_queries]
    queries = [store.query_by_id[asked_for[i]] for i in order]
    started = time.perf_counter()
    vectors_QD = encode(encoder, [q.text for q in queries], prompt="query")
    ids_QK, scores_QK = index.search(vectors_QD, config.depth)
    search_s, started = time.perf_counter() - started, time.perf_counter()
    found: list[HardNegative] = []
    candidates = without = 0
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        near = [
            HardNegative(q.query_id, product_id, float(score), rank, 0.0)
            for q, ids, scores in zip(
                queries[start : start + QUERIES_AT_ONCE],
                ids_QK[start : start + QUERIES_AT_ONCE],
                scores_QK[start : start + QUERIES_AT_ONCE],
                strict=True,
            )
            for rank, (product_id, score) in enumerate(zip(ids, scores, strict=True), start=1)
            if copies.of(product_id) not in known[q.query_id]
        ]
        candidates += len(near)
        asked = [(store.query_by_id[n.query_id], store.product_by_id[n.product_id]) for n in near]
        good_N = read_out(relevance.probabilities(asked))
        kept = _poor(near, good_N, config)
        without += len(queries[start : start + QUERIES_AT_ONCE]) - len(kept)
        found += [n for row in kept.values() for n in row]
        progress(min(start + QUERIES_AT_ONCE, len(queries)), len(queries), "queries mined")
    if not found:
        raise DataContractError(
            explain(
                f"no product below {config.max_good} among {candidates} candidates",
                "some the judge calls poor",
                "raise mining.max_good or mining.depth",
            )
        )
    counts = {
        "queries": float(len(queries)),
        "queries_without": float(without),
        "candidates": float(candidates),
        "negatives": float(len(found)),
        "similarity": float(np.mean([n.similarity for n in found])),
        "agreed": _agreement(found, store.qrels("train")),
        "search_s": search_s,
        "judge_s": time.perf_counter() - started,
    }
    return found, counts


def _poor(
    near: Sequence[HardNegative], good_N: np.ndarray, config: MiningConfig
) -> dict[str, list[HardNegative]]:
    """By query, the first `per_query` candidates whose P3 + P4 is at most `max_good`."""
    kept: dict[str, list[HardNegative]] = {}
    for n, good in zip(near, good_N.tolist(), strict=True):
        if good <= config.max_good and len(kept.get(n.query_id, ())) < config.per_query:
            judged = HardNegative(n.query_id, n.product_id, n.similarity, n.rank, good)
            kept.setdefault(n.query_id, []).append(judged)
    return kept


def _agreement(found: Iterable[HardNegative], qrels: Mapping[str, Mapping[str, int]]) -> float:
    grades = [
        qrels[n.query_id][n.product_id] for n in found if n.product_id in qrels.get(n.query_id, ())
    ]
    return float(np.mean([g <= 2 for g in grades])) if grades else float("nan")


def write_negatives(found: Iterable[HardNegative], folder: Path) -> None:
    """One JSON object a line in `folder`."""
    lines = [json.dumps(asdict(n), ensure_ascii=False) + "\n" for n in found]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def read_negatives(folder: Path) -> dict[str, list[str]]:
    """{query_id: product ids, nearest first}, from what `write_negatives` wrote."""
    out: dict[str, list[str]] = {}
    lines = (folder / FILE).read_text(encoding="utf-8").split("\n")
    for row in map(json.loads, filter(None, lines)):
        out.setdefault(row["query_id"], []).append(row["product_id"])
    return out
