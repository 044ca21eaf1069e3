"""The Wayfair annotation data set (WANDS), as published.

Consumes query.csv, product.csv and label.csv (tab separated) -> produces products, queries and
judgments. Ratings are Wayfair's own, so the quality score needs no proxy.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from models.sources import WandsSource, proxies, reading
from models.split import SplitConfig

WHERE = (
    "copy dataset/query.csv, dataset/product.csv and dataset/label.csv of the repository "
    "wayfair/WANDS into one folder and pass it as --data"
)
GRADES: dict[str, int] = {"Irrelevant": 1, "Partial": 3, "Exact": 4}
"""Label -> grade; WANDS has no counterpart of grade 2."""
_MAX_ATTRIBUTES = 12
_MAX_VALUE = 80


def files(source: WandsSource, folder: Path) -> list[Path]:
    """The files `read` opens."""
    return list(_paths(folder).values())


def read(
    source: WandsSource, folder: Path, split: SplitConfig
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Tables (loose columns, for `cleaning.clean`) and notes.

    Raises:
        DataContractError: a file is missing or unreadable, or lacks a column.
    """
    paths = _paths(folder)
    queries = reading.read_csv(paths["query"], ["query_id", "query"], separator="\t")
    products = reading.read_csv(paths["product"], ["product_id", "product_name"], separator="\t")
    labels = reading.read_csv(paths["label"], ["query_id", "product_id", "label"], separator="\t")
    texts = queries["query"]
    tables = {
        "products": _products(products),
        "queries": pd.DataFrame(
            {
                "query_id": queries["query_id"],
                "text": texts,
                "segment": [proxies.segment(t) if isinstance(t, str) else None for t in texts],
            }
        ),
        "judgments": pd.DataFrame(
            {
                "query_id": labels["query_id"],
                "product_id": labels["product_id"],
                "grade": labels["label"].str.strip().map(GRADES),
            }
        ),
    }
    notes = {
        "rules": "default",
        "quality": "measured: ratings",
        "segments": proxies.SEGMENT_NOTE,
    }
    return tables, notes


def _paths(folder: Path) -> dict[str, Path]:
    return reading.require(
        folder, {name: reading.variants(name) for name in ("query", "product", "label")}, WHERE
    )


def _products(rows: pd.DataFrame) -> pd.DataFrame:
    def column(name: str) -> pd.Series:
        return rows[name] if name in rows else pd.Series(None, index=rows.index, dtype=object)

    path = column("category hierarchy").fillna(column("product_class"))
    return pd.DataFrame(
        {
            "product_id": rows["product_id"],
            "title": rows["product_name"],
            "description": column("product_description"),
            "category": path.astype("str")
            .where(path.notna())
            .str.replace(r"\s*/\s*", " > ", regex=True),
            "attributes": [_features(text) for text in column("product_features")],
            "rating": column("average_rating"),
            "rating_count": column("rating_count"),
        }
    )


def _features(text: object) -> list[tuple[str, str]] | None:
    """ "name : value|name:value" -> pairs, the first of a name, at most _MAX_ATTRIBUTES.

    >>> _features("color : blue|color:red|legs:4|broken")
    [('color', 'blue'), ('legs', '4')]
    """
    if not isinstance(text, str):
        return None
    found: dict[str, str] = {}
    for part in text.split("|"):
        name, colon, value = part.partition(":")
        if colon and name.strip() and value.strip():
            found.setdefault(name.strip(), value.strip()[:_MAX_VALUE])
    return list(found.items())[:_MAX_ATTRIBUTES]
