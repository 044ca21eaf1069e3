"""The served index: a LanceDB table with vectors, text and a full-text index.

Consumes product texts and a function that embeds them -> produces a folder with one table, measured
against the exact index before anyone may publish it.

Shapes: N products, Q queries, D dim, k results. Distances are cosine; scores are 1 - distance.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from models.errors import ArtifactError, ConfigError, explain
from models.index.exact import ExactIndex, recall_against
from models.store import Store
from models.text import product_text, terms
from models.types import MetricSink, Product

if TYPE_CHECKING:
    from lancedb.table import Table

log = logging.getLogger(__name__)
TABLE = "products"
Encode = Callable[[Sequence[str]], np.ndarray]
"""Product texts [N] -> unit vectors [N, D] float32; see `embedder.encoder.document_encoder`."""
Kind = Literal["auto", "exact", "ivf_flat", "ivf_sq", "ivf_pq", "hnsw_sq"]
EXACT_BELOW = 20_000
"""Rows below which a scan (30 ms) needs no index (measured, ours)."""
SQ_FROM = 200_000
"""Rows from which scalar quantisation pays: at 1M a build is as quick and a search half as long."""


class IndexConfig(BaseModel):
    """How the index is built, and what it must reach."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind = "auto"
    """auto: exact below 20k rows, IVF_FLAT below 200k, IVF_SQ with refinement above."""
    min_recall: float = Field(default=0.97, ge=0, le=1)
    """Gate: recall@10 against the exact index, on a sample. Below it nothing is published."""
    sample: int = Field(default=200, ge=1)
    """Vectors searched for that measurement."""
    batch_size: int = Field(default=512, ge=1)
    """Products embedded and written at once."""
    refine: int = Field(default=5, ge=1)
    """Results re-ranked with the full vectors, as a multiple of k (quantised kinds only)."""
    full_text: bool = True
    """Whether a full-text index over title, brand, category and attributes is built."""
    max_text_chars: int = Field(default=400, ge=20)
    """Product text is cut here, in characters."""
    seed: int = 0


class LanceIndex:
    """A folder that `build_index` wrote, opened for searching."""

    def __init__(self, table: Table, refine: int = 5) -> None:
        self.table = table
        self.refine = refine

    @classmethod
    def open(cls, folder: Path, refine: int = 5) -> LanceIndex:
        """Open `folder`; other processes' writes are seen at once.

        Raises:
            ArtifactError: no index there.
        """
        import lancedb

        if not (folder / f"{TABLE}.lance").is_dir():
            raise ArtifactError(
                explain(f"no {TABLE}.lance in {folder}", "an index folder", "build the index again")
            )
        connection = lancedb.connect(str(folder), read_consistency_interval=timedelta(0))
        return cls(connection.open_table(TABLE), refine)

    def __len__(self) -> int:
        return int(self.table.count_rows())

    def search(
        self, vectors_QD: np.ndarray, k: int, where: str | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Product ids and cosines, best first; `where` is SQL over the columns, applied first."""
        found = [self._one(vector, k, where) for vector in np.asarray(vectors_QD, np.float32)]
        return [ids for ids, _ in found], [scores for _, scores in found]

    def _one(self, vector: np.ndarray, k: int, where: str | None) -> tuple[list[str], list[float]]:
        query = self.table.search(vector, vector_column_name="vector", query_type="vector")
        query = query.distance_type("cosine").select(["product_id", "_distance"]).limit(k)
        query = query.refine_factor(self.refine)
        if where is not None:
            query = query.where(where, prefilter=True).maximum_nprobes(0)
        rows = query.to_arrow()
        return rows["product_id"].to_pylist(), [1.0 - d for d in rows["_distance"].to_pylist()]

    def search_text(self, query: str, k: int) -> list[tuple[str, float]]:
        """(product id, BM25 score), best first; nothing for a query without words."""
        if not terms(query):
            return []
        rows = (
            self.table.search(_words(query), query_type="fts")
            .select(["product_id", "_score"])
            .limit(k)
            .to_arrow()
        )
        return list(zip(rows["product_id"].to_pylist(), rows["_score"].to_pylist(), strict=True))

    def search_hybrid(self, query: str, vector_D: np.ndarray, k: int) -> list[tuple[str, float]]:
        """(product id, reciprocal-rank score) of both channels together, best first."""
        from lancedb.rerankers import RRFReranker

        vector_D = np.asarray(vector_D, np.float32)
        if not terms(query):
            ids, scores = self.search(vector_D[None], k)
            return list(zip(ids[0], scores[0], strict=True))
        rows = (
            self.table.search(query_type="hybrid", vector_column_name="vector")
            .vector(vector_D)
            .text(_words(query))
            .distance_type("cosine")
            .rerank(RRFReranker())
            .limit(k)
            .to_arrow()
        )
        scores = rows["_relevance_score"].to_pylist()
        return list(zip(rows["product_id"].to_pylist(), scores, strict=True))[:k]

    def products(self, ids: Sequence[str]) -> dict[str, Product]:
        """The stored products behind `ids`, by id; unknown ids are left out."""
        if not ids:
            return {}
        listed = ", ".join("'" + i.replace("'", "''") + "'" for i in ids)
        columns = ["product_id", "title", "brand", "category", "price"]
        query = self.table.search().where(f"product_id IN ({listed})").select(columns)
        return {row["product_id"]: Product(**row) for row in query.limit(len(ids)).to_list()}

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """All product ids [N] and vectors [N, D], in catalogue order."""
        rows = self.table.search().select(["product_id", "row", "vector"]).limit(None).to_arrow()
        order = np.argsort(rows["row"].to_numpy(), kind="stable")
        flat = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors_ND = flat.reshape(len(rows), -1)[order]
        ids = rows["product_id"].to_pylist()
        return [ids[i] for i in order], vectors_ND

    def unindexed_rows(self) -> int:
        """Rows no vector index covers: searched by a scan. All of them for an exact index."""
        names = [i.name for i in self.table.list_indices() if "vector" in i.columns]
        if not names:
            return len(self)
        stats = self.table.index_stats(names[0])
        return int(stats.num_unindexed_rows) if stats is not None else len(self)


def _words(query: str) -> str:
    """The query without the characters a query language would read as its own."""
    return "".join(c if c.isalnum() or c in ".-'" else " " for c in query)


def resolve_kind(kind: Kind, num_rows: int) -> Kind:
    """The kind that "auto" stands for at this size.

    >>> resolve_kind("auto", 5_000), resolve_kind("auto", 50_000), resolve_kind("auto", 1_000_000)
    ('exact', 'ivf_flat', 'ivf_sq')
    """
    if kind != "auto":
        return kind
    if num_rows < EXACT_BELOW:
        return "exact"
    return "ivf_flat" if num_rows < SQ_FROM else "ivf_sq"


def build_index(
    encode: Encode,
    products: Store | Iterable[Product],
    config: IndexConfig,
    out: Path,
    sink: MetricSink,
    queries_QD: np.ndarray | None = None,
) -> dict[str, Any]:
    """Embed the catalogue in batches into a LanceDB table under `out`, index it, and measure it.

    Args:
        encode: product texts -> unit vectors.
        queries_QD: real query vectors to measure with; None: a sample of the products' own
            vectors, with a little noise.

    Returns:
        kind, rows, dim, recall_at_10, latency_p50_ms, latency_p95_ms, unindexed_rows, build_s,
        encode_s; the numbers are also logged as `index/...`.

    Raises:
        ConfigError: no products, or recall@10 below `min_recall`; the folder is left for a look.
    """
    import lancedb

    items = products.product_by_id.values() if isinstance(products, Store) else products
    total = len(products.product_by_id) if isinstance(products, Store) else None
    stream = _Stream(encode, items, config, total)
    out.mkdir(parents=True, exist_ok=True)
    connection = lancedb.connect(str(out), read_consistency_interval=timedelta(0))
    shutil.rmtree(out / f"{TABLE}.lance", ignore_errors=True)
    table = connection.create_table(TABLE, data=stream.reader())
    started = time.perf_counter()
    kind = resolve_kind(config.kind, table.count_rows())
    _index_vectors(table, kind)
    if config.full_text:
        from lancedb.index import FTS

        table.create_index("text", config=FTS(with_position=False))
    build_s = time.perf_counter() - started
    index = LanceIndex(table, config.refine)
    report: dict[str, Any] = {"kind": kind, "rows": len(index), "dim": stream.dim}
    report |= {"encode_s": stream.encode_s, "build_s": build_s}
    report |= measure(index, config, queries_QD)
    sink.log({f"index/{k}": float(v) for k, v in report.items() if k != "kind"})
    _gate(report, config)
    return report


def _batches(items: Iterable[Product], size: int) -> Iterator[tuple[Product, ...]]:
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


class _Stream:
    """Products -> record batches with vectors, one batch in memory at a time."""

    def __init__(
        self, encode: Encode, items: Iterable[Product], config: IndexConfig, total: int | None
    ) -> None:
        self.batches: Iterator[tuple[Product, ...]] = _batches(items, config.batch_size)
        self.encode, self.config, self.total = encode, config, total
        self.encode_s = 0.0
        self.dim = 0

    def reader(self) -> pa.RecordBatchReader:
        from tqdm.auto import tqdm

        first = next(self.batches, None)
        if first is None:
            raise ConfigError(explain("no products", "a catalogue", "check the ingest stage"))
        head = self._record(first, 0)

        def rest() -> Iterator[pa.RecordBatch]:
            with tqdm(total=self.total, desc="index: embedding products", unit="product") as bar:
                yield head
                bar.update(len(head))
                for batch in self.batches:
                    yield self._record(batch, bar.n)
                    bar.update(len(batch))

        return pa.RecordBatchReader.from_batches(head.schema, rest())

    def _record(self, batch: Sequence[Product], offset: int) -> pa.RecordBatch:
        started = time.perf_counter()
        texts = [product_text(p, self.config.max_text_chars) for p in batch]
        vectors_ND = np.ascontiguousarray(self.encode(texts), dtype=np.float32)
        self.encode_s += time.perf_counter() - started
        self.dim = vectors_ND.shape[1]
        vector_type = pa.list_(pa.float32(), self.dim)
        columns = {
            "row": pa.array(range(offset, offset + len(batch)), pa.int64()),
            "product_id": pa.array([p.product_id for p in batch], pa.string()),
            "title": pa.array([p.title for p in batch], pa.string()),
            "brand": pa.array([p.brand for p in batch], pa.string()),
            "category": pa.array([p.category for p in batch], pa.string()),
            "price": pa.array([p.price for p in batch], pa.float64()),
            "text": pa.array(texts, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors_ND.reshape(-1)), type=vector_type
            ),
        }
        return pa.RecordBatch.from_pydict(columns)


def _index_vectors(table: Table, kind: Kind) -> None:
    from lancedb.index import HnswSq, IvfFlat, IvfPq, IvfSq

    makers = {"ivf_flat": IvfFlat, "ivf_sq": IvfSq, "ivf_pq": IvfPq, "hnsw_sq": HnswSq}
    if kind != "exact":
        table.create_index("vector", config=makers[kind](distance_type="cosine"))


def measure(
    index: LanceIndex, config: IndexConfig, queries_QD: np.ndarray | None = None
) -> dict[str, float]:
    """Recall@10 against the exact index, search latency in ms, and rows outside the index."""
    ids, vectors_ND = index.vectors()
    if queries_QD is None:
        rng = np.random.default_rng(config.seed)
        rows = rng.permutation(len(ids))[: config.sample]
        noise = rng.normal(0.0, 0.1 / np.sqrt(vectors_ND.shape[1]), vectors_ND[rows].shape)
        queries_QD = vectors_ND[rows] + noise
    queries_QD = np.asarray(queries_QD[: config.sample], np.float32)
    exact, _ = ExactIndex(ids, vectors_ND).search(queries_QD, 10)
    found, times_ms = [], []
    for query_1D in np.split(queries_QD, len(queries_QD)):
        started = time.perf_counter()
        found += index.search(query_1D, 10)[0]
        times_ms.append(1000 * (time.perf_counter() - started))
    return {
        "recall_at_10": recall_against(found, exact),
        "latency_p50_ms": float(np.percentile(times_ms, 50)),
        "latency_p95_ms": float(np.percentile(times_ms, 95)),
        "unindexed_rows": float(index.unindexed_rows()),
    }


def _gate(report: dict[str, Any], config: IndexConfig) -> None:
    if report["recall_at_10"] < config.min_recall:
        raise ConfigError(
            explain(
                f"recall@10 {report['recall_at_10']:.3f} of the {report['kind']} index against "
                "the exact one",
                f"at least {config.min_recall}",
                "use kind ivf_flat or exact, raise refine, or lower min_recall knowingly",
            )
        )
