"""Positive pairs: what the train split says answers a query.

Consumes a store -> produces weighted (query, product) pairs, and what is no honest negative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.embedder.config import ContrastiveConfig, Event, Interactions
from models.errors import DataContractError, explain
from models.objectives.infonce import false_negatives
from models.store import Store
from models.text import normalise, product_text
from models.types import Product


@dataclass(frozen=True, slots=True)
class PositivePair:
    """A query and a product that answers it, with a weight > 0."""

    query_id: str
    product_id: str
    weight: float


def positive_pairs(
    store: Store, config: ContrastiveConfig, split: str = "train"
) -> list[PositivePair]:
    """Judgments with grade >= min_grade, and events, of one split's queries.

    A pair with several events has the weight of the heaviest. A pair of both kinds appears once,
    with its judged weight; an event never overrules a judgment below `min_grade`.
    Order: as in the tables; a cut to `max_pairs` is drawn with `seed`.

    Raises:
        DataContractError: fewer than two pairs.
    """
    qrels = store.qrels(split)
    weights = _judged_weights(store, qrels, config.min_grade)
    said = event_weights(config.interactions)
    if said:
        wanted = set(store.query_ids(split))
        columns = (store.interactions[c].to_pylist() for c in ("query_id", "product_id", "event"))
        for q, p, event in zip(*columns, strict=True):
            if event in said and q in wanted and p not in qrels.get(q, {}):
                weights[q, p] = max(weights.get((q, p), 0.0), said[event])
    pairs = [PositivePair(q, p, w) for (q, p), w in weights.items() if p in store.product_by_id]
    if len(pairs) < 2:
        raise DataContractError(
            explain(
                f"{len(pairs)} positive pairs in the {split} split",
                f"at least two judgments with grade >= {config.min_grade}, or events",
                "lower min_grade, or add labelled queries",
            )
        )
    return cut_pairs(pairs, config.max_pairs, config.seed)


def every_positive(store: Store, min_grade: int, interactions: Interactions) -> list[PositivePair]:
    """All positive pairs of the train split, whatever part of them a stage trains on.

    Raises:
        As `positive_pairs`.
    """
    wanted = ContrastiveConfig(min_grade=min_grade, interactions=interactions, max_pairs=None)
    return positive_pairs(store, wanted)


def event_weights(interactions: Interactions) -> Mapping[Event, float]:
    """The weight of a positive by event; events that say nothing are left out.

    >>> event_weights(True), event_weights(False), event_weights({"click": 0.2})
    ({'cart': 1.0, 'purchase': 1.0}, {}, {'click': 0.2})
    """
    if isinstance(interactions, bool):
        return {"cart": 1.0, "purchase": 1.0} if interactions else {}
    return interactions


def cut_pairs(pairs: list[PositivePair], max_pairs: int | None, seed: int) -> list[PositivePair]:
    """At most `max_pairs` of them, drawn with `seed`, in their order; None: all."""
    if max_pairs is None or len(pairs) <= max_pairs:
        return pairs
    keep = np.random.default_rng(seed).permutation(len(pairs))[:max_pairs]
    return [pairs[i] for i in sorted(keep.tolist())]


def _judged_weights(
    store: Store, qrels: Mapping[str, Mapping[str, int]], min_grade: int
) -> dict[tuple[str, str], float]:
    columns = [store.judgments[c].to_pylist() for c in ("query_id", "product_id", "weight")]
    own = {(q, p): 1.0 if w is None else w for q, p, w in zip(*columns, strict=True)}
    return {
        (q, p): own[q, p] * (grade - 1) / 3
        for q, row in qrels.items()
        for p, grade in row.items()
        if grade >= min_grade
    }


def known_positives(store: Store, pairs: Sequence[PositivePair]) -> dict[str, set[str]]:
    """Products that are no honest negatives of a query: its positives, and any of grade >= 3.

    Queries of one text, under several ids, share them.

    Args:
        pairs: all positives, not only those that are trained on.
    """
    by_text: dict[str, set[str]] = defaultdict(set)
    known: dict[str, set[str]] = {}

    def shared(query_id: str) -> set[str]:
        if query_id not in known:
            known[query_id] = by_text[normalise(store.query_by_id[query_id].text)]
        return known[query_id]

    for q, row in store.qrels("train").items():
        shared(q).update(p for p, grade in row.items() if grade >= 3)
    for pair in pairs:
        shared(pair.query_id).add(pair.product_id)
    return known


class Copies:
    """Products of one text count as one product: catalogues list the same item more than once.

    >>> same = Copies({"a": Product("a", "red sofa"), "b": Product("b", "red sofa")})
    >>> same.of("b"), same.all_of({"a", "b"})
    ('a', {'a'})
    """

    def __init__(self, products: Mapping[str, Product]) -> None:
        first: dict[str, str] = {}
        self._first = {i: first.setdefault(product_text(p), i) for i, p in products.items()}

    def of(self, product_id: str) -> str:
        """The first product of the same text."""
        return self._first[product_id]

    def all_of(self, product_ids: Iterable[str]) -> set[str]:
        """The same of many; ids that are no products are left out."""
        return {self._first[i] for i in product_ids if i in self._first}


def masked_columns(
    pairs: Sequence[PositivePair],
    known: Mapping[str, set[str]],
    copies: Copies,
    others: Sequence[str] = (),
) -> torch.Tensor:
    """[B, B + N] bool: pool columns that are no honest negatives of a pair's query.

    Those are the query's known positives, and copies of any of them or of the pair's own product.

    Args:
        others: N product ids behind the batch's own positives.
    """
    return false_negatives(
        [copies.all_of(known.get(p.query_id, ())) for p in pairs],
        [copies.of(p.product_id) for p in pairs],
        [copies.of(i) for i in others],
    )
