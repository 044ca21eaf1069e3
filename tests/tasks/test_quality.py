"""The data gate: what stops a run, with which words, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import DataContractError
from models.schemas import QUARANTINE
from models.sources import HomeDepotSource, SyntheticSource, load
from models.sources.cleaning import clean
from models.split import SplitConfig, assign
from models.store import Store
from tasks.quality import QualityConfig, validate

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def make_store(
    num_queries: int = 40, grades: tuple[int, ...] = (4, 3, 1), titles: str = "shoe {}"
) -> tuple[Store, pa.Table]:
    """A store of distinct queries, one judgment a (query, grade), split; and its quarantine."""
    products = pd.DataFrame(
        {"product_id": [f"p{i}" for i in range(60)], "title": [titles.format(i) for i in range(60)]}
    )
    queries = pd.DataFrame(
        {
            "query_id": [f"q{i}" for i in range(num_queries)],
            "text": [f"query {i}" for i in range(num_queries)],
        }
    )
    rows = [(f"q{q}", f"p{i}", g) for q in range(num_queries) for i, g in enumerate(grades)]
    judgments = pd.DataFrame(rows, columns=["query_id", "product_id", "grade"])
    return split(*clean({"products": products, "queries": queries, "judgments": judgments}))


def split(tables: dict[str, pa.Table], quarantine: pa.Table) -> tuple[Store, pa.Table]:
    queries = assign(tables["queries"], SplitConfig())
    return Store(**{**tables, "queries": queries}, notes={"rules": "general"}), quarantine


def refused(count: int, table: str = "judgments") -> pa.Table:
    rows = [(table, "unknown_grade", json.dumps({"grade": 7 + i})) for i in range(count)]
    return pa.table([pa.array(c) for c in zip(*rows, strict=True)], schema=QUARANTINE)


def fails(store: Store, quarantine: pa.Table, out: Path, **config: float) -> str:
    with pytest.raises(DataContractError) as error:
        validate(store, quarantine, QualityConfig(**config), out)
    assert "report.md" in str(error.value)
    assert "FAILED" in (out / "report.md").read_text()
    return str(error.value)


def test_a_good_store_passes_and_leaves_its_report(tmp_path: Path) -> None:
    store, quarantine = make_store()
    report = validate(store, quarantine, QualityConfig(), tmp_path)
    assert report.failures == () and report.warnings == ()
    assert report.rows["judgments"] == 40 * 3
    assert report.grades == {4: 40, 3: 40, 1: 40}
    text = (tmp_path / "report.md").read_text()
    assert "| judgments | 120 | 0 |" in text and "FAILED" not in text
    assert "* rules: general" in text
    assert (tmp_path / "data_docs" / "index.html").is_file()
    assert pq.read_table(tmp_path / "quarantine.parquet").schema == QUARANTINE
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(report.checks) and all(r["passed"] for r in results)


def test_the_synthetic_store_passes(tmp_path: Path) -> None:
    loaded = load(SyntheticSource(num_products=300, num_queries=60), None)
    queries = assign(loaded.store.queries, SplitConfig())
    store = dataclasses.replace(loaded.store, queries=queries)
    report = validate(store, loaded.quarantine, QualityConfig(), tmp_path)
    assert report.failures == ()
    assert {check.table for check in report.checks} >= {"products", "interactions"}


def test_a_store_that_is_not_split_yet_passes(tmp_path: Path) -> None:
    loaded = load(SyntheticSource(num_products=300, num_queries=60), None)
    assert validate(loaded.store, loaded.quarantine, QualityConfig(), tmp_path).failures == ()


def test_a_product_that_no_judgment_names_is_fine(tmp_path: Path) -> None:
    store, quarantine = make_store()
    named = set(store.judgments["product_id"].to_pylist())
    assert set(store.products["product_id"].to_pylist()) - named
    assert validate(store, quarantine, QualityConfig(), tmp_path).warnings == ()


def test_a_query_without_judgments_is_a_warning(tmp_path: Path) -> None:
    store, quarantine = make_store()
    store = dataclasses.replace(store, judgments=store.judgments.slice(3))
    report = validate(store, quarantine, QualityConfig(), tmp_path)
    assert [(c.name, c.unexpected, c.examples) for c in report.warnings] == [
        ("every query has judgments", 1, ("query 0",))
    ]


def test_zero_judgments_stop_the_run(tmp_path: Path) -> None:
    store, quarantine = make_store()
    message = fails(
        dataclasses.replace(store, judgments=store.judgments.slice(0, 0)), quarantine, tmp_path
    )
    assert "judgments" in message and "at least one row" in message
    assert "human labels" in message


def test_a_store_with_one_grade_only_stops_the_run(tmp_path: Path) -> None:
    message = fails(*make_store(grades=(4, 4)), tmp_path)
    assert "got 80 unexpected in judgments, e.g. grade 4" in message
    assert "one grade only teaches nothing" in message


def test_a_query_text_in_two_splits_stops_the_run(tmp_path: Path) -> None:
    store, quarantine = make_store()
    texts = store.queries["text"].to_pylist()
    train = store.queries["split"].to_pylist().index("train")
    test = store.queries["split"].to_pylist().index("test")
    texts[test] = texts[train].upper()
    queries = store.queries.set_column(1, store.queries.schema.field(1), pa.array(texts))
    message = fails(dataclasses.replace(store, queries=queries), quarantine, tmp_path)
    assert "got 2 unexpected in queries" in message and texts[train] in message
    assert "no query text in two splits" in message


def test_duplicate_keys_that_reach_the_gate_stop_it(tmp_path: Path) -> None:
    store, quarantine = make_store()
    twice = pa.concat_tables([store.products, store.products.slice(0, 1)])
    message = fails(dataclasses.replace(store, products=twice), quarantine, tmp_path)
    assert "product_id is unique" in message and "p0" in message


def test_dangling_references_that_reach_the_gate_stop_it(tmp_path: Path) -> None:
    store, quarantine = make_store()
    message = fails(
        dataclasses.replace(store, products=store.products.slice(1)), quarantine, tmp_path
    )
    assert "got 40 unexpected in judgments, e.g. p0" in message


def test_the_quarantine_ceiling_counts_rows_of_each_table(tmp_path: Path) -> None:
    store, _ = make_store(num_queries=38)  # 114 judgments: 6 refused of 120 is just 5 %
    assert validate(store, refused(6), QualityConfig(), tmp_path / "a").failures == ()
    message = fails(store, refused(7), tmp_path / "b")
    assert "got 7 unexpected in quarantine" in message
    for example in ('{"grade": 7}', '{"grade": 8}', '{"grade": 9}'):
        assert f"judgments unknown_grade {example}" in message
    assert "at most 5% of a table's rows refused" in message
    assert validate(store, refused(7), QualityConfig(max_quarantine=0.06), tmp_path / "c")


def test_damaged_text_stops_the_run(tmp_path: Path) -> None:
    message = fails(*make_store(titles="caf\ufffd {}"), tmp_path)
    assert "replacement characters" in message and "got 60 unexpected in products" in message


def test_a_second_failure_is_named_too(tmp_path: Path) -> None:
    store, _ = make_store(grades=(4, 4))
    message = fails(store, refused(60), tmp_path)
    assert "also failed: judgments: at least two grades" in message


def test_real_home_depot_passes(tmp_path: Path) -> None:
    folder = SHARED / "homedepot"
    if not folder.is_dir():
        pytest.skip("the files of homedepot are not on this machine")
    loaded = load(HomeDepotSource(), folder)
    report = validate(loaded.store, loaded.quarantine, QualityConfig(), tmp_path)
    assert report.failures == ()
    assert report.refused == {("products", "duplicate_key"): 15}
