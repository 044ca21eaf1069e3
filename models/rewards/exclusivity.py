"""h(q, d): what the inverted-index channel would miss [TaoSearchEmb s3.2]."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from models.text import product_text, terms
from models.types import Product, Query


def overlap(query_terms: Sequence[str], product_terms: Sequence[str]) -> float:
    """|terms(q) & terms(d)| / |terms(q)|, in [0, 1]; a query without terms overlaps fully.

    >>> overlap(("red", "shoe"), ("shoe", "acme"))
    0.5
    """
    if not query_terms:
        return 1.0
    return len(set(query_terms) & set(product_terms)) / len(set(query_terms))


class Exclusivity:
    """h = 1 - |terms(q) & terms(d)| / |terms(q)|: higher overlap, lower reward [TaoSearchEmb s3.2].

    Only ever a small part of a sum: alone it rewards whatever shares no word with the query.
    """

    name = "exclusivity"
    free = True

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self._terms = functools.lru_cache(maxsize=100_000)(terms)

    def __call__(
        self, queries: Sequence[Query], candidates: Sequence[Sequence[Product]]
    ) -> np.ndarray:
        """[Q, K] in [0, 1], float32."""
        return np.array(
            [
                [1.0 - overlap(self._terms(q.text), self._terms(product_text(p))) for p in row]
                for q, row in zip(queries, candidates, strict=True)
            ],
            dtype=np.float32,
        )
