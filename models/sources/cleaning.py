"""Row faults, for every source: good rows in the contract's schemas, bad ones to quarantine.

Consumes loose tables (pandas or arrow, the column names of `models/schemas.py`) -> produces tables
in exactly those schemas, and one quarantine table with a reason for every refused row.

What happens to a row:
1. A cell of the wrong kind (a word for a price) refuses its row; an empty cell or NaN is missing.
2. The first fault found is the reason. Nothing is cut or guessed; texts and ids are stripped.
3. Equal rows under one key collapse. Judgments with different grades for one pair are all refused,
   because nothing says which one is right; of different products or queries under one id the first
   is kept, so that its judgments stay valid.
4. Judgments and interactions of a refused product or query are refused as dangling.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from models.errors import DataContractError, explain
from models.schemas import EVENTS, MAX_TEXT, QUARANTINE, TABLES
from models.text import category_path, composed
from models.types import GRADES, SEGMENTS, Category

log = logging.getLogger(__name__)

Faults = list[tuple[str, np.ndarray]]
"""(reason, [rows] bool), the first that holds wins."""

DATES = ("updated_at", "timestamp")
"""Columns that date a row, of any table; the first one that a table has counts (`dates.py`)."""
_MAX_CELL = 200
"""Characters of a text kept in the quarantine's JSON; the length is noted beside it."""
_NAN_WORDS = ("", "nan", "NaN", "NAN")
_KEYS = {
    "products": ["product_id"],
    "queries": ["query_id"],
    "judgments": ["query_id", "product_id"],
}


def clean(tables: Mapping[str, pa.Table | pd.DataFrame]) -> tuple[dict[str, pa.Table], pa.Table]:
    """Part good rows from bad.

    tables: products, queries, judgments, and optionally interactions; columns beyond the contract
    are dropped with a warning, missing optional ones become null, `queries.split` is always null.

    Returns:
        ({name: table in TABLES[name]}, quarantine in QUARANTINE).

    Raises:
        DataContractError: a table or a required column is missing, or a column's name differs from
            a missing optional one's in case, blanks or underscores alone.
    """
    out: dict[str, pa.Table] = {}
    refused: list[pa.Table] = []
    for name, schema in TABLES.items():
        raw = _arrow(name, tables.get(name))
        table, faults = _conform(raw, schema)
        if name == "products":
            table = _with_paths(table)
        faults += _CHECKS[name](table, out)
        reasons = _first_reason(faults, len(table))
        keep = pd.isna(reasons)
        if name in _KEYS:
            keep &= ~_duplicates(name, table, keep, reasons)
        out[name] = table.filter(pa.array(keep)).cast(schema)
        refused.append(_quarantine(name, raw, reasons))
    return out, pa.concat_tables(refused)


def _arrow(name: str, raw: pa.Table | pd.DataFrame | None) -> pa.Table:
    required = [f.name for f in TABLES[name] if not f.nullable]
    if raw is None:
        if name == "interactions":
            return TABLES[name].empty_table()
        raise DataContractError(explain(f"no table {name}", "all tables", "provide it"))
    present = raw.column_names if isinstance(raw, pa.Table) else list(raw.columns)
    missing = [column for column in required if column not in present]
    if missing:
        raise DataContractError(
            explain(f"no column {', '.join(missing)} in {name}", required, "add the column")
        )
    check_names(name, present, TABLES[name].names)
    if isinstance(raw, pa.Table):
        return _plain(raw)
    names = [n for n in TABLES[name].names if n in present]
    return pa.table({n: _array(raw[n]) for n in names})


def check_names(table: str, present: Sequence[str], known: Sequence[str]) -> None:
    """Warn of columns that nothing reads.

    Raises:
        DataContractError: one that is a known, missing column but for case, blanks and underscores.
    """
    known = [name for name in known if name != "split"]  # written here, never read
    unread = [name for name in present if name not in known and name not in DATES]
    missing = {_bare(name): name for name in known if name not in present}
    for name in unread:
        if _bare(name) in missing:
            meant = missing[_bare(name)]
            got = f"a column {name!r} in {table}"
            raise DataContractError(explain(got, repr(meant), f"rename it to {meant}"))
    if unread:
        log.warning("%s: nothing reads the columns %s", table, ", ".join(map(str, unread)))


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).lower()


def _plain(table: pa.Table) -> pa.Table:
    """View types as plain ones: most of pyarrow's functions know no views."""
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    fields = [f.with_type(plain.get(f.type, f.type)) for f in table.schema]
    return table.cast(pa.schema(fields)) if fields != list(table.schema) else table


def _array(column: pd.Series) -> pa.Array:
    """An arrow array of one pandas column; a column of mixed kinds becomes text."""
    try:
        return pa.array(column, from_pandas=True)
    except (pa.ArrowException, UnicodeError):
        texts = [None if v is None or v != v else str(v) for v in column]
        return pa.array([t and t.encode("utf-8", "replace").decode() for t in texts], pa.string())


# ---------------------------------------------------------------- columns, by kind


def _conform(raw: pa.Table, schema: pa.Schema) -> tuple[pa.Table, Faults]:
    """Every column in its schema's type (nulls allowed everywhere), and the cells that failed."""
    columns: dict[str, pa.ChunkedArray | pa.Array] = {}
    faults: Faults = []
    for field in schema:
        if field.name not in raw.column_names or field.name == "split":
            columns[field.name] = pa.nulls(len(raw), field.type)
            continue
        column = raw[field.name].combine_chunks()
        good, bad = _converter(field.type)(column, field.type)
        columns[field.name] = good
        if bad.any():
            faults.append((_BAD_CELL.get(field.name, f"bad_{field.name}"), bad))
    return pa.table(columns), faults


def _with_paths(products: pa.Table) -> pa.Table:
    """Categories as paths of one spelling, however their separators were spaced."""
    at = products.schema.get_field_index("category")
    written = [c and category_path(c) for c in products["category"].to_pylist()]
    return products.set_column(at, "category", pa.array(written, pa.string()))


_BAD_CELL = {"grade": "unknown_grade"}

Converted = tuple[pa.Array, np.ndarray]


def _converter(kind: pa.DataType) -> Callable[[pa.Array, pa.DataType], Converted]:
    if pa.types.is_string(kind):
        return _text
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _number
    if pa.types.is_timestamp(kind):
        return _time
    return _nested


def as_text(column: pa.Array) -> pa.Array:
    """A column as this module reads ids and texts."""
    return _text(column, pa.string())[0]


def _text(column: pa.Array, kind: pa.DataType) -> Converted:
    """Stripped text (NFC); empty and "nan" are missing; whole floats (1.0) lose their point."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, None)
        values = column.drop_null()
        if pc.all(pc.equal(values, pc.floor(values))).as_py() in (True, None):
            column = column.cast(pa.int64())
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        texts = [None if v is None else v.decode("utf-8", "replace") for v in column.to_pylist()]
        column = pa.array(texts, pa.string())
    if pa.types.is_nested(column.type):
        return pa.nulls(len(column), kind), _mask(pc.is_valid(column))
    text = _composed(pc.utf8_trim_whitespace(column.cast(kind)))
    missing = pc.is_in(text, pa.array(_NAN_WORDS))
    return pc.if_else(missing, None, text), np.zeros(len(column), bool)


def _composed(text: pa.Array) -> pa.Array:
    """NFC. pyarrow's own `utf8_normalize` decomposes whatever form it is asked for."""
    if pc.all(pc.string_is_ascii(text)).as_py() in (True, None):
        return text
    return pa.array([None if t is None else composed(t) for t in text.to_pylist()], text.type)


def _number(column: pa.Array, kind: pa.DataType) -> Converted:
    """A number; NaN is missing; words, infinities and fractions in whole columns are faults."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type) or pa.types.is_temporal(column.type):
        return pa.nulls(len(column), kind), _mask(pc.is_valid(column))
    given = _mask(pc.is_valid(column))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        given &= ~_mask(pc.is_in(pc.utf8_trim_whitespace(column), pa.array(_NAN_WORDS)))
        values = pd.to_numeric(column.to_pandas(), errors="coerce").to_numpy(float)
    else:
        values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        given &= ~np.isnan(values)
    bad = given & ~np.isfinite(values)
    if pa.types.is_integer(kind):
        low, high = (-128, 127) if kind == pa.int8() else (-(2.0**53), 2.0**53)
        with np.errstate(invalid="ignore"):
            bad |= given & ((values != np.floor(values)) | (values < low) | (values > high))
    return pa.array(values, pa.float64(), mask=~given | bad).cast(kind), bad


def _time(column: pa.Array, kind: pa.DataType) -> Converted:
    """A moment (UTC, microseconds); text is parsed as ISO 8601."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return column.cast(kind, safe=False), np.zeros(len(column), bool)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return pa.nulls(len(column), kind), _mask(pc.is_valid(column))
    text, _ = _text(column, pa.string())
    moments = pd.to_datetime(text.to_pandas(), errors="coerce", utc=True, format="ISO8601")
    times = pa.array(moments.dt.tz_localize(None).astype("datetime64[us]"), from_pandas=True)
    return times.cast(kind), _mask(pc.and_(pc.is_valid(text), pc.is_null(times)))


def _nested(column: pa.Array, kind: pa.DataType) -> Converted:
    """A map or a list; text is read as JSON, a struct as a map."""
    none_bad = np.zeros(len(column), bool)
    if column.type == kind or pa.types.is_null(column.type):
        return column.cast(kind), none_bad
    if column.type.id == kind.id and not pa.types.is_map(kind):
        try:
            return column.cast(kind), none_bad
        except pa.ArrowException:
            pass
    cells = [_cell(value, kind) for value in column.to_pylist()]
    bad = np.array([cell is _BAD for cell in cells], bool)
    return pa.array([None if cell is _BAD else cell for cell in cells], kind), bad


_BAD = object()


def _cell(value: Any, kind: pa.DataType) -> Any:
    """One value as `kind` wants it, or _BAD."""
    if value is None or value != value or value == "":
        return None
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if value is None:
            return None
        if pa.types.is_map(kind):
            items = value.items() if isinstance(value, Mapping) else map(_pair, value)
            value = [(str(k), str(v)) for k, v in items if v is not None]
        pa.array([value], kind)
    except (ValueError, TypeError, pa.ArrowException):
        return _BAD
    return value


_PAIRS = ({"name", "value"}, {"key", "value"})


def _pair(item: Any) -> tuple[Any, Any]:
    """An item of a list that stands for a map: two values, or an object that names them."""
    if isinstance(item, Mapping) and set(item) in _PAIRS:
        return item.get("name", item.get("key")), item["value"]
    if isinstance(item, list | tuple) and len(item) == 2:
        return item[0], item[1]
    raise ValueError("no name and value")


def _mask(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """[rows] bool; null reads as False. Always a fresh, writable array."""
    filled = pc.fill_null(values, False)
    return np.array(filled.to_numpy(zero_copy_only=False), dtype=bool)


# ---------------------------------------------------------------- rows, by table


def _products(table: pa.Table, done: Mapping[str, pa.Table]) -> Faults:
    return [
        *_missing(table, "product_id"),
        ("empty_text", _mask(pc.is_null(table["title"]))),
        *[("text_too_long", _long(table[c])) for c in ("title", "description", "brand")],
        ("bad_price", _mask(pc.less_equal(table["price"], 0.0))),
        ("bad_rating", _outside(table["rating"], 0.0, 5.0)),
        ("bad_rating_count", _mask(pc.less(table["rating_count"], 0))),
        ("bad_sales", _mask(pc.less(table["sales"], 0.0))),
    ]


def _queries(table: pa.Table, done: Mapping[str, pa.Table]) -> Faults:
    return [
        *_missing(table, "query_id"),
        ("empty_text", _mask(pc.is_null(table["text"]))),
        ("text_too_long", _long(table["text"])),
        ("unknown_segment", _unknown(table["segment"], SEGMENTS)),
        ("bad_frequency", _mask(pc.less(table["frequency"], 0.0))),
    ]


def _judgments(table: pa.Table, done: Mapping[str, pa.Table]) -> Faults:
    return [
        *_missing(table, "query_id", "product_id"),
        ("unknown_grade", ~_mask(pc.is_in(table["grade"], pa.array(GRADES, pa.int8())))),
        *_dangling(table, done),
        ("bad_rater_grades", _bad_raters(table["rater_grades"])),
        ("bad_weight", _mask(pc.less_equal(table["weight"], 0.0))),
        ("unknown_verdict", _unknown(table["verdict_category"], [c.value for c in Category])),
        ("text_too_long", _long(table["reasoning"])),
    ]


def _interactions(table: pa.Table, done: Mapping[str, pa.Table]) -> Faults:
    return [
        *_missing(table, "query_id", "product_id"),
        ("unknown_event", ~_mask(pc.is_in(table["event"], pa.array(EVENTS)))),
        *_dangling(table, done),
    ]


_CHECKS: dict[str, Callable[[pa.Table, Mapping[str, pa.Table]], Faults]] = {
    "products": _products,
    "queries": _queries,
    "judgments": _judgments,
    "interactions": _interactions,
}


def _missing(table: pa.Table, *columns: str) -> Faults:
    return [("missing_key", _mask(pc.is_null(table[column]))) for column in columns]


def _long(column: pa.ChunkedArray) -> np.ndarray:
    return _mask(pc.greater(pc.utf8_length(column), MAX_TEXT))


def _outside(column: pa.ChunkedArray, low: float, high: float) -> np.ndarray:
    return _mask(pc.or_(pc.less(column, low), pc.greater(column, high)))


def _bad_raters(column: pa.ChunkedArray) -> np.ndarray:
    """[rows] bool: one of the row's raters gave no grade, or one that is not on the scale."""
    lists = column.combine_chunks()
    grades = pc.list_flatten(lists)
    on_scale = pc.and_(pc.greater_equal(grades, GRADES[0]), pc.less_equal(grades, GRADES[-1]))
    bad = np.zeros(len(column), bool)
    bad[pc.list_parent_indices(lists).to_numpy()[~_mask(on_scale)]] = True
    return bad


def _unknown(column: pa.ChunkedArray, known: list[str] | tuple[str, ...]) -> np.ndarray:
    given = pc.is_valid(column)
    return _mask(pc.and_(given, pc.invert(pc.is_in(column, pa.array(known)))))


def _dangling(table: pa.Table, done: Mapping[str, pa.Table]) -> Faults:
    return [
        (f"dangling_{key}", ~_mask(pc.is_in(table[column], done[other][column])))
        for key, column, other in (
            ("query", "query_id", "queries"),
            ("product", "product_id", "products"),
        )
    ]


def _first_reason(faults: Faults, rows: int) -> np.ndarray:
    """[rows] object: the first reason that holds, or None."""
    reasons = np.full(rows, None, dtype=object)
    for reason, mask in reversed(faults):
        reasons[mask] = reason
    return reasons


def _duplicates(name: str, table: pa.Table, keep: np.ndarray, reasons: np.ndarray) -> np.ndarray:
    """[rows] bool of rows to drop under a repeated key; writes `duplicate_key` into `reasons`."""
    keys = table.select(_KEYS[name]).to_pandas()
    keys = keys[keep]
    repeated = keys.index[keys.duplicated(keep=False)].to_numpy()
    drop = np.zeros(len(table), bool)
    if not len(repeated):
        return drop
    rows = keys.loc[repeated].agg("\0".join, axis=1).to_frame("key")
    rows["content"] = _content(name, table.take(pa.array(repeated)))
    group = rows.groupby("key", sort=False)["content"]
    later = rows["key"].duplicated().to_numpy()
    if name == "judgments":
        conflict = (group.transform("nunique") > 1).to_numpy()
    else:
        conflict = (rows["content"] != group.transform("first")).to_numpy()
    drop[repeated[conflict | later]] = True
    reasons[repeated[conflict]] = "duplicate_key"
    log.info("%s: %d repeated rows collapsed", name, int((later & ~conflict).sum()))
    return drop


def _content(name: str, table: pa.Table) -> list[str]:
    """What must be equal for two rows under one key to be the same row."""
    if name == "judgments":
        return [str(grade) for grade in table["grade"].to_pylist()]
    return [json.dumps(row, default=str, sort_keys=True) for row in table.to_pylist()]


def _quarantine(name: str, raw: pa.Table, reasons: np.ndarray) -> pa.Table:
    bad = np.flatnonzero(~pd.isna(reasons))
    rows = [
        json.dumps({k: _clip(v) for k, v in row.items()}, default=str, ensure_ascii=False)
        for row in raw.take(pa.array(bad, pa.int64())).to_pylist()
    ]
    columns = [[name] * len(bad), [str(reasons[i]) for i in bad], rows]
    return pa.table([pa.array(c, pa.string()) for c in columns], schema=QUARANTINE)


def set_aside(name: str, rows: pd.DataFrame, reason: str) -> pa.Table:
    """Rows of the table `name`, as they were given, as a quarantine with one reason."""
    raw = pa.table({column: _array(rows[column]) for column in rows.columns})
    return _quarantine(name, raw, np.full(len(rows), reason, dtype=object))


def _clip(value: object) -> object:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) and len(value) > _MAX_CELL:
        return f"{value[:_MAX_CELL]}... ({len(value)} characters)"
    return None if isinstance(value, float) and value != value else value


def refusals(quarantine: pa.Table) -> str:
    """Refused rows by table and reason, each with one example; "" where none was refused.

    >>> row = {"table": "products", "reason": "bad_price", "row": '{"product_id": "7"}'}
    >>> refusals(pa.Table.from_pylist([row, row], schema=QUARANTINE))
    'products: 2 bad_price, e.g. {"product_id": "7"}'
    """
    rows = quarantine.to_pylist()
    counts = Counter((row["table"], row["reason"]) for row in rows)
    first = {(row["table"], row["reason"]): row["row"] for row in reversed(rows)}
    return "; ".join(
        f"{table}: {count} {reason}, e.g. {first[table, reason][:_MAX_CELL]}"
        for (table, reason), count in counts.most_common()
    )
