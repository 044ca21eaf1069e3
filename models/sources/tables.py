"""Your own store: products, queries, judgments and optionally interactions, as parquet or CSV.

Consumes {products, queries, judgments[, interactions]}.{parquet,csv,csv.gz} with the columns of
`models/schemas.py` -> produces the same tables. In CSV, `attributes` is a JSON object, and
`rater_grades` and `verdict_attributes` are JSON lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from models.schemas import TABLES
from models.sources import TablesSource, reading
from models.split import SplitConfig

WHERE = (
    "put products, queries and judgments (and interactions, if you have them) as .parquet, .csv or "
    ".csv.gz into one folder and pass it as --data; models/schemas.py lists the columns"
)
_KINDS = ("parquet", "csv", "csv.gz")
_OPTIONAL = "interactions"


def files(source: TablesSource, folder: Path) -> list[Path]:
    """The files `read` opens."""
    return list(paths(folder).values())


def read(
    source: TablesSource, folder: Path, split: SplitConfig
) -> tuple[dict[str, pa.Table | pd.DataFrame], dict[str, str]]:
    """Tables (loose columns, for `cleaning.clean`) and notes.

    Raises:
        DataContractError: a file is missing or unreadable, or lacks a column.
    """
    tables: dict[str, pa.Table | pd.DataFrame] = {}
    for name, path in paths(folder).items():
        required = [field.name for field in TABLES[name] if not field.nullable]
        if path.suffix == ".parquet":
            tables[name] = reading.read_parquet(path, required)
        else:
            tables[name] = reading.read_csv(path, required, source.encoding)
    if source.grade_offset:
        tables["judgments"] = _shifted(tables["judgments"], source.grade_offset)
    return tables, {"rules": "default", "quality": _quality(tables["products"])}


def paths(folder: Path) -> dict[str, Path]:
    """The file of each table in `folder`; interactions only where there are some.

    Raises:
        DataContractError: another table is missing.
    """
    wanted = {name: reading.variants(name, _KINDS) for name in TABLES}
    optional = reading.find(folder, wanted.pop(_OPTIONAL))
    found = reading.require(folder, wanted, WHERE)
    return found | ({_OPTIONAL: optional} if optional else {})


def _shifted(table: pa.Table | pd.DataFrame, offset: int) -> pd.DataFrame:
    frame = table.to_pandas() if isinstance(table, pa.Table) else table
    frame = frame.assign(grade=pd.to_numeric(frame["grade"], errors="coerce") + offset)
    if "rater_grades" in frame:
        frame["rater_grades"] = [_raters(cell, offset) for cell in frame["rater_grades"]]
    return frame


def _raters(cell: Any, offset: int) -> Any:
    """The raters' grades shifted; a cell that is no list of numbers is left to be refused."""
    try:
        grades = json.loads(cell) if isinstance(cell, str) else cell
        return [grade + offset for grade in grades]
    except (TypeError, ValueError):
        return cell


def _quality(products: pa.Table | pd.DataFrame) -> str:
    names = products.column_names if isinstance(products, pa.Table) else list(products.columns)
    measured = [name for name in ("sales", "rating") if name in names]
    return f"measured: {' and '.join(measured)}" if measured else "none: no sales, no ratings"
