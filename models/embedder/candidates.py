"""Where Retrieval-GRPO's candidates come from: Top-K of the current encoder [TaoSearchEmb s3.2].

Consumes an encoder and products -> produces row numbers of a catalogue pool, with its vectors.

Two pools. "index": the whole catalogue, or a seeded sample of it, embedded every so often and
searched exactly; stale between refreshes, and the staleness is stated in steps (`pool_age`) and
measured at each refresh (`stale_share`). "batch": the
items gathered in the batch, as in the paper, always fresh but noisy. Which items those are is ours:
the products that people judged for the batch's queries, of any grade, and unjudged queries are not
drawn.

Shapes: N products, Q queries, K candidates, D dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from models.embedder.encoder import encode_products
from models.errors import ConfigError, explain
from models.index.exact import ExactIndex
from models.types import Product

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def sample_pool(
    catalogue: Sequence[str], keep: Iterable[str], size: int | None, seed: int
) -> list[str]:
    """The ids the candidates are drawn from: `keep` and uniform others up to `size`, sorted by row.

    `size` None, or not below the catalogue, gives the whole catalogue. `keep` is never cut.

    >>> sample_pool(["a", "b", "c", "d"], ["d"], 2, seed=0)[-1]
    'd'
    """
    if size is None or size >= len(catalogue):
        return list(catalogue)
    wanted = set(keep)
    rest = [p for p in catalogue if p not in wanted]
    count = max(0, min(size - len(wanted), len(rest)))
    picks = np.random.default_rng(seed).permutation(len(rest))[:count]
    wanted |= {rest[i] for i in picks}
    return [p for p in catalogue if p in wanted]


class CandidatePool:
    """Products with vectors that are refreshed on a schedule.

    Attributes:
        products: the pool, in catalogue order.
        vectors_ND: their vectors as of the last refresh.
        age: optimiser steps since then.
    """

    def __init__(
        self, products: Sequence[Product], batch_size: int = 64, bf16: bool = False
    ) -> None:
        if not products:
            raise ConfigError(explain("an empty pool", "products", "check the ingest stage"))
        self.products = list(products)
        self.row_of = {p.product_id: i for i, p in enumerate(self.products)}
        self.batch_size = batch_size
        self.bf16 = bf16
        self.age = 0
        self.vectors_ND = np.zeros((len(self.products), 0), dtype=np.float32)

    def refresh(self, encoder: SentenceTransformer, desc: str = "embedding the pool") -> None:
        """Embed the whole pool with the encoder as it is now."""
        self.adopt(encode_products(encoder, self.products, self.batch_size, desc, self.bf16))

    def adopt(self, vectors_ND: np.ndarray) -> None:
        """Take vectors that were embedded before, as fresh."""
        self.vectors_ND = vectors_ND
        self._index = ExactIndex([p.product_id for p in self.products], vectors_ND)
        self.age = 0

    def top_k(self, vectors_QD: np.ndarray, k: int) -> np.ndarray:
        """Row numbers [Q, K] of the nearest products, best first.

        Raises:
            ConfigError: the pool holds fewer than k products.
        """
        if k > len(self.products):
            raise ConfigError(
                explain(f"{len(self.products)} products", f"at least k = {k}", "lower k")
            )
        return self._index.rows(vectors_QD, k)


def stale_share(stale_QK: np.ndarray, fresh_QK: np.ndarray) -> float:
    """Share of the fresh Top-K that the stale one had missed, mean over queries; both [Q, K].

    >>> stale_share(np.array([[1, 2]]), np.array([[2, 3]]))
    0.5
    """
    rows = zip(stale_QK.tolist(), fresh_QK.tolist(), strict=True)
    return float(np.mean([len(set(fresh) - set(stale)) / len(fresh) for stale, fresh in rows]))


def batch_pool(rows: Sequence[int], scores_QP: np.ndarray, k: int) -> np.ndarray:
    """Top-K [Q, K] among the products gathered in a batch [TaoSearchEmb s3.2].

    Args:
        rows: pool rows of the batch's products [P], distinct; scores_QP: cosines with the queries.

    Raises:
        ConfigError: fewer than k products in the batch.
    """
    if k > len(rows):
        raise ConfigError(
            explain(f"{len(rows)} products in the batch", f"at least k = {k}", "enlarge the batch")
        )
    order = np.argsort(-scores_QP, axis=1, kind="stable")[:, :k]
    return np.asarray(rows, dtype=np.int64)[order]
