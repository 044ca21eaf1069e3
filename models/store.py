"""A store on disk and in memory: the four tables of `models/schemas.py`.

Consumes a directory of parquet files -> produces a `Store`, and the other way round. Tables stay
columnar; rows become `Product`, `Query` and `Pair` values only where a model needs them.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import DataContractError, explain
from models.schemas import TABLES
from models.types import Category, Pair, Product, Query, Verdicts

SPLITS: tuple[str, str, str] = ("train", "validation", "test")


@dataclass(frozen=True)
class Store:
    """Tables in the schemas of `models/schemas.py`; `interactions` may be empty.

    notes: facts every report must repeat, e.g. {"quality": "proxy: ..."} or {"rules": "homedepot"}.
    """

    products: pa.Table
    queries: pa.Table
    judgments: pa.Table
    interactions: pa.Table
    notes: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write one parquet file a table and notes.json into `folder` (made if missing)."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            pq.write_table(getattr(self, name), folder / f"{name}.parquet", compression="zstd")
        (folder / "notes.json").write_text(json.dumps(dict(self.notes), indent=1, sort_keys=True))

    @classmethod
    def read(cls, folder: Path) -> Store:
        """Read what `write` wrote.

        Raises:
            DataContractError: a table is missing or has another schema.
        """
        tables: dict[str, pa.Table] = {}
        for name, schema in TABLES.items():
            path = folder / f"{name}.parquet"
            if not path.is_file():
                raise DataContractError(
                    explain(f"no {path.name} in {folder}", "a store", "run ingest again")
                )
            table = pq.read_table(path)
            if table.schema.names != schema.names:
                raise DataContractError(
                    explain(f"columns {table.schema.names} in {path}", schema.names, "re-ingest")
                )
            tables[name] = table
        notes = json.loads((folder / "notes.json").read_text())
        return cls(**tables, notes=notes)

    @functools.cached_property
    def product_by_id(self) -> dict[str, Product]:
        """Every product, by id, in catalogue order."""
        return {p.product_id: p for p in to_products(self.products)}

    @functools.cached_property
    def query_by_id(self) -> dict[str, Query]:
        """Every query, by id, in table order."""
        return {q.query_id: q for q in _queries(self.queries)}

    def query_ids(self, split: str) -> list[str]:
        """Ids of the queries of one split, in table order."""
        mask = pc.equal(self.queries["split"], split)
        return self.queries.filter(mask)["query_id"].to_pylist()

    def pairs(self, split: str | None = None) -> list[Pair]:
        """Labelled pairs (of one split), in table order."""
        table = self.judgments
        if split is not None:
            keep = pa.array(self.query_ids(split), pa.string())
            table = table.filter(pc.is_in(table["query_id"], keep))
        return [
            Pair(
                query=self.query_by_id[row["query_id"]],
                product=self.product_by_id[row["product_id"]],
                grade=row["grade"],
                verdicts=_verdicts(row),
                weight=1.0 if row["weight"] is None else row["weight"],
                reasoning=row["reasoning"] or "",
                raters=statistics.fmean(row["rater_grades"]) if row["rater_grades"] else None,
            )
            for row in table.to_pylist()
        ]

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """{query_id: {product_id: grade}} of one split; queries without judgments are left out."""
        wanted = set(self.query_ids(split))
        out: dict[str, dict[str, int]] = {}
        table = self.judgments.select(["query_id", "product_id", "grade"])
        for q, p, g in zip(*(c.to_pylist() for c in table.columns), strict=True):
            if q in wanted:
                out.setdefault(q, {})[p] = g
        return out


def _verdicts(row: Mapping[str, Any]) -> Verdicts | None:
    if row["verdict_category"] is None:
        return None
    attributes = tuple((a["name"], a["holds"]) for a in row["verdict_attributes"] or ())
    return Verdicts(Category(row["verdict_category"]), attributes)


def stream_products(folder: Path, batch_size: int = 4096) -> tuple[Iterator[Product], int]:
    """The products of a written store, read a batch at a time, and how many there are."""
    source = pq.ParquetFile(folder / "products.parquet")
    batches = source.iter_batches(batch_size)
    return (p for batch in batches for p in to_products(batch)), source.metadata.num_rows


def stream_queries(folder: Path) -> Iterator[Query]:
    """The queries of a written store, without reading its other tables."""
    yield from _queries(pq.read_table(folder / "queries.parquet"))


def to_products(table: pa.Table | pa.RecordBatch) -> Iterator[Product]:
    """Rows of a products table as values, in order."""
    for row in table.drop_columns(["updated_at"]).to_pylist():
        row["attributes"] = dict(row["attributes"] or ())
        for name in ("description", "brand", "category"):
            row[name] = row[name] or ""
        yield Product(**row)


def _queries(table: pa.Table) -> Iterable[Query]:
    for row in table.to_pylist():
        frequency = 1.0 if row["frequency"] is None else row["frequency"]
        yield Query(row["query_id"], row["text"], row["segment"] or "general", frequency)
