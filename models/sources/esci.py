"""Amazon shopping queries (ESCI), as published.

Consumes shopping_queries_dataset_examples.parquet and shopping_queries_dataset_products.parquet, or
any parquet files that hold both already joined (official column names) -> produces products,
queries and judgments of one locale. ESCI's own train/test split is not used: splits are by query.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import DataContractError, explain
from models.sources import EsciSource, proxies, reading
from models.split import SplitConfig

WHERE = (
    "download shopping_queries_dataset_examples.parquet and "
    "shopping_queries_dataset_products.parquet from the repository amazon-science/esci-data "
    "(git lfs) and pass their folder as --data"
)
GRADES: dict[str, int] = {"I": 1, "C": 2, "S": 3, "E": 4}
"""Irrelevant, Complement, Substitute, Exact -> grade. The first letter counts."""

_EXAMPLES = "shopping_queries_dataset_examples.parquet"
_PRODUCTS = "shopping_queries_dataset_products.parquet"
_EXAMPLE_COLUMNS = ["query_id", "query", "product_id", "product_locale", "esci_label"]
_PRODUCT_COLUMNS = ["product_id", "product_locale", "product_title"]
_JOINED_COLUMNS = [*_EXAMPLE_COLUMNS, "product_title"]
_MORE = ["product_description", "product_bullet_point", "product_brand", "product_color"]
_TAG = re.compile(r"<[^<>]{0,200}>")


def files(source: EsciSource, folder: Path) -> list[Path]:
    """The official pair, or else every parquet file that holds both already joined."""
    official = [folder / _EXAMPLES, folder / _PRODUCTS]
    if all(path.is_file() for path in official):
        return official
    joined = [path for path in sorted(folder.glob("*.parquet")) if _is_joined(path)]
    if not joined:
        raise DataContractError(
            explain(
                f"no {_EXAMPLES} with {_PRODUCTS} in {folder}",
                f"these two, or parquet files with {', '.join(_JOINED_COLUMNS)}",
                WHERE,
            )
        )
    return joined


def read(
    source: EsciSource, folder: Path, split: SplitConfig
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Tables (loose columns, for `cleaning.clean`) and notes.

    Raises:
        DataContractError: a file is missing or unreadable, lacks a column, or the locale is absent.
    """
    paths = files(source, folder)
    where = pc.field("product_locale") == source.locale
    official = paths[0].name == _EXAMPLES
    examples = [_read(p, _EXAMPLE_COLUMNS, where) for p in (paths[:1] if official else paths)]
    products = [
        _read(p, _PRODUCT_COLUMNS, where, _MORE) for p in (paths[1:] if official else paths)
    ]
    pairs = pd.concat(examples, ignore_index=True)
    if pairs.empty:
        raise DataContractError(
            explain(f"no row with product_locale {source.locale!r}", "us, es or jp", "set locale")
        )
    tables = {
        "products": _catalogue(pd.concat(products, ignore_index=True), pairs, split),
        "queries": _queries(pairs),
        "judgments": pd.DataFrame(
            {
                "query_id": pairs["query_id"],
                "product_id": pairs["product_id"],
                "grade": pairs["esci_label"].str[:1].map(GRADES),
            }
        ),
    }
    notes = {
        "rules": "default",
        "quality": proxies.JUDGED_POPULARITY_NOTE,
        "segments": proxies.SEGMENT_NOTE,
    }
    return tables, notes


def _is_joined(path: Path) -> bool:
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError):
        return False
    return set(_JOINED_COLUMNS) <= set(names)


def _read(path: Path, required: list[str], where: object, more: list[str] | None = None
          ) -> pd.DataFrame:  # fmt: skip
    table = reading.read_parquet(path, required, where, [*required, *(more or ())])
    return table.to_pandas()


def _queries(pairs: pd.DataFrame) -> pd.DataFrame:
    frame = pairs[["query_id", "query"]].drop_duplicates().rename(columns={"query": "text"})
    frame["segment"] = [proxies.segment(t) if isinstance(t, str) else None for t in frame["text"]]
    return frame


def _catalogue(rows: pd.DataFrame, pairs: pd.DataFrame, split: SplitConfig) -> pd.DataFrame:
    rows = rows.drop_duplicates("product_id")
    blank = pd.Series("", index=rows.index)
    prose = rows.get("product_description", blank).fillna("").str.replace(_TAG, " ", regex=True)
    points = rows.get("product_bullet_point", blank).fillna("")
    colour = rows.get("product_color", blank)
    popularity = proxies.judged_popularity(pairs["query"], pairs["product_id"], split)
    return pd.DataFrame(
        {
            "product_id": rows["product_id"],
            "title": rows["product_title"],
            "description": (prose.str.strip() + "\n" + points).str.strip(),
            "brand": rows.get("product_brand", blank),
            "attributes": [[("colour", c)] if isinstance(c, str) and c else None for c in colour],
            "sales": rows["product_id"].map(popularity),
        }
    )
