"""The two runs every table must hold: BM25, and chance.

Consumes products and queries -> produces ranked product ids. The terms are `text.terms`, the same
as the exclusivity reward's and the lexical metrics'; a term counts once a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from models.errors import ConfigError, explain
from models.text import product_text, terms
from models.types import Product, Query

Run = Mapping[str, Sequence[str]]
"""{query_id: product ids, best first}."""


class Bm25:
    """BM25 over product texts (Lucene's variant, k1 1.5, b .75).

    Raises:
        ConfigError: no products.
    """

    def __init__(self, products: Iterable[Product]) -> None:
        import bm25s

        items = list(products)
        if not items:
            raise ConfigError(explain("no products", "a catalogue", "check the ingest stage"))
        self.ids = [p.product_id for p in items]
        corpus = [list(terms(product_text(p))) for p in items]
        self._known = {term for row in corpus for term in row}
        self._bm25 = bm25s.BM25(method="lucene")
        self._bm25.index(corpus if self._known else [["\0"] for _ in corpus], show_progress=False)

    def search(self, queries: Sequence[Query], k: int) -> dict[str, list[str]]:
        """Top k products of each query; only those that share a term, so lists may be short."""
        out: dict[str, list[str]] = {}
        k = min(k, len(self.ids))
        for query in queries:
            tokens = [t for t in terms(query.text) if t in self._known]
            out[query.query_id] = self._one(tokens, k) if tokens and k else []
        return out

    def _one(self, tokens: list[str], k: int) -> list[str]:
        scores_N = np.asarray(self._bm25.get_scores(tokens))
        matched = np.flatnonzero(scores_N > 0)
        order = matched[np.argsort(-scores_N[matched], kind="stable")][:k]
        return [self.ids[i] for i in order]


def random_run(
    queries: Sequence[Query], product_ids: Sequence[str], k: int, seed: int = 0
) -> dict[str, list[str]]:
    """k products of each query drawn uniformly without replacement: the floor of every metric."""
    rng = np.random.default_rng(seed)
    k = min(k, len(product_ids))
    return {
        q.query_id: [product_ids[i] for i in rng.choice(len(product_ids), size=k, replace=False)]
        for q in queries
    }
