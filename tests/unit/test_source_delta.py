"""Deltas as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import DataContractError
from models.sources.delta import REPLACED, read_delta, refused_ids
from models.types import Product


def write(folder: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), folder / "products.parquet")
    return folder


def test_rows_are_products_and_marked_ones_are_gone(tmp_path: Path) -> None:
    write(
        tmp_path,
        product_id=["a", "b", "c"],
        title=[" Lamp ", None, "Desk"],
        price=[3.5, None, None],
        deleted=[False, True, None],
    )
    delta = read_delta(tmp_path)
    assert delta.products == (Product("a", "Lamp", price=3.5), Product("c", "Desk"))
    assert delta.deleted == ("b",) and delta.quarantine.num_rows == 0


def test_csv_reads_like_parquet(tmp_path: Path) -> None:
    (tmp_path / "products.csv").write_text(
        "product_id,title,brand,attributes,deleted\n"
        '7,Lamp,Acme,"{""colour"": ""red""}",\n'
        "8,,,,TRUE\n"
    )
    delta = read_delta(tmp_path)
    assert delta.products == (Product("7", "Lamp", brand="Acme", attributes={"colour": "red"}),)
    assert delta.deleted == ("8",)


def test_deletions_need_ids_alone(tmp_path: Path) -> None:
    delta = read_delta(write(tmp_path, product_id=[1, 2, 2], deleted=["true", "1", "yes"]))
    assert (delta.products, delta.deleted) == ((), ("1", "2"))


@pytest.mark.parametrize(
    ("ids", "deleted"),
    [
        (pa.array([2**53 + 1, None, 2**53 + 3], pa.int64()), pa.array([True, None, None])),
        (pa.array([b"a", None, b"c"], pa.binary()), pa.array([b"yes", None, b""], pa.binary())),
        (pa.array(["a", None, "c"]).dictionary_encode(), pa.array([1, None, 0], pa.int8())),
    ],
)
def test_ids_are_read_as_a_store_reads_them(
    tmp_path: Path, ids: pa.Array, deleted: pa.Array
) -> None:
    """Long numbers to the last digit, texts without the mark of one, nulls of pandas' own types."""
    first, _, last = (v.decode() if isinstance(v, bytes) else str(v) for v in ids.to_pylist())
    for pandas in (False, True):
        table = pa.table({"product_id": ids, "title": ["x", "y", "z"], "deleted": deleted})
        if pandas and not pa.types.is_binary(ids.type):
            table = pa.Table.from_pandas(table.to_pandas().convert_dtypes())
            if pa.types.is_integer(ids.type):
                continue  # pandas has rounded them already
        pq.write_table(table, tmp_path / "products.parquet")
        found = read_delta(tmp_path)
        assert found.deleted == (first,)
        assert [p.product_id for p in found.products] == [last]
        assert found.quarantine["reason"].to_pylist() == ["missing_key"]


def test_a_comma_at_the_end_of_every_row_moves_no_cell(tmp_path: Path) -> None:
    """pandas would take the first column for row names."""
    (tmp_path / "products.csv").write_text("product_id,title,brand\n1,Red sofa,Acme,\n")
    assert read_delta(tmp_path).products == (Product("1", "Red sofa", brand="Acme"),)


@pytest.mark.parametrize("rows", ["1,Red sofa,Acme,x\n", "1,Red sofa,Acme\n2,Desk,Acme,x\n"])
def test_a_row_with_more_cells_than_the_header_is_refused(tmp_path: Path, rows: str) -> None:
    (tmp_path / "products.csv").write_text("product_id,title,brand\n" + rows)
    with pytest.raises(DataContractError, match=r"products\.csv"):
        read_delta(tmp_path)


def test_faulty_rows_are_set_aside(tmp_path: Path) -> None:
    folder = write(tmp_path, product_id=["a", "b", "c"], title=["x", " ", "z"], price=[1, 2, -3])
    delta = read_delta(folder)
    assert [p.product_id for p in delta.products] == ["a"]
    assert sorted(delta.quarantine["reason"].to_pylist()) == ["bad_price", "empty_text"]


def test_the_last_row_of_an_id_counts(tmp_path: Path) -> None:
    """A log of changes: its newest row is its last."""
    write(
        tmp_path,
        product_id=["a", "b", "c", "a", "d", "b", None, "c", "a", "d"],
        title=["old", "lamp", None, "newer", "good", None, "x", "back", "newest", "faulty"],
        price=[1, 1, None, 2, 1, None, 1, 3, 4, -1],
        deleted=[False, False, True, False, False, True, False, False, False, False],
        note=[[1], [], [], [], [], [], [], [], [], []],
    )
    delta = read_delta(tmp_path)
    assert delta.products == (Product("c", "back", price=3.0), Product("a", "newest", price=4.0))
    assert delta.deleted == ("b",), "deleted after it was given; c the other way round"
    rows = delta.quarantine.to_pylist()
    replaced = [json.loads(row["row"]) for row in rows if row["reason"] == REPLACED]
    told = [(row["product_id"], row["title"], row["deleted"]) for row in replaced]
    assert told == [
        ("a", "old", "false"),
        ("b", "lamp", "false"),
        ("c", None, "true"),
        ("a", "newer", "false"),
        ("d", "good", "false"),
    ]
    reasons = [row["reason"] for row in rows if row["reason"] != REPLACED]
    assert sorted(reasons) == ["bad_price", "missing_key"], "d stays as it is served"


def test_the_last_row_of_an_id_counts_in_csv(tmp_path: Path) -> None:
    """However the id is written."""
    (tmp_path / "products.csv").write_text("product_id,title\n 7 ,old\n7,new\n,x\n,y\n")
    delta = read_delta(tmp_path)
    assert delta.products == (Product("7", "new"),)
    assert sorted(delta.quarantine["reason"].to_pylist()) == ["missing_key"] * 2 + [REPLACED]


def test_refused_ids_are_those_the_store_would_hold(tmp_path: Path) -> None:
    ids = [7.0, 8.0, None, 9.0]
    folder = write(tmp_path, product_id=ids, title=["x", " ", "no id", "z"], price=[-1, 2, 3, 4])
    quarantine = read_delta(folder).quarantine
    assert quarantine.num_rows == 3 and refused_ids(quarantine) == {"7", "8"}
    queries = quarantine.set_column(0, "table", pa.array(["queries"] * 3))
    assert refused_ids(queries) == set()


def test_the_digest_names_the_content(tmp_path: Path) -> None:
    first = read_delta(write(tmp_path, product_id=["a"], title=["x"])).digest
    assert read_delta(tmp_path).digest == first
    assert read_delta(write(tmp_path, product_id=["a"], title=["y"])).digest != first


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"title": ["x"]}, "no column product_id"),
        ({"product_id": ["a"]}, "no column title"),
        ({"product_id": ["a"], "title": ["x"], "Deleted": ["true"]}, "rename it to deleted"),
        ({"product_id": ["a"], "title": ["x"], "Price": [1]}, "rename it to price"),
        ({"product_id": ["a"], "title": ["x"], "deleted": ["maybe"]}, "'maybe'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, columns: dict[str, list[object]], said: str
) -> None:
    with pytest.raises(DataContractError, match=said):
        read_delta(write(tmp_path, **columns))


def test_a_folder_without_products_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match=r"products\.parquet"):
        read_delta(tmp_path)
