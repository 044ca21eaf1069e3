"""g(d): discrete item quality from transactions and satisfaction [TaoSearchEmb s3.2].

Consumes a store -> produces one of {0, .25, .5, .75, 1} a product, and says where it came from.

Ours: the levels are the quintiles of the first of these that the catalogue has at all: sales;
cart and purchase events; rating * log(1 + rating_count); clicks; a proxy the caller passes. With
none of them every product gets .5, which moves nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from models.store import Store
from models.types import Product, Query

LEVELS: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
UNKNOWN = 0.5
"""For products without a value, and for stores without any."""


def quality_levels(values: Mapping[str, float]) -> dict[str, float]:
    """Quintile level of each value: the share of the catalogue strictly below it, in steps of .25.

    Ties share a level, the lower one, so a catalogue of equal values is one of UNKNOWN.

    >>> quality_levels({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4})
    {'a': 0.0, 'b': 0.25, 'c': 0.5, 'd': 0.75, 'e': 1.0}
    """
    ordered = np.sort(np.array(list(values.values()), dtype=np.float64))
    if len(ordered) == 0 or ordered[0] == ordered[-1]:
        return dict.fromkeys(values, UNKNOWN)
    below = {k: int(np.searchsorted(ordered, v)) / len(ordered) for k, v in values.items()}
    return {k: LEVELS[min(int(share * 5 + 1e-9), 4)] for k, share in below.items()}


def quality_scores(
    store: Store, proxy: Mapping[str, float] | None = None
) -> tuple[dict[str, float], str]:
    """g(d) of every product [TaoSearchEmb s3.2], and the name of the source that gave it.

    Args:
        proxy: any monotone measure by product id, for stores with neither sales nor ratings.

    Returns:
        {product_id: level}, and one of "sales", "transactions", "ratings", "clicks",
        "none: constant .5", or the store's own note on quality where its sales are a proxy.
    """
    for source, values in _measures(store, proxy):
        if len(set(values.values())) > 1:
            levels = quality_levels(values)
            named = store.notes.get("quality", source) if source == "sales" else source
            return {p: levels.get(p, UNKNOWN) for p in store.product_by_id}, named
    return dict.fromkeys(store.product_by_id, UNKNOWN), "none: constant .5"


def _measures(
    store: Store, proxy: Mapping[str, float] | None
) -> list[tuple[str, dict[str, float]]]:
    products = store.product_by_id.values()
    note = store.notes.get("quality", "proxy: given by the caller")
    return [
        ("sales", {p.product_id: p.sales for p in products if p.sales is not None}),
        ("transactions", _events(store, ("cart", "purchase"))),
        ("ratings", {p.product_id: _satisfaction(p) for p in products if p.rating is not None}),
        ("clicks", _events(store, ("click",))),
        (note, dict(proxy or {})),
    ]


def _satisfaction(product: Product) -> float:
    count = product.rating_count
    return (product.rating or 0.0) * (1.0 if count is None else math.log1p(count))


def _events(store: Store, kinds: Sequence[str]) -> dict[str, float]:
    table = store.interactions
    ids, events = table["product_id"].to_pylist(), table["event"].to_pylist()
    counts = Counter(i for i, e in zip(ids, events, strict=True) if e in kinds)
    if not counts:
        return {}
    return {p: float(counts.get(p, 0)) for p in store.product_by_id}


class Quality:
    """The quality level of each candidate, whatever the query [TaoSearchEmb s3.2].

    Args:
        levels: {product_id: level in [0, 1]}; products not in it read as UNKNOWN.
    """

    name = "quality"
    free = True

    def __init__(self, levels: Mapping[str, float], weight: float = 1.0) -> None:
        self.levels = levels
        self.weight = weight

    def __call__(
        self, queries: Sequence[Query], candidates: Sequence[Sequence[Product]]
    ) -> np.ndarray:
        """[Q, K] in [0, 1], float32."""
        return np.array(
            [[self.levels.get(p.product_id, UNKNOWN) for p in row] for row in candidates],
            dtype=np.float32,
        ).reshape(len(queries), -1)
