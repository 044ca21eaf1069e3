"""Do the rewards know more of one query's products than the encoder that is to learn from them?

Consumes labelled products of validation queries -> produces, for the encoder and for each reward,
the share of their pairs that it puts in the labels' order. The advantages of Retrieval-GRPO are
centred by query [TaoSearchEmb s3.2], so how products of *one* query are ordered is all that it
hears: a judge that tells good queries from bad ones scores well over all pairs and teaches nothing.

Shapes: Q queries, K products each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.embedder.encoder import encode
from models.rewards.base import Reward, total_reward
from models.store import Store
from models.text import product_text
from models.types import Product, Query

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PER_QUERY = 8
"""Products of a query that are compared: pairs of one query say much the same."""
TOTAL = "reward"
"""The name of the weighted sum of all rewards."""


@dataclass(frozen=True, slots=True)
class Group:
    """Labelled products of one query, not all of one grade."""

    query: Query
    products: Sequence[Product]
    grades: Sequence[int]


@dataclass(frozen=True, slots=True)
class Order:
    """By query: pairs of products that are in the labels' order (ties count half), and all pairs
    whose grades differ.
    """

    right: tuple[float, ...]
    pairs: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of pairs in the labels' order; .5 is chance, NaN without pairs."""
        return sum(self.right) / sum(self.pairs) if sum(self.pairs) else math.nan


def judged_groups(
    store: Store, split: str, query_ids: Sequence[str], max_products: int, seed: int = 0
) -> list[Group]:
    """Groups of the queries, in their order, until `max_products` are in them.

    Up to PER_QUERY labelled products a query, drawn at random; queries whose drawn products have
    one grade are left out.
    """
    rng, qrels = np.random.default_rng((seed, 3)), store.qrels(split)
    groups: list[Group] = []
    left = max_products
    for query_id in query_ids:
        grades = qrels.get(query_id, {})
        drawn = [list(grades)[i] for i in rng.permutation(len(grades))[:PER_QUERY]]
        if len({grades[p] for p in drawn}) < 2:
            continue
        if (left := left - len(drawn)) < 0:
            break
        products = [store.product_by_id[p] for p in drawn]
        group = Group(store.query_by_id[query_id], products, [grades[p] for p in drawn])
        groups.append(group)
    return groups


def order_of(scores: Sequence[Sequence[float]], groups: Sequence[Group]) -> Order:
    """How scores order each group's products against their labels.

    scores: one a product, by group; longer rows are cut.
    """
    right, pairs = [], []
    for row, group in zip(scores, groups, strict=True):
        grade_K = np.asarray(group.grades)
        score_K = np.asarray(row, dtype=np.float64)[: len(grade_K)]
        better_KK = grade_K[:, None] > grade_K[None, :]
        gap_KK = score_K[:, None] - score_K[None, :]
        right.append(float(((gap_KK > 0) + 0.5 * (gap_KK == 0))[better_KK].sum()))
        pairs.append(int(better_KK.sum()))
    return Order(tuple(right), tuple(pairs))


def lead(mine: Order, theirs: Order) -> tuple[float, float]:
    """mine.accuracy - theirs.accuracy on the same pairs, and its standard error over queries, which
    is infinite below two of them; NaN without pairs.
    """
    delta_Q = np.asarray(mine.right) - np.asarray(theirs.right)
    pairs_Q = np.asarray(mine.pairs, dtype=np.float64)
    count, total = len(pairs_Q), pairs_Q.sum()
    if not total:
        return math.nan, math.nan
    ratio = float(delta_Q.sum() / total)
    if count < 2:
        return ratio, math.inf
    residual_Q = delta_Q - ratio * pairs_Q
    spread = count / (count - 1) * float(np.square(residual_Q).sum())
    return ratio, math.sqrt(spread) / float(total)


def encoder_order(encoder: SentenceTransformer, groups: Sequence[Group], bf16: bool) -> Order:
    """By the cosine of query and product."""
    if not groups:
        return Order((), ())
    distinct = {p.product_id: p for group in groups for p in group.products}
    row_of = {product_id: i for i, product_id in enumerate(distinct)}
    texts = [product_text(p) for p in distinct.values()]
    vectors_ND = encode(encoder, texts, prompt="document", bf16=bf16)
    queries_QD = encode(encoder, [g.query.text for g in groups], prompt="query", bf16=bf16)
    scores = [
        (vectors_ND[[row_of[p.product_id] for p in group.products]] @ query_D).tolist()
        for group, query_D in zip(groups, queries_QD, strict=True)
    ]
    return order_of(scores, groups)


def reward_orders(rewards: Sequence[Reward], groups: Sequence[Group]) -> dict[str, Order]:
    """By each reward, and by their weighted sum (TOTAL)."""
    if not groups:
        return {}
    longest = max(len(g.products) for g in groups)
    padded = [[*g.products, *[g.products[-1]] * (longest - len(g.products))] for g in groups]
    total_QK, terms = total_reward(rewards, [g.query for g in groups], padded)
    scores = {**terms, TOTAL: total_QK}
    return {name: order_of(rows_QK.tolist(), groups) for name, rows_QK in scores.items()}
