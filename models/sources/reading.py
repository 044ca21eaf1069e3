"""Files of a source: found, decompressed, decoded and parsed, with errors a user can act on.

Consumes paths -> produces pandas frames of text columns, or arrow tables. Nothing here looks at
rows: row faults belong to `cleaning`.
"""

from __future__ import annotations

import gzip
import io
import logging
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import DataContractError, explain

log = logging.getLogger(__name__)


def variants(stem: str, kinds: Sequence[str] = ("csv", "csv.gz")) -> tuple[str, ...]:
    """File names under which a table may lie.

    >>> variants("train")
    ('train.csv', 'train.csv.gz')
    """
    return tuple(f"{stem}.{kind}" for kind in kinds)


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that is a file in `folder`, else None."""
    there = [folder / name for name in names if (folder / name).is_file()]
    if len(there) > 1:
        others = ", ".join(path.name for path in there[1:])
        log.warning("%s is read, not %s beside it", there[0], others)
    return there[0] if there else None


def require(folder: Path, wanted: Mapping[str, Sequence[str]], where: str) -> dict[str, Path]:
    """Find one file for every key of `wanted` (key -> acceptable names).

    Raises:
        DataContractError: one error for all missing files, with `where` they come from.
    """
    found = {key: find(folder, names) for key, names in wanted.items()}
    missing = [" or ".join(wanted[key]) for key, path in found.items() if path is None]
    if missing:
        raise DataContractError(
            explain(f"no {', no '.join(missing)} in {folder}", "the files as published", where)
        )
    return {key: path for key, path in found.items() if path is not None}


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed where it starts like a gzip stream.

    Raises:
        DataContractError: the gzip stream is cut short or damaged; names file and offset.
    """
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        if path.suffix == ".gz":
            _refuse(path, "bytes that are not gzip", "a gzip file", "compress it again")
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"a truncated or damaged gzip stream of {len(raw)} bytes ({error})"
        raise DataContractError(
            explain(f"{message} in {path}", "a complete gzip file", "copy the file again")
        ) from error


def decode(path: Path, data: bytes, encoding: str) -> str:
    """`data` as text.

    Raises:
        DataContractError: bytes that are not `encoding`; names file, byte offset and line.
    """
    try:
        return data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError as error:
        raise DataContractError(
            explain(f"encoding {encoding!r}", "a Python codec name", "set encoding=utf-8")
        ) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) in {path}"
        do = "save the file as UTF-8, or say what it is: --set data.source.encoding=latin-1"
        raise DataContractError(explain(got, f"{encoding} text", do)) from error


def read_csv(
    path: Path, required: Sequence[str], encoding: str = "utf-8", separator: str = ","
) -> pd.DataFrame:
    """A CSV file (plain or gzip) as text columns; empty cells are missing, "NA" is a text.

    Raises:
        DataContractError: unreadable, or a column of `required` is missing.
    """
    text = decode(path, read_bytes(path), encoding)
    try:
        with warnings.catch_warnings():  # said of rows that have more cells than the header
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text),
                sep=separator,
                dtype=str,
                keep_default_na=False,
                na_values=[""],
                index_col=False,  # else one cell too many would shift every column
            )
    except (
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        pd.errors.EmptyDataError,
        ValueError,
    ) as error:
        raise DataContractError(
            explain(f"{str(error).strip()} in {path}", "a CSV table with a header", "repair it")
        ) from error
    check_columns(path, list(frame.columns), required)
    return frame


def read_parquet(
    path: Path, required: Sequence[str], filters: object = None, columns: Sequence[str] = ()
) -> pa.Table:
    """A parquet file; `columns` are read beside `required` where the file has them.

    Raises:
        DataContractError: unreadable, or a column of `required` is missing.
    """
    try:
        names = pq.read_schema(path).names
        check_columns(path, names, required)
        keep = [n for n in names if n in required or n in columns] if columns else None
        return pq.read_table(path, columns=keep, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise DataContractError(
            explain(f"{str(error).strip()} in {path}", "a parquet file", "write it again")
        ) from error


def check_columns(path: Path, names: Sequence[str], required: Sequence[str]) -> None:
    """Raise a DataContractError that names the file and every missing column."""
    missing = [name for name in required if name not in names]
    if missing:
        _refuse(
            path,
            f"no column {', '.join(missing)} (columns are {', '.join(map(str, names))})",
            f"columns {', '.join(required)}",
            "rename or add the column",
        )


def _refuse(path: Path, got: str, expected: str, do: str) -> None:
    raise DataContractError(explain(f"{got} in {path}", expected, do))
