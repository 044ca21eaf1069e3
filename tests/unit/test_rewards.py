"""Relevance through the cache, quality levels, exclusivity, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.errors import ConfigError
from models.rewards.base import total_reward
from models.rewards.exclusivity import Exclusivity
from models.rewards.quality import Quality, quality_levels, quality_scores
from models.rewards.relevance import JudgeRelevance, ScoreCache, product_digest, read_out
from models.schemas import TABLES
from models.store import Store
from models.types import Product, Query

SHOE = Product("1", "red shoe", brand="acme", price=40.0, attributes={"size": "8", "sole": "flat"})
HAT = Product("2", "blue hat")
Q = Query("q", "red shoes")


class CountingJudge:
    """Grade 4 for shoes, 1 for the rest; counts the products it was asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, pairs: Sequence[tuple[Query, Product]]) -> list[list[float]]:
        self.asked += len(pairs)
        return [
            [0.1, 0.1, 0.2, 0.6] if "shoe" in p.title else [0.7, 0.1, 0.1, 0.1] for _, p in pairs
        ]


def store_of(products: list[dict[str, Any]], events: Sequence[tuple[str, str]] = ()) -> Store:
    rows = {
        "products": [{"title": "t", **p} for p in products],
        "queries": [],
        "judgments": [],
        "interactions": [{"query_id": "q", "product_id": p, "event": e} for p, e in events],
    }
    tables = {n: pa.Table.from_pylist(r, schema=TABLES[n]) for n, r in rows.items()}
    return Store(**tables, notes={})


def test_readouts_as_arithmetic() -> None:
    p = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert read_out(p, "good")[0] == pytest.approx(0.3 + 0.4)
    expected_grade = 1 * 0.1 + 2 * 0.2 + 3 * 0.3 + 4 * 0.4
    assert read_out(p, "expected")[0] == pytest.approx((expected_grade - 1) / 3)


def test_the_judge_is_asked_once_a_pair(tmp_path: Path) -> None:
    judge = CountingJudge()
    cache = ScoreCache(tmp_path / "scores.sqlite", "judge-1")
    reward = JudgeRelevance(judge, cache)
    first = reward([Q], [[SHOE, HAT, SHOE]])
    assert first.tolist() == [pytest.approx([0.8, 0.2, 0.8])]
    assert judge.asked == 2
    assert (reward([Q], [[HAT, SHOE]]) == first[:, [1, 0]]).all()
    assert judge.asked == 2
    assert reward.is_good([(Q, SHOE), (Q, HAT)]) == [True, False]


def test_the_cache_survives_a_kill_and_counts_hits(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    JudgeRelevance(CountingJudge(), ScoreCache(path, "judge-1"))([Q], [[SHOE, HAT]])
    again, judge = ScoreCache(path, "judge-1"), CountingJudge()  # the first was never closed
    JudgeRelevance(judge, again)([Q], [[SHOE, HAT]])
    assert judge.asked == 0
    assert (again.hits, again.misses, again.hit_rate, len(again)) == (2, 0, 1.0, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"judge_version": "judge-2"},
        {"rules_version": "rules-2"},
        {"query": Query("q", "red shoe")},
        {"product": replace(SHOE, price=41.0)},
        {"product": replace(SHOE, attributes={"size": "9"})},
        {"product": replace(SHOE, attributes=dict(reversed(SHOE.attributes.items())))},
    ],
)
def test_every_part_of_the_key_counts(change: dict[str, Any]) -> None:
    def key(judge_version: str = "judge-1", rules_version: str = "rules-1", **pair: Any) -> bytes:
        cache = ScoreCache(":memory:", judge_version, rules_version)
        return cache.key(pair.get("query", Q), pair.get("product", SHOE))

    assert key(**change) != key()


def test_what_a_judge_cannot_see_is_not_in_the_key() -> None:
    twin = replace(SHOE, product_id="9", sales=1e6)
    assert product_digest(twin) == product_digest(SHOE)
    cache = ScoreCache(":memory:", "judge-1")
    assert cache.key(Query("other", " Red  SHOES"), twin) == cache.key(Q, SHOE)


def test_a_broken_judge_is_not_cached() -> None:
    class Broken:
        def score(self, pairs: Sequence[tuple[Query, Product]]) -> list[list[float]]:
            return [[float("nan")] * 4 for _ in pairs]

    cache = ScoreCache(":memory:", "judge-1")
    with pytest.raises(ConfigError, match="finite"):
        JudgeRelevance(Broken(), cache)([Q], [[SHOE]])
    assert len(cache) == 0


def test_a_judge_needs_a_version() -> None:
    with pytest.raises(ConfigError, match="version"):
        ScoreCache(":memory:", "")


def test_levels_are_quintiles_and_ties_share_one() -> None:
    levels = quality_levels({str(i): float(i) for i in range(10)})
    assert list(levels.values()) == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]
    assert quality_levels({"a": 0.0, "b": 0.0, "c": 5.0}) == {"a": 0.0, "b": 0.0, "c": 0.75}
    assert set(quality_levels({"a": 3.0, "b": 3.0}).values()) == {0.5}


def test_quality_takes_the_first_measure_the_store_has() -> None:
    rated = [
        {"product_id": "a", "rating": 5.0, "rating_count": 100},
        {"product_id": "b", "rating": 5.0, "rating_count": 1},
    ]
    levels, source = quality_scores(store_of(rated))
    assert source == "ratings" and levels["a"] > levels["b"]
    sold = [{**row, "sales": s} for row, s in zip(rated, (1.0, 9.0), strict=True)]
    levels, source = quality_scores(store_of(sold))
    assert source == "sales" and levels["b"] > levels["a"]


def test_quality_without_any_measure() -> None:
    bare = [{"product_id": "a"}, {"product_id": "b"}]
    assert quality_scores(store_of(bare)) == ({"a": 0.5, "b": 0.5}, "none: constant .5")
    levels, source = quality_scores(store_of(bare), proxy={"a": 1.0, "b": 2.0})
    assert source.startswith("proxy") and levels["b"] > levels["a"]
    levels, source = quality_scores(store_of(bare, [("b", "purchase"), ("a", "click")]))
    assert source == "transactions" and levels["b"] > levels["a"]


def test_quality_reward_reads_unknown_products_as_middling() -> None:
    assert Quality({"1": 1.0})([Q], [[SHOE, HAT]]).tolist() == [[1.0, 0.5]]


def test_exclusivity_falls_with_overlap() -> None:
    got = Exclusivity()([Q], [[SHOE, Product("3", "shoe"), HAT]])
    assert got.tolist() == [[0.0, 0.5, 1.0]]
    assert Exclusivity()([Query("x", "the")], [[SHOE]]).tolist() == [[0.0]]


def test_the_sum_is_weighted_and_terms_are_not() -> None:
    quality, exclusivity = Quality({"1": 1.0, "2": 0.0}, weight=2.0), Exclusivity(weight=0.5)
    total, terms = total_reward([quality, exclusivity], [Q], [[SHOE, HAT]])
    assert total.tolist() == [[2.0 * 1 + 0.5 * 0, 2.0 * 0 + 0.5 * 1]]
    assert terms["quality"].tolist() == [[1.0, 0.0]]


def test_a_reward_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        total_reward([Quality({"1": 7.0})], [Q], [[SHOE]])
    with pytest.raises(ConfigError, match="own name"):
        total_reward([Quality({}), Quality({})], [Q], [[SHOE]])
