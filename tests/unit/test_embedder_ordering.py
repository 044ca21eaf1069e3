"""How scores order labelled products of one query, as arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from models.embedder import ordering
from models.embedder.ordering import Group, Order, judged_groups, lead, order_of
from models.schemas import TABLES
from models.store import Store
from models.types import Product, Query


def group(*grades: int) -> Group:
    products = [Product(str(i), "x") for i in range(len(grades))]
    return Group(Query("q", "x"), products, grades)


def test_pairs_of_equal_grade_do_not_count_and_ties_count_half() -> None:
    groups = [group(4, 1, 1), group(1, 4, 3)]
    found = order_of([[0.9, 0.1, 0.9], [0.5, 0.4, 0.3, 9.0]], groups)
    assert found.pairs == (2, 3), "a padded fourth score is nobody's"
    assert found.right == (1.5, 1.0)
    assert found.accuracy == 2.5 / 5
    assert math.isnan(Order((), ()).accuracy)


def test_lead_and_its_error_are_those_of_a_bootstrap_over_queries() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(3, 20, 60)
    mine, theirs = (Order(tuple(rng.binomial(pairs, p)), tuple(pairs)) for p in (0.8, 0.6))
    ahead, error = lead(mine, theirs)
    assert ahead == pytest.approx(mine.accuracy - theirs.accuracy)
    picks = rng.integers(0, 60, (4000, 60))
    delta = np.asarray(mine.right) - np.asarray(theirs.right)
    resampled = delta[picks].sum(1) / pairs[picks].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.1)
    assert lead(mine, mine) == (0.0, 0.0)
    assert lead(Order((1.0,), (1,)), Order((0.5,), (1,))) == (0.5, math.inf), (
        "one query says little"
    )
    assert math.isnan(lead(Order((), ()), Order((), ()))[0])


def labelled(rows: dict[str, list[int]], split: str = "validation") -> Store:
    products = [{"product_id": f"p{i}", "title": f"title {i}"} for i in range(30)]
    queries = [{"query_id": q, "text": q, "split": split} for q in rows]
    judgments = [
        {"query_id": q, "product_id": f"p{i}", "grade": grade}
        for q, grades in rows.items()
        for i, grade in enumerate(grades)
    ]
    tables = {"products": products, "queries": queries, "judgments": judgments, "interactions": []}
    return Store(
        **{n: pa.Table.from_pylist(r, schema=TABLES[n]) for n, r in tables.items()}, notes={}
    )


def test_groups_are_whole_queries_with_something_to_order() -> None:
    store = labelled({"same": [4, 4, 4], "two": [4, 1], "many": [1, 2, 3, 4] * 5, "more": [4, 1]})
    ids = ["same", "two", "missing", "many", "more"]
    drawn = judged_groups(store, "validation", ids, 100)
    assert [g.query.query_id for g in drawn] == ["two", "many", "more"]
    many = drawn[1]
    assert len(many.products) == len(many.grades) == ordering.PER_QUERY
    truth = store.qrels("validation")["many"]
    assert [truth[p.product_id] for p in many.products] == list(many.grades)
    within = judged_groups(store, "validation", ids, 2 + ordering.PER_QUERY + 1)
    assert [g.query.query_id for g in within] == ["two", "many"]
    assert judged_groups(store, "train", ids, 100) == judged_groups(store, "validation", ids, 0)
