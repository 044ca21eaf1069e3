"""Your own tables: every way a file can be broken is one clear error."""

from __future__ import annotations

import gzip
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from models.errors import DataContractError
from models.sources import SourceConfig, SyntheticSource, TablesSource, digest, load

PRODUCTS = 'product_id,title,price,attributes\np1,Red shoe,10,"{""colour"": ""red""}"\n'
QUERIES = "query_id,text\nq1,shoe\n"
JUDGMENTS = 'query_id,product_id,grade,rater_grades\nq1,p1,4,"[4, 3.5]"\n'


def write_store(folder: Path, **contents: str | bytes) -> Path:
    """A CSV store in `folder`, with single files replaced."""
    files = {"products": PRODUCTS, "queries": QUERIES, "judgments": JUDGMENTS, **contents}
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / f"{name}.csv").write_bytes(data)
    return folder


def test_csv_becomes_a_store(tmp_path: Path) -> None:
    loaded = load(TablesSource(), write_store(tmp_path))
    product = loaded.store.product_by_id["p1"]
    assert (product.title, product.price, dict(product.attributes)) == (
        "Red shoe",
        10.0,
        {"colour": "red"},
    )
    assert loaded.store.judgments["rater_grades"].to_pylist() == [[4.0, 3.5]]
    assert loaded.store.notes["quality"] == "none: no sales, no ratings"
    assert len(loaded.quarantine) == 0


def test_parquet_and_gzip_read_like_csv(tmp_path: Path) -> None:
    write_store(tmp_path)
    expected = load(TablesSource(), tmp_path).store
    (tmp_path / "products.csv").unlink()
    pq.write_table(expected.products, tmp_path / "products.parquet")
    (tmp_path / "queries.csv").unlink()
    (tmp_path / "queries.csv.gz").write_bytes(gzip.compress(QUERIES.encode()))
    store = load(TablesSource(), tmp_path).store
    assert store.products.equals(expected.products)
    assert store.queries.equals(expected.queries)


def test_na_is_a_word_and_grades_can_be_shifted(tmp_path: Path) -> None:
    write_store(
        tmp_path,
        queries="query_id,text\nq1,NA\n",
        judgments="query_id,product_id,grade\nq1,p1,3\n",
    )
    store = load(TablesSource(grade_offset=1), tmp_path).store
    assert store.queries["text"].to_pylist() == ["NA"]
    assert store.judgments["grade"].to_pylist() == [3 + 1]


def test_raters_are_shifted_with_the_grade(tmp_path: Path) -> None:
    rows = 'q1,p1,3,"[3, 2.5]"\nq1,p2,0,"[0, null]"\nq1,p3,0,\n'
    write_store(
        tmp_path,
        products="product_id,title\np1,Red shoe\np2,Hat\np3,Sock\n",
        judgments="query_id,product_id,grade,rater_grades\n" + rows,
    )
    loaded = load(TablesSource(grade_offset=1), tmp_path)
    shifted = [[3 + 1, 2.5 + 1], None]
    assert loaded.store.judgments["rater_grades"].to_pylist() == shifted
    assert loaded.quarantine["reason"].to_pylist() == ["bad_rater_grades"]
    (tmp_path / "judgments.csv").unlink()
    frame = pd.DataFrame({"query_id": ["q1", "q1"], "product_id": ["p1", "p3"], "grade": [3, 0]})
    frame.assign(rater_grades=[[3, 2.5], None]).to_parquet(tmp_path / "judgments.parquet")
    loaded = load(TablesSource(grade_offset=1), tmp_path)
    assert loaded.store.judgments["rater_grades"].to_pylist() == shifted


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataContractError) as error:
        load(TablesSource(), tmp_path)
    for name in ("products.parquet", "queries.csv", "judgments.csv.gz", "do this"):
        assert name in str(error.value)
    assert "interactions" not in str(error.value).split("; do this")[0]


def test_no_folder_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(DataContractError, match="--data DIR"):
        load(TablesSource(), None)


def test_a_missing_column_names_file_and_column(tmp_path: Path) -> None:
    write_store(tmp_path, products="product_id,name\np1,Red shoe\n")
    with pytest.raises(
        DataContractError, match=r"no column title .*product_id, name.*products.csv"
    ):
        load(TablesSource(), tmp_path)
    (tmp_path / "products.csv").unlink()
    pq.write_table(pa.table({"product_id": ["p1"]}), tmp_path / "products.parquet")
    with pytest.raises(DataContractError, match=r"no column title .*products.parquet"):
        load(TablesSource(), tmp_path)


def test_latin_1_bytes_name_offset_and_line_and_the_way_out(tmp_path: Path) -> None:
    text = "product_id,title\np1,Red shoe\np2,Caf\xe9 chair\n"
    write_store(tmp_path, products=text.encode("latin-1"))
    offset = text.index("\xe9")
    with pytest.raises(DataContractError) as error:
        load(TablesSource(), tmp_path)
    assert f"byte 0xe9 at offset {offset} (line 3)" in str(error.value)
    assert "products.csv" in str(error.value) and "encoding=latin-1" in str(error.value)
    store = load(TablesSource(encoding="latin-1"), tmp_path).store
    assert store.product_by_id["p2"].title == "Caf\xe9 chair"


@pytest.mark.parametrize("cut", [5, 40, -4])
def test_a_truncated_gzip_is_one_clear_error(tmp_path: Path, cut: int) -> None:
    write_store(tmp_path)
    (tmp_path / "products.csv").unlink()
    packed = gzip.compress(("product_id,title\n" + "p1,Red shoe\n" * 1000).encode())
    (tmp_path / "products.csv.gz").write_bytes(packed[:cut])
    with pytest.raises(DataContractError, match=r"truncated or damaged gzip.*products.csv.gz"):
        load(TablesSource(), tmp_path)


@pytest.mark.parametrize("content", [b"", b'product_id,title\np1,"never closed\n', b"PAR1 not one"])
def test_other_broken_files_never_show_a_pandas_traceback(tmp_path: Path, content: bytes) -> None:
    write_store(tmp_path, products=content)
    with pytest.raises(DataContractError, match=r"products.csv"):
        load(TablesSource(), tmp_path)
    (tmp_path / "products.csv").rename(tmp_path / "products.parquet")
    with pytest.raises(DataContractError, match=r"products.parquet"):
        load(TablesSource(), tmp_path)


def test_row_faults_do_not_stop_a_source(tmp_path: Path) -> None:
    write_store(tmp_path, judgments=JUDGMENTS + "q1,p9,4,\nq1,p1,x,\n")
    loaded = load(TablesSource(), tmp_path)
    assert sorted(loaded.quarantine["reason"].to_pylist()) == ["dangling_product", "unknown_grade"]
    assert len(loaded.store.judgments) == 1


def test_the_digest_covers_the_files_that_are_read_and_no_other(tmp_path: Path) -> None:
    write_store(tmp_path)
    first = digest(TablesSource(), tmp_path)
    (tmp_path / "readme.txt").write_text("unrelated")
    assert digest(TablesSource(), tmp_path) == first
    (tmp_path / "queries.csv").write_text(QUERIES + "q2,hat\n")
    assert digest(TablesSource(), tmp_path) != first
    assert digest(SyntheticSource(), None) == ""


def test_source_configs_are_told_apart_by_kind_and_refuse_unknown_keys() -> None:
    adapter = TypeAdapter(SourceConfig)
    assert adapter.validate_python({"kind": "synthetic", "seed": 3}) == SyntheticSource(seed=3)
    assert adapter.validate_python({"kind": "tables"}) == TablesSource()
    for wrong in ({"kind": "nowhere"}, {"kind": "chorus", "seed": 1}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
