"""Tables as they were on a day: what a date keeps, refuses and counts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import DataContractError
from models.sources import TablesSource, load
from models.sources.dates import as_of, newest

LATER = datetime(2027, 1, 1, tzinfo=UTC)
SOURCE = TablesSource()


def write(folder: Path, **changed: Mapping[str, list[object]]) -> Path:
    """A store of two queries and three products, judged on the 1st, 2nd and 3rd of March."""
    folder.mkdir()
    base: dict[str, Mapping[str, list[object]]] = {
        "products": {
            "product_id": ["p1", "p2", "p3"],
            "title": ["Red sofa", "Blue sofa", "Oak desk"],
            "attributes": ['{"colour": "red"}', None, None],
            "updated_at": ["2026-03-01T08:00:00", "2026-03-01T08:00:00", "2026-03-03T08:00:00"],
        },
        "queries": {"query_id": ["q1", "q2"], "text": ["red sofa", "desk"]},
        "judgments": {
            "query_id": ["q1", "q1", "q2", "q2"],
            "product_id": ["p1", "p2", "p3", "p2"],
            "grade": ["4", "2", "4", "1"],
            "updated_at": ["2026-03-01", "2026-03-02T23:59:59", "2026-03-01", "2026-03-03"],
        },
    }
    for name, columns in (base | changed).items():
        pd.DataFrame(columns).to_csv(folder / f"{name}.csv", index=False)
    return folder


def at(folder: Path, out: Path, day: int, **options: object) -> dict[str, object]:
    """`as_of` into an empty folder."""
    out.mkdir()
    return dict(as_of(SOURCE, folder, out, date(2026, 3, day), **options))  # type: ignore[arg-type]


def test_a_day_ends_at_midnight_and_leaves_out_what_it_did_not_have(tmp_path: Path) -> None:
    folder = write(tmp_path / "now")
    kept = at(folder, tmp_path / "second", 2)
    store = load(SOURCE, tmp_path / "second").store
    assert store.products["product_id"].to_pylist() == ["p1", "p2"]
    assert store.judgments["product_id"].to_pylist() == ["p1", "p2"]
    assert dict(store.products["attributes"].to_pylist()[0]) == {"colour": "red"}
    judgments = kept["judgments"]
    # q2 p2 is dated the 3rd; q2 p3 is of the 1st, but its product came later
    assert (judgments.rows, judgments.later, judgments.dangling) == (2, 1, 1)  # type: ignore[attr-defined]


def test_days_without_a_change_are_one_data_set_byte_for_byte(tmp_path: Path) -> None:
    folder = write(tmp_path / "now")
    digests = []
    for day in (2, 3, 4):
        at(folder, out := tmp_path / str(day), day)
        files = sorted(out.iterdir())
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] != digests[1] == digests[2]


def test_a_table_without_dates_is_refused_unless_it_is_named(tmp_path: Path) -> None:
    plain = {"query_id": ["q1"], "product_id": ["p1"], "grade": ["4"]}
    folder = write(tmp_path / "now", judgments=plain)
    with pytest.raises(DataContractError, match=r"no column updated_at or timestamp in .*judgm"):
        at(folder, tmp_path / "a", 2)
    kept = at(folder, tmp_path / "b", 2, undated=("judgments",))
    assert kept["judgments"].rows == 1  # type: ignore[attr-defined]


def test_a_day_before_the_first_row_is_refused_and_odd_dates_are_counted(tmp_path: Path) -> None:
    odd = {"query_id": ["q1"] * 3, "product_id": ["p1", "p2", "p1"], "grade": ["4"] * 3}
    folder = write(tmp_path / "now", judgments=odd | {"timestamp": ["2026-03-01", "soon", None]})
    kept = at(folder, tmp_path / "a", 2)
    assert (kept["judgments"].rows, kept["judgments"].undated) == (1, 2)  # type: ignore[attr-defined]
    with pytest.raises(DataContractError, match=r"no products on 2026-02-28"):
        as_of(SOURCE, folder, tmp_path / "a", date(2026, 2, 28))


def test_parquet_moments_with_and_without_zone_are_utc(tmp_path: Path) -> None:
    folder = write(tmp_path / "now")
    (folder / "judgments.csv").unlink()
    late = datetime(2026, 3, 2, 23, 30)
    for name, kind in (("naive", pa.timestamp("us")), ("zoned", pa.timestamp("us", "UTC"))):
        table = pa.table(
            {
                "query_id": ["q1"],
                "product_id": ["p1"],
                "grade": pa.array([4], pa.int8()),
                "timestamp": pa.array([late], kind),
            }
        )
        pq.write_table(table, folder / "judgments.parquet")
        kept = at(folder, tmp_path / name, 2)
        assert kept["judgments"].rows == 1, name  # type: ignore[attr-defined]
        assert newest(SOURCE, folder, LATER) == {"judgments": late.replace(tzinfo=UTC)}
        with pytest.raises(DataContractError, match="no judgments on 2026-03-01"):
            at(folder, tmp_path / f"{name}-before", 1)


def test_the_newest_date_is_looked_for_in_labels_alone(tmp_path: Path) -> None:
    folder = write(tmp_path / "now")
    assert newest(SOURCE, folder, LATER) == {"judgments": datetime(2026, 3, 3, tzinfo=UTC)}
    before = datetime(2026, 3, 2, 23, tzinfo=UTC)
    assert newest(SOURCE, folder, before)["judgments"] <= before, "a date to come says nothing"
    none = {"query_id": ["q1"], "product_id": ["p1"], "grade": ["4"]}
    assert newest(SOURCE, write(tmp_path / "none", judgments=none), LATER) == {}


def test_ids_of_other_types_are_the_same_ids(tmp_path: Path) -> None:
    """As `load` reads them: whole floats, and blanks around."""
    folder = write(tmp_path / "now", products={
        "product_id": ["1", " 2", "3"], "title": ["Red sofa", "Blue sofa", "Oak desk"],
        "updated_at": ["2026-03-01"] * 3})  # fmt: skip
    (folder / "judgments.csv").unlink()
    judged = {"query_id": ["q1", "q1 ", "q2"], "product_id": [1.0, 2.0, None], "grade": [4, 2, 1]}
    judged["timestamp"] = ["2026-03-01"] * 3
    pd.DataFrame(judged).to_parquet(folder / "judgments.parquet")
    kept: dict[str, Any] = at(folder, tmp_path / "then", 2)
    assert (kept["judgments"].rows, kept["judgments"].dangling) == (2, 1)


@pytest.mark.parametrize(
    ("judged", "do"),
    [
        ({"updated_at": ["2026-03-09"] * 2}, "choose a later day"),
        ({"updated_at": ["01/05/2026", "1767225600"]}, "ISO 8601"),
        ({"updated_at": ["2026-03-01"] * 2, "product_id": ["p7", "p8"]}, "by the ids"),
    ],
)
def test_a_day_without_labels_says_why(
    tmp_path: Path, judged: dict[str, list[object]], do: str
) -> None:
    rows = {"query_id": ["q1", "q2"], "product_id": ["p1", "p3"], "grade": ["4", "4"]}
    folder = write(tmp_path / "now", judgments=rows | judged)
    with pytest.raises(DataContractError, match=rf"no judgments on 2026-03-05: .*do this: .*{do}"):
        at(folder, tmp_path / "then", 5)
