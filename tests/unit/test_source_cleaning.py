"""Row faults: what is kept, what is refused, and why."""

from __future__ import annotations

import json
import time
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from models.errors import DataContractError
from models.index.filters import Filters
from models.schemas import MAX_TEXT, QUARANTINE, TABLES
from models.sources.cleaning import clean
from models.split import position
from models.text import terms


def make_tables(**changes: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Two products, two queries, three judgments; whole tables can be replaced."""
    tables = {
        "products": pd.DataFrame({"product_id": ["p1", "p2"], "title": ["Red shoe", "Blue hat"]}),
        "queries": pd.DataFrame({"query_id": ["q1", "q2"], "text": ["shoe", "hat"]}),
        "judgments": pd.DataFrame(
            {
                "query_id": ["q1", "q1", "q2"],
                "product_id": ["p1", "p2", "p2"],
                "grade": [4, 1, 4],
            }
        ),
    }
    return tables | changes


def with_row(frame: pd.DataFrame, **row: object) -> pd.DataFrame:
    return pd.concat([frame.astype(object), pd.DataFrame([row])], ignore_index=True)


def reasons(quarantine: pa.Table) -> Counter[tuple[str, str]]:
    return Counter(
        zip(quarantine["table"].to_pylist(), quarantine["reason"].to_pylist(), strict=True)
    )


def test_good_rows_pass_in_the_schemas_of_the_contract() -> None:
    good, quarantine = clean(make_tables())
    assert {name: table.schema for name, table in good.items()} == TABLES
    assert quarantine.schema == QUARANTINE
    assert [len(good[name]) for name in TABLES] == [2, 2, 3, 0]
    assert len(quarantine) == 0


def test_integer_ids_meet_text_ids() -> None:
    tables = make_tables(
        products=pd.DataFrame({"product_id": [1, 2], "title": ["Red shoe", "Blue hat"]}),
        judgments=pd.DataFrame(
            {"query_id": ["q1", "q2"], "product_id": [1.0, 2.0], "grade": ["4", "1.0"]}
        ),
    )
    good, quarantine = clean(tables)
    assert len(quarantine) == 0
    assert good["judgments"]["product_id"].to_pylist() == ["1", "2"]
    assert good["judgments"]["grade"].to_pylist() == [4, 1]


@pytest.mark.parametrize("grade", [0, 5, 2.5, None, float("nan"), "E", 300, float("inf")])
def test_an_unknown_grade_is_refused(grade: object) -> None:
    frame = with_row(make_tables()["judgments"], query_id="q2", product_id="p1", grade=grade)
    good, quarantine = clean(make_tables(judgments=frame))
    assert reasons(quarantine) == {("judgments", "unknown_grade"): 1}
    assert len(good["judgments"]) == 3
    assert json.loads(quarantine["row"][0].as_py())["product_id"] == "p1"


@pytest.mark.parametrize("bad", [[4, None], [float("nan")], [17], [0.5, 4], [float("inf")]])
def test_a_judgment_with_a_rater_off_the_scale_is_refused(bad: list[float | None]) -> None:
    frame = make_tables()["judgments"].assign(rater_grades=[[1, 2.33, 4], bad, None])
    frame = with_row(frame, query_id="q2", product_id="p1", grade=1, rater_grades=[])
    good, quarantine = clean(make_tables(judgments=frame))
    assert reasons(quarantine) == {("judgments", "bad_rater_grades"): 1}
    assert good["judgments"]["rater_grades"].to_pylist() == [[1, 2.33, 4], None, []]


@pytest.mark.parametrize("title", ["", "   ", None, float("nan"), "nan"])
def test_a_product_without_title_is_refused_and_its_judgments_dangle(title: object) -> None:
    frame = pd.DataFrame({"product_id": ["p1", "p2"], "title": ["Red shoe", title]}, dtype=object)
    good, quarantine = clean(make_tables(products=frame))
    assert reasons(quarantine) == {
        ("products", "empty_text"): 1,
        ("judgments", "dangling_product"): 2,
    }
    assert good["judgments"]["product_id"].to_pylist() == ["p1"]


def test_a_megabyte_in_a_title_is_refused_not_cut_and_quarantined_short() -> None:
    frame = with_row(make_tables()["products"], product_id="p3", title="x" * 1_000_000)
    _, quarantine = clean(make_tables(products=frame))
    assert reasons(quarantine) == {("products", "text_too_long"): 1}
    assert len(quarantine["row"][0].as_py()) < 1000
    assert "1000000 characters" in quarantine["row"][0].as_py()
    just_fits = with_row(make_tables()["products"], product_id="p3", title="x" * MAX_TEXT)
    assert len(clean(make_tables(products=just_fits))[0]["products"]) == 3


def test_equal_judgments_collapse_and_contradicting_ones_are_both_refused() -> None:
    frame = pd.DataFrame(
        {
            "query_id": ["q1", "q1", "q2", "q2", "q2"],
            "product_id": ["p1", "p1", "p2", "p2", "p1"],
            "grade": [4, 4, 1, 3, 2],
        }
    )
    good, quarantine = clean(make_tables(judgments=frame))
    assert good["judgments"].select(["query_id", "product_id", "grade"]).to_pylist() == [
        {"query_id": "q1", "product_id": "p1", "grade": 4},
        {"query_id": "q2", "product_id": "p1", "grade": 2},
    ]
    assert reasons(quarantine) == {("judgments", "duplicate_key"): 2}


def test_of_two_products_under_one_id_the_first_stays() -> None:
    frame = with_row(make_tables()["products"], product_id="p1", title="Another shoe")
    frame = with_row(frame, product_id="p2", title="Blue hat")  # an equal row just collapses
    good, quarantine = clean(make_tables(products=frame))
    assert good["products"]["title"].to_pylist() == ["Red shoe", "Blue hat"]
    assert reasons(quarantine) == {("products", "duplicate_key"): 1}
    assert len(good["judgments"]) == 3


def test_missing_numbers_are_null_and_wrong_ones_are_refused() -> None:
    frame = pd.DataFrame(
        {
            "product_id": ["a", "b", "c", "d", "e"],
            "title": ["t"] * 5,
            "price": [1.5, np.nan, -1.0, 2.0, 2.0],
            "rating": [5.0, np.nan, 3.0, 9.0, 3.0],
            "rating_count": ["3", None, "3", "3", "many"],
        }
    )
    tables = make_tables(products=frame, judgments=make_tables()["judgments"].iloc[:0])
    good, quarantine = clean(tables)
    assert good["products"]["product_id"].to_pylist() == ["a", "b"]
    assert good["products"]["price"].to_pylist() == [1.5, None]
    assert good["products"]["rating_count"].to_pylist() == [3, None]
    assert reasons(quarantine) == {
        ("products", "bad_price"): 1,
        ("products", "bad_rating"): 1,
        ("products", "bad_rating_count"): 1,
    }


def test_attributes_come_as_json_as_maps_and_as_structs() -> None:
    ids, titles = ["a", "b"], ["t", "t"]
    json_text = pd.DataFrame(
        {"product_id": ids, "title": titles, "attributes": ['{"colour": "red", "size": 4}', "{"]}
    )
    tables = make_tables(products=json_text, judgments=make_tables()["judgments"].iloc[:0])
    good, quarantine = clean(tables)
    assert good["products"]["attributes"].to_pylist() == [[("colour", "red"), ("size", "4")]]
    assert reasons(quarantine) == {("products", "bad_attributes"): 1}
    struct = pa.table(
        {"product_id": ids, "title": titles, "attributes": [{"colour": "red"}, {"colour": None}]}
    )
    good, _ = clean({**tables, "products": struct})
    assert good["products"]["attributes"].to_pylist() == [[("colour", "red")], []]


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        ('[{"name": "colour", "value": "red"}]', [("colour", "red")]),
        ('[{"key": "colour", "value": 4}]', [("colour", "4")]),
        ('[["colour", "red"], ["size", null]]', [("colour", "red")]),
        ("null", None),
        ("{}", []),
    ],
)
def test_attributes_come_as_lists_of_pairs(cell: str, read: list[tuple[str, str]] | None) -> None:
    products = make_tables()["products"].assign(attributes=[cell, None])
    good, quarantine = clean(make_tables(products=products))
    assert good["products"]["attributes"].to_pylist() == [read, None] and not len(quarantine)


@pytest.mark.parametrize("cell", ['["XL", "XS"]', '[{"a": 1, "b": 2}]', '[["a", "b", "c"]]', "[1]"])
def test_other_lists_are_no_attributes(cell: str) -> None:
    products = make_tables()["products"].assign(attributes=[cell, None])
    _, quarantine = clean(make_tables(products=products))
    assert reasons(quarantine)["products", "bad_attributes"] == 1


def test_a_category_has_one_spelling() -> None:
    products = make_tables()["products"].assign(category=["Home>Sofas", " Home >  > Sofas "])
    good, _ = clean(make_tables(products=products))
    assert good["products"]["category"].to_pylist() == ["Home > Sofas"] * 2
    assert Filters(category="Home>Sofas").sql() == Filters(category="Home > Sofas").sql()


@pytest.mark.parametrize(
    ("table", "column"),
    [("products", "Price"), ("products", "rating count"), ("queries", "Segment")],
)
def test_a_column_that_is_nearly_one_is_asked_about(table: str, column: str) -> None:
    tables = make_tables()
    tables[table] = tables[table].assign(**{column: "1"})
    with pytest.raises(DataContractError, match=f"got a column '{column}' in {table}"):
        clean(tables)


def test_columns_that_nothing_reads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tables = make_tables()
    tables["products"] = tables["products"].assign(price=1.0, Price=2.0, shelf="3")
    tables["judgments"] = tables["judgments"].assign(timestamp="2026-01-01")
    tables["queries"] = tables["queries"].assign(Split="train")
    clean(tables)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "products: nothing reads the columns Price, shelf",
        "queries: nothing reads the columns Split",
    ]


def test_types_of_parquet_that_pyarrow_cannot_convert() -> None:
    views = pa.table(
        {
            "product_id": pa.array(["p1", "p2"], pa.string_view()),
            "title": pa.array(["Red shoe", None], pa.string_view()),
            "updated_at": pa.array([1, None], pa.time64("us")),
        }
    )
    _, quarantine = clean({**make_tables(), "products": views})
    found = reasons(quarantine)
    assert found["products", "bad_updated_at"] == 1 and found["products", "empty_text"] == 1


def test_unknown_segments_events_and_references_are_refused() -> None:
    queries = pd.DataFrame(
        {"query_id": ["q1", "q2", "q3"], "text": ["a", "b", "c"], "segment": ["general", "", "?"]}
    )
    log = pd.DataFrame(
        {
            "query_id": ["q1", "q1", "q9"],
            "product_id": ["p1", "p1", "p1"],
            "event": ["click", "look", "click"],
            "timestamp": ["2026-01-02T03:04:05Z", None, None],
        }
    )
    good, quarantine = clean(make_tables(queries=queries, interactions=log))
    assert good["queries"]["segment"].to_pylist() == ["general", None]
    assert str(good["interactions"]["timestamp"][0]) == "2026-01-02 03:04:05"
    assert reasons(quarantine) == {
        ("queries", "unknown_segment"): 1,
        ("interactions", "unknown_event"): 1,
        ("interactions", "dangling_query"): 1,
    }


def test_one_text_has_one_spelling_and_so_one_split() -> None:
    """An accent may be a character of its own; the query and its copy would part at the split."""
    spellings = ["cafe\u0301", "caf\u00e9", "de\u0301ja\u0300 vu", "d\u00e9j\u00e0 vu"]
    queries = pd.DataFrame({"query_id": ["q1", "q2", "q3", "q4"], "text": spellings})
    good, _ = clean(make_tables(queries=queries))
    texts = good["queries"]["text"].to_pylist()
    assert texts == [spellings[1], spellings[1], spellings[3], spellings[3]]
    assert [len(t) for t in texts] == [4, 4, 7, 7]
    assert terms(spellings[0]) == terms(spellings[1])
    assert position(spellings[2], "s") == position(spellings[3], "s")


def test_a_missing_column_or_table_is_one_clear_error() -> None:
    with pytest.raises(DataContractError, match="no column title in products"):
        clean(make_tables(products=pd.DataFrame({"product_id": ["p1"]})))
    tables = make_tables()
    del tables["judgments"]
    with pytest.raises(DataContractError, match="no table judgments"):
        clean(tables)


def test_cleaning_does_not_change_its_input_and_is_quick() -> None:
    rows = 230_000
    judgments = pd.DataFrame(
        {
            "query_id": [f"q{i // 20}" for i in range(rows)],
            "product_id": [f"p{i % 5000}" for i in range(rows)],
            "grade": np.arange(rows) % 4 + 1,
        }
    )
    tables = {
        "products": pd.DataFrame({"product_id": [f"p{i}" for i in range(5000)], "title": "shoe"}),
        "queries": pd.DataFrame(
            {"query_id": [f"q{i}" for i in range(rows // 20)], "text": "red shoe"}
        ),
        "judgments": judgments,
    }
    before = judgments.copy()
    started = time.process_time()
    good, quarantine = clean(tables)
    assert time.process_time() - started < 10.0
    assert (len(good["judgments"]), len(quarantine)) == (rows, 0)
    pd.testing.assert_frame_equal(judgments, before)
