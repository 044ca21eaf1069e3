"""Tables as they were on a day: rows whose own date lies after it are left out.

Consumes a folder of tables (see `tables.py`) whose rows carry `updated_at` or `timestamp` ->
produces such a folder for a day, and the newest date of a table. Days end at midnight UTC; a date
without a zone is UTC.

A row has one date, that of its last change. So a product that changed later is left out for the
days before, although the shop had an earlier form of it: the tables no longer know that form.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataContractError, explain
from models.schemas import TABLES
from models.sources import TablesSource, reading, tables
from models.sources.cleaning import DATES, as_text

DATED = ("products", "judgments", "interactions")
"""Tables that must carry one. Queries may: without, all of them are kept, since a text alone
teaches nothing."""


@dataclass(frozen=True)
class Kept:
    """Rows of one table that a day had, and those it left out."""

    rows: int
    later: int
    """Dated after the day."""
    undated: int
    """Without a date, or with one that cannot be read."""
    dangling: int
    """Of a query or product that the day did not have."""


def as_of(
    source: TablesSource, folder: Path, out: Path, day: date, undated: Collection[str] = ()
) -> dict[str, Kept]:
    """Write the tables of `folder` as they were at the end of `day` into `out`, as parquet.

    The same rows give the same bytes, so two days between which nothing changed are one data set.

    undated: tables without dates that may be taken whole.

    Raises:
        DataContractError: a table has no date column and is not in `undated`, or has no row yet.
    """
    end = pd.Timestamp(datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1))
    frames, counts = {}, {}
    for name, path in tables.paths(folder).items():
        frame = _frame(source, name, path)
        column = _date_column(frame, name, path, undated)
        if column is None:
            frames[name], counts[name] = frame, (0, 0)
            continue
        dates = _dates(frame[column])
        frames[name] = frame[dates < end]
        counts[name] = (int((dates >= end).sum()), int(dates.isna().sum()))
    before = {name: len(frame) for name, frame in frames.items()}
    for name in ("judgments", "interactions"):
        if name in frames:
            frames[name] = _known(frames[name], frames)
    kept = {
        name: Kept(len(frame), *counts[name], before[name] - len(frame))
        for name, frame in frames.items()
    }
    for name, found in kept.items():
        if name != "interactions" and not found.rows:
            raise DataContractError(explain(*_nothing_left(name, day, found)))
        table = pa.Table.from_pandas(frames[name], preserve_index=False)
        pq.write_table(table.replace_schema_metadata(None), out / f"{name}.parquet")
    return kept


def _nothing_left(name: str, day: date, found: Kept) -> tuple[str, str, str]:
    left_out = {
        "choose a later day": found.later,
        f"write the dates of {name} as ISO 8601, like 2026-01-31": found.undated,
        f"see that {name} name queries and products by the ids that those have": found.dangling,
    }
    got = (
        f"no {name} on {day.isoformat()}: {found.later} are of later days, {found.undated} have no "
        f"date that can be read, {found.dangling} are of no query or product of that day"
    )
    return got, "at least one row", max(left_out, key=lambda do: left_out[do])


def newest(source: TablesSource, folder: Path, until: datetime) -> dict[str, datetime]:
    """The newest date, not after `until`, of judgments and interactions; tables without are left
    out. A date to come is a mistake, and would hide for as long that nothing arrives any more."""
    found = {}
    for name, path in tables.paths(folder).items():
        if name not in ("judgments", "interactions"):
            continue
        frame = _frame(source, name, path)
        column = next((c for c in DATES if c in frame.columns), None)
        dates = None if column is None else _dates(frame[column])
        last = None if dates is None else dates[dates <= until].max()
        if last is not None and not pd.isna(last):
            found[name] = last.to_pydatetime()
    return found


def _frame(source: TablesSource, name: str, path: Path) -> pd.DataFrame:
    required = [field.name for field in TABLES[name] if not field.nullable]
    if path.suffix == ".parquet":
        table = reading.read_parquet(path, required)
        return table.to_pandas(types_mapper=pd.ArrowDtype)
    return reading.read_csv(path, required, source.encoding)


def _date_column(
    frame: pd.DataFrame, name: str, path: Path, undated: Collection[str]
) -> str | None:
    column = next((c for c in DATES if c in frame.columns), None)
    if column is None and name in DATED and name not in undated:
        got = f"no column {' or '.join(DATES)} in {path}"
        do = f"add one, or name {name} in `undated`: it is then taken as it is today"
        raise DataContractError(explain(got, "the date of every row", do))
    return column


def _dates(column: pd.Series) -> pd.Series:
    return pd.to_datetime(column.astype(object), utc=True, errors="coerce", format="ISO8601")


def _known(frame: pd.DataFrame, frames: Mapping[str, Any]) -> pd.DataFrame:
    """Rows whose query and product the day had."""
    good = pd.Series(True, index=frame.index)
    for key, table in (("query_id", "queries"), ("product_id", "products")):
        good &= _ids(frame[key]).isin(set(_ids(frames[table][key])))
    return frame[good]


def _ids(column: pd.Series) -> pd.Series:
    """Ids as a store would hold them; a missing one is like no other."""
    read = as_text(pa.array(column, from_pandas=True)).to_pandas().astype(object)
    return read.fillna("").set_axis(column.index)
