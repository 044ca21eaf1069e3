"""The Chorus electronics shop: Icecat products, judgments 0..3 with single raters.

Consumes 1..4.json(.zip), Broad_Query_Set_rated.csv and, where present,
Broad_Query_Set_individual_ratings.csv -> produces products, queries and judgments. Prices are in
cents. A rated product that is not in the product files is quarantined as dangling.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.errors import DataContractError, explain
from models.sources import ChorusSource, proxies, reading
from models.split import SplitConfig

WHERE = (
    "copy data/*.json.zip and the two Broad_Query_Set csv files of the repository o19s/chorus "
    "into one folder and pass it as --data"
)
GRADES: dict[int, int] = {0: 1, 1: 2, 2: 3, 3: 4}
"""Rating 0..3 -> grade."""
ATTRIBUTES: dict[str, str] = {
    "attr_t_product_type": "product type",
    "attr_t_type": "type",
    "attr_t_product_colour": "colour",
    "attr_t_brand_compatibility": "fits brand",
    "attr_t_compatibility": "fits",
    "attr_t_print_technology": "print technology",
    "attr_t_connector_1": "connector",
    "attr_n_cable_length": "cable length",
    "attr_t_processor_family": "processor",
    "attr_n_internal_memory": "memory",
    "attr_n_display_diagonal": "display diagonal",
    "attr_n_quantity_per_pack": "pieces",
    "attr_t_material": "material",
}
"""Icecat attribute -> our name; the ones that tell products of a kind apart."""
_MAX_VALUE = 80
"""Attribute values longer than this (lists of compatible printers) are cut, in characters."""
_INDIVIDUAL = ("Broad_Query_Set_individual_ratings.csv",)


def files(source: ChorusSource, folder: Path) -> list[Path]:
    """The files `read` opens."""
    return list(_paths(folder).values())


def read(
    source: ChorusSource, folder: Path, split: SplitConfig
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Tables (loose columns, for `cleaning.clean`) and notes.

    Raises:
        DataContractError: a file is missing or unreadable, or lacks a column.
    """
    paths = _paths(folder)
    rated = reading.read_csv(paths["rated"], ["query", "docid", "rating"])
    raters = None
    if "raters" in paths:
        raters = reading.read_csv(paths["raters"], ["query", "docid", "agent_1_rating"])
    rows = [row for part in "1234" for row in _products_of(paths[part])]
    tables = {
        "products": _products(rows),
        "queries": proxies.queries(rated["query"]),
        "judgments": _judgments(rated, raters),
    }
    notes = {
        "rules": "default",
        "quality": "proxy: sales = years between the store's oldest release and the product's",
        "segments": proxies.SEGMENT_NOTE,
    }
    return tables, notes


def _paths(folder: Path) -> dict[str, Path]:
    wanted = {part: reading.variants(part, ("json.zip", "json")) for part in "1234"}
    found = reading.require(folder, {**wanted, "rated": ("Broad_Query_Set_rated.csv",)}, WHERE)
    raters = reading.find(folder, _INDIVIDUAL)
    return found | ({"raters": raters} if raters else {})


def _products_of(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                rows = json.loads(archive.read(archive.namelist()[0]))
        else:
            rows = json.loads(path.read_bytes())
    except (zipfile.BadZipFile, EOFError, IndexError, ValueError) as error:
        raise DataContractError(
            explain(f"{error} in {path}", "a JSON list of products", "copy the file again")
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataContractError(
            explain(f"another JSON value in {path}", "a list of products", "copy the file again")
        )
    return rows


def _products(rows: list[dict[str, Any]]) -> pd.DataFrame:
    released = pd.to_datetime(
        pd.Series([row.get("date_released") for row in rows]), errors="coerce", utc=True
    ).dt.tz_localize(None)
    cents = pd.to_numeric(pd.Series([row.get("price") for row in rows]), errors="coerce")
    return pd.DataFrame(
        {
            "product_id": [row.get("id") for row in rows],
            "title": [row.get("title") or row.get("name") for row in rows],
            "description": [row.get("short_description") for row in rows],
            "brand": [row.get("supplier") for row in rows],
            "attributes": [_attributes(row) for row in rows],
            "price": (cents / 100.0).where(cents > 0),
            "sales": (released - released.min()).dt.days / 365.25,
            "updated_at": released,
        }
    )


def _attributes(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, _shown(row[key])) for key, name in ATTRIBUTES.items() if row.get(key) is not None
    ]


def _shown(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = f"{value:g}" if isinstance(value, float) else " ".join(text.split())
    return text[:_MAX_VALUE]


def _judgments(rated: pd.DataFrame, raters: pd.DataFrame | None) -> pd.DataFrame:
    """`rated` is the list of labels; single raters join it by (query, docid)."""
    frame = pd.DataFrame(
        {
            "query_id": proxies.ids(rated["query"]),
            "product_id": rated["docid"],
            "grade": pd.to_numeric(rated["rating"], errors="coerce").map(GRADES),
        }
    )
    if raters is None:
        return frame
    columns = [c for c in raters.columns if c.startswith("agent_")]
    votes = raters[columns].apply(pd.to_numeric, errors="coerce").replace(GRADES)
    lists = [[float(v) for v in row if not np.isnan(v)] or None for row in votes.to_numpy(float)]
    keys = pd.MultiIndex.from_arrays([proxies.ids(raters["query"]), raters["docid"]])
    known = pd.Series(lists, index=keys, dtype=object)
    known = known[~keys.duplicated()]
    wanted = pd.MultiIndex.from_frame(frame[["query_id", "product_id"]])
    found = known.reindex(wanted).to_list()
    return frame.assign(rater_grades=[v if isinstance(v, list) else None for v in found])
