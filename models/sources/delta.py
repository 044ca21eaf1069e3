"""Changes of a catalogue: products that are new or changed, and ids that are gone.

Consumes products.{parquet,csv,csv.gz} with the columns of `models/schemas.py` and, optionally, a
boolean column `deleted` (such a row needs its product_id alone) -> produces a `Delta`. A row
replaces the product of its id as a whole. Of several rows of one id the last counts, given or
deleted, as in a log of changes; those before it are set aside as `replaced_by_later_row`. Faulty
rows are set aside with a reason as well (`cleaning`). Where the last row of an id is faulty,
nothing is known of what the product is now, and none of its rows counts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from models.errors import DataContractError, explain
from models.schemas import JUDGMENTS, PRODUCTS, QUERIES
from models.sources import reading
from models.sources.cleaning import as_text, check_names, clean, set_aside
from models.store import to_products
from models.text import composed
from models.types import Product

DELETED = "deleted"
REPLACED = "replaced_by_later_row"
"""Why a row is set aside after which another one of its id follows."""
WHERE = "put the changed rows as products.parquet, .csv or .csv.gz into one folder"
_TRUE, _FALSE = {"true", "1", "1.0", "yes", "t", "y"}, {"false", "0", "0.0", "no", "f", "n", ""}


@dataclass(frozen=True)
class Delta:
    """Products to insert or replace, ids to delete, and the rows that were set aside."""

    products: tuple[Product, ...]
    deleted: tuple[str, ...]
    digest: str
    """Names the content: the same file gives the same digest."""
    quarantine: pa.Table


def read_delta(folder: Path, encoding: str = "utf-8") -> Delta:
    """Read one delta.

    Raises:
        DataContractError: no file, unreadable, a column is missing, or `deleted` is no boolean.
    """
    wanted = {"products": reading.variants("products", ("parquet", "csv", "csv.gz"))}
    path = reading.require(folder, wanted, WHERE)["products"]
    raw = _read(path, encoding)
    gone, ids = _gone(raw, path), raw["product_id"].map(_id)
    replaced = ids.duplicated(keep="last") & (ids != "")
    read = [name for name in (*PRODUCTS.names, DELETED) if name in raw]
    earlier = set_aside("products", raw.loc[replaced, read], REPLACED)
    raw, gone, ids = raw[~replaced], gone[~replaced], ids[~replaced]
    deleted = tuple(i for i in ids[gone] if i)
    empty = {"queries": QUERIES.empty_table(), "judgments": JUDGMENTS.empty_table()}
    changed = raw[~gone].drop(columns=[DELETED], errors="ignore")
    if len(changed) and "title" not in changed:
        reading.check_columns(path, list(raw.columns), ["product_id", "title"])
    if "title" not in changed:
        changed = changed.assign(title=None)
    good, quarantine = clean({"products": changed, **empty})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    products = tuple(to_products(good["products"]))
    return Delta(products, deleted, digest, pa.concat_tables([earlier, quarantine]))


def refused_ids(quarantine: pa.Table) -> set[str]:
    """Ids of the products whose rows were set aside, as a store would hold them.

    An id of more than 200 characters is not among them: the quarantine cuts it.
    """
    rows = quarantine.filter(pc.equal(quarantine["table"], "products"))["row"].to_pylist()
    return {_id(json.loads(row)["product_id"]) for row in rows} - {""}


def _read(path: Path, encoding: str) -> pd.DataFrame:
    if path.suffix == ".parquet":
        table = reading.read_parquet(path, ["product_id"])
        for name in ("product_id", DELETED):  # pandas would round long ids and count its own nulls
            if name in table.column_names:
                place = table.column_names.index(name)
                table = table.set_column(place, name, as_text(table[name].combine_chunks()))
        return table.to_pandas(ignore_metadata=True)
    return reading.read_csv(path, ["product_id"], encoding)


def _gone(raw: pd.DataFrame, path: Path) -> pd.Series:
    """[rows] whether the row says that its product is gone."""
    check_names("the delta", list(raw.columns), [*PRODUCTS.names, DELETED])
    if DELETED not in raw:
        return pd.Series(False, index=raw.index)
    texts = raw[DELETED].map(lambda v: "" if pd.isna(v) else v.strip().lower())
    unknown = ~texts.isin(_TRUE | _FALSE)
    if unknown.any():
        got = f"{DELETED} = {raw[DELETED][unknown].iloc[0]!r} in {path}"
        raise DataContractError(explain(got, "true, false or empty", "correct the column"))
    return texts.isin(_TRUE)


def _id(value: Any) -> str:
    """An id as `cleaning` reads it: stripped text; 7.0 is 7."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return composed(str(value)).strip()
