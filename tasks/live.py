"""Queries and results as they are now, seen by the champions: the measuring half of the monitor.

Consumes stores and champion artifacts -> produces plain numbers for `tasks/monitor.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from models.evaluation.drift import (
    confidence,
    coordinated_sample,
    entropy,
    jensen_shannon,
    mix,
    new_term_share,
)
from models.evaluation.monitor import SampleConfig
from models.store import Store
from models.teacher.response import contradiction_rate
from models.text import terms
from models.types import Pair, Product, Query
from tasks.artifacts import ArtifactRef
from tasks.base import weights_path
from tasks.stage import StageContext


def table_drift(
    before: Store, now: Store, sample: SampleConfig
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Terms and mixes of queries and products: values, and what they were made of."""
    asked, known = list(now.query_by_id.values()), list(before.query_by_id.values())
    vocabulary = {term for query in known for term in terms(query.text)}
    catalogue = {term for text in _product_texts(before) for term in terms(text)}
    titles = coordinated_sample(_product_texts(now), sample.products)
    values: dict[str, float | None] = {
        "query_new_terms": new_term_share(((q.text, q.frequency) for q in asked), vocabulary),
        "segment_shift": jensen_shannon(_segments(known), _segments(asked)),
        "product_new_terms": new_term_share(((text, 1.0) for text in titles), catalogue),
        "category_shift": jensen_shannon(_categories(before), _categories(now)),
    }
    notes = {
        "query_new_terms": f"{len(asked)} queries, {len(vocabulary)} known terms",
        "segment_shift": _largest(_segments(known), _segments(asked)),
        "product_new_terms": f"{len(titles)} products, {len(catalogue)} known terms",
        "category_shift": _largest(_categories(before), _categories(now)),
    }
    return values, notes


def _product_texts(store: Store) -> Iterator[str]:
    """Title, brand and category of each product."""
    columns = (store.products[name].to_pylist() for name in ("title", "brand", "category"))
    return (" ".join(filter(None, row)) for row in zip(*columns, strict=True))


def _segments(queries: list[Query]) -> dict[str, float]:
    return mix((query.segment, query.frequency) for query in queries)


def _categories(store: Store) -> dict[str, float]:
    """Shares of the first part of the category path; products without one are a label of theirs."""
    paths = store.products["category"].to_pylist()
    return mix(((path or "none").split(">")[0].strip(), 1.0) for path in paths)


def _largest(p: dict[str, float], q: dict[str, float]) -> str:
    """The label whose share moved most."""
    moves = {k: q.get(k, 0.0) - p.get(k, 0.0) for k in sorted(p.keys() | q.keys())}
    label = max(moves, key=lambda k: abs(moves[k]), default="")
    if not label:
        return "nothing to compare"
    return f"{label}: {100 * p.get(label, 0.0):.1f} % -> {100 * q.get(label, 0.0):.1f} %"


class Champions:
    """The champion judge, encoder and index of a stage, each loaded once."""

    def __init__(
        self, ctx: StageContext, judge: ArtifactRef, encoder: ArtifactRef, index: ArtifactRef
    ) -> None:
        from models.embedder.encoder import load_encoder
        from models.index.lance import LanceIndex
        from models.judge.scoring import ScoringJudge

        device = ctx.settings.torch_device
        self._encoder = load_encoder(weights_path(ctx, encoder), device)
        self._index = LanceIndex.open(ctx.open(index))
        self._judge = ScoringJudge.load(ctx.open(judge), device)

    def vectors(self, store: Store, size: int) -> np.ndarray:
        """[N, D] unit vectors of a coordinated sample of the store's queries."""
        texts = coordinated_sample((q.text for q in store.query_by_id.values()), size)
        return self._encode(texts)

    def view(
        self, store: Store, sample: SampleConfig, max_new_tokens: int
    ) -> dict[str, float | None]:
        """How sure the judge is of what the index finds for the store's queries.

        Returns:
            confidence, entropy (nats), and contradiction over the first result of each query.
        """
        from models.judge.answers import decode_greedy
        from models.teacher.response import parse_response

        found = self._results(store, sample)
        p_PL = self._judge.score([(q, p) for q, row in found for p in row], "monitor")
        spoken = [Pair(query, row[0], 1) for query, row in found]
        decoded = decode_greedy(self._judge, spoken, max_new_tokens)
        order = self._judge.encoder.spec.prompt.order
        responses = [parse_response(text, order, finished) for text, finished in decoded]
        return {
            "confidence": confidence(p_PL),
            "entropy": entropy(p_PL),
            "contradiction": contradiction_rate(responses),
        }

    def _results(self, store: Store, sample: SampleConfig) -> list[tuple[Query, list[Product]]]:
        """The best products for a coordinated sample of queries."""
        queries = (q.text for q in store.query_by_id.values())
        texts = coordinated_sample(queries, sample.judged_queries)
        ids, _ = self._index.search(self._encode(texts), sample.results)
        by_id = self._index.products(sorted({i for row in ids for i in row}))
        rows = zip(texts, ids, strict=True)
        return [(Query(text, text), [by_id[i] for i in row]) for text, row in rows]

    def _encode(self, texts: list[str]) -> np.ndarray:
        from models.embedder.encoder import encode

        return encode(self._encoder, texts, prompt="query", bf16=True)
