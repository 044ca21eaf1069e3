"""Home Depot Product Search Relevance, as published on Kaggle (2016).

Consumes train.csv and test.csv (plain or .gz, latin-1), and where present product_descriptions.csv
and attributes.csv -> produces products, queries and judgments. The products of the unlabelled
test.csv join the catalogue; its queries are left out, since nobody knows their grades. The one
rater grade is the mean rating mapped linearly from 1..3 to 1..4.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from models.sources import HomeDepotSource, proxies, reading
from models.split import SplitConfig

WHERE = (
    "download train.csv.zip and test.csv.zip of the Kaggle competition "
    "home-depot-product-search-relevance, unpack them, and pass their folder as --data"
)
GRADE_BOUNDS: tuple[float, float, float] = (1.5, 2.0, 2.5)
"""Mean rating r in 1..3 -> grade 1: r <= 1.5, 2: r <= 2.0, 3: r <= 2.5, 4: above."""

_TRAIN, _TEST = reading.variants("train"), reading.variants("test")
_DESCRIPTIONS = reading.variants("product_descriptions")
_ATTRIBUTES = reading.variants("attributes")
_MAX_ATTRIBUTES = 12
_MOJIBAKE = re.compile("[\u00c2-\u00f4][\u0080-\u00bf\u20ac\u201a-\u2122\u0152-\u0178]")

_PUBLISHED = {
    "\u00e5\u00a1": "\u00b0",
    "\u00e8_": "\u00b0",
    "\u0089\u00db\u00aa": "\u2019",
    "\u0089\u00db\u00f7": "\u2018",
    "\u0089\u00db\u00d2": "\u2013",
    "\u0089\u00db\u00dc": "\u201c",
    "\u0089\u00db\u0090": "-",
    "\u0089\u00e3\u00a2": "\u2122",
    "\u00e5\u00ca": " ",
}
"""Damage done before publication (degree sign, quotes, dashes), by what the files hold instead."""
_DAMAGED = re.compile("|".join(map(re.escape, _PUBLISHED)))


def grades(relevance: pd.Series) -> pd.Series:
    """Grade 1..4 of a mean rating 1..3 by GRADE_BOUNDS; NaN outside 1..3."""
    grade = pd.Series(np.searchsorted(GRADE_BOUNDS, relevance, side="left") + 1.0)
    return grade.where(relevance.between(1, 3).to_numpy())


def repair(text: str) -> str:
    """Undo the damage the files were published with, and UTF-8 read as latin-1 or cp1252.

    Anything that does not round-trip is kept as it is.

    >>> repair("90\u00e5\u00a1 elbow"), repair("caf\u00c3\u00a9"), repair("caf\u00e9")
    ('90° elbow', 'café', 'café')
    """
    text = _DAMAGED.sub(lambda found: _PUBLISHED[found.group()], text)
    if not _MOJIBAKE.search(text):
        return text
    for codec in ("latin-1", "cp1252"):
        try:
            return text.encode(codec).decode("utf-8")
        except UnicodeError:
            continue
    return text


def files(source: HomeDepotSource, folder: Path) -> list[Path]:
    """The files `read` opens: train and test, and the optional two where they exist."""
    return list(_paths(folder).values())


def read(
    source: HomeDepotSource, folder: Path, split: SplitConfig
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Tables (loose columns, for `cleaning.clean`) and notes.

    Raises:
        DataContractError: a file is missing or unreadable, or lacks a column.
    """
    paths = _paths(folder)
    columns = ["product_uid", "product_title", "search_term"]
    train = reading.read_csv(paths["train"], [*columns, "relevance"], "latin-1")
    test = reading.read_csv(paths["test"], columns, "latin-1")
    for frame in (train, test):
        for column in ("product_title", "search_term"):
            frame[column] = _repaired(frame[column])
    tables = {
        "products": _products(pd.concat([train, test], ignore_index=True), paths, split),
        "queries": proxies.queries(train["search_term"]),
        "judgments": _judgments(train),
    }
    notes = {
        "rules": "homedepot",
        "quality": proxies.JUDGED_POPULARITY_NOTE,
        "segments": proxies.SEGMENT_NOTE,
    }
    return tables, notes


def _paths(folder: Path) -> dict[str, Path]:
    found = reading.require(folder, {"train": _TRAIN, "test": _TEST}, WHERE)
    extra = {"descriptions": _DESCRIPTIONS, "attributes": _ATTRIBUTES}
    return found | {k: p for k, names in extra.items() if (p := reading.find(folder, names))}


def _repaired(texts: pd.Series) -> pd.Series:
    broken = texts.str.contains(r"[^\x00-\x7f]", na=False, regex=True)
    return texts.where(~broken, texts[broken].map(repair).reindex(texts.index))


def _products(rows: pd.DataFrame, paths: dict[str, Path], split: SplitConfig) -> pd.DataFrame:
    popularity = proxies.judged_popularity(rows["search_term"], rows["product_uid"], split)
    frame = rows[["product_uid", "product_title"]].drop_duplicates()
    frame = frame.rename(columns={"product_uid": "product_id", "product_title": "title"})
    frame["sales"] = frame["product_id"].map(popularity)
    if "descriptions" in paths:
        table = reading.read_csv(
            paths["descriptions"], ["product_uid", "product_description"], "latin-1"
        ).drop_duplicates("product_uid")
        texts = _repaired(table["product_description"]).set_axis(table["product_uid"])
        frame["description"] = frame["product_id"].map(texts)
    if "attributes" in paths:
        table = reading.read_csv(paths["attributes"], ["product_uid", "name", "value"], "latin-1")
        frame = _with_attributes(frame, table.dropna(subset=["product_uid", "name", "value"]))
    return frame


def _with_attributes(frame: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Brand from "MFG Brand Name"; the first named attributes ("Bullet.." texts left out)."""
    table = table.assign(value=_repaired(table["value"]))
    brands = table[table["name"] == "MFG Brand Name"].drop_duplicates("product_uid")
    frame["brand"] = frame["product_id"].map(brands.set_index("product_uid")["value"])
    rest = table[~table["name"].str.startswith("Bullet") & (table["name"] != "MFG Brand Name")]
    rest = rest.drop_duplicates(["product_uid", "name"])
    rest = rest[rest.groupby("product_uid").cumcount() < _MAX_ATTRIBUTES]
    pairs = pd.Series(list(zip(rest["name"], rest["value"], strict=True)), index=rest.index)
    frame["attributes"] = frame["product_id"].map(pairs.groupby(rest["product_uid"]).agg(list))
    return frame


def _judgments(train: pd.DataFrame) -> pd.DataFrame:
    relevance = pd.to_numeric(train["relevance"], errors="coerce")
    rescaled = 1.0 + (relevance - 1.0) * 1.5
    return pd.DataFrame(
        {
            "query_id": proxies.ids(train["search_term"]),
            "product_id": train["product_uid"],
            "grade": grades(relevance),
            "rater_grades": [None if np.isnan(r) else [float(r)] for r in rescaled],
        }
    )
