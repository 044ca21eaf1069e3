"""Deltas as users write them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import DataContractError
from models.sources.delta import read_delta, refused_ids
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


def test_faulty_rows_are_set_aside(tmp_path: Path) -> None:
    folder = write(tmp_path, product_id=["a", "b", "c"], title=["x", " ", "z"], price=[1, 2, -3])
    delta = read_delta(folder)
    assert [p.product_id for p in delta.products] == ["a"]
    assert sorted(delta.quarantine["reason"].to_pylist()) == ["bad_price", "empty_text"]


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
        ({"product_id": ["a"], "title": ["x"], "deleted": ["maybe"]}, "'maybe'"),
        ({"product_id": ["a", "a"], "title": ["x", "y"], "deleted": [True, False]}, "both deleted"),
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
