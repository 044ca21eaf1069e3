"""The served index: a LanceDB table of products, opened for searching.

Consumes a folder that `build.build_index` wrote, or a version of the published table -> produces
product ids and scores: by vector, by words, or both, within filters.

Shapes: N products, Q queries, D dim, k results. Distances are cosine; scores are 1 - distance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import ArtifactError, ConfigError, explain
from models.fusion import reciprocal_rank_fusion
from models.index.facts import IndexFacts
from models.index.filters import one_of
from models.index.rows import cut, schema, to_product
from models.text import terms
from models.types import Product

if TYPE_CHECKING:
    from lancedb import DBConnection
    from lancedb.table import Table

TABLE = "products"
FUSED_DEPTH = 100
"""Results of each channel that hybrid search fuses, at least."""
QUERIES_AT_ONCE = 32
"""Query vectors sent to LanceDB together: a third of the time of one by one."""
SCANNED_ROWS = 8192
"""Rows in memory at once when all vectors are read."""


def connect(folder: Path | str) -> DBConnection:
    """The LanceDB connection of a folder, or of a URI such as s3://bucket/path, reached as AWS_* in
    the environment says; other processes' writes are seen at once."""
    import lancedb

    return lancedb.connect(str(folder), read_consistency_interval=timedelta(0))


class LanceIndex:
    """A table opened for searching.

    Args:
        nprobes: partitions searched; None: LanceDB's default (or a scan, without a vector index).
        refine: multiple of k re-ranked with the full vectors; None: no re-ranking.
        dim: numbers of a query vector that count; None: all.
    """

    def __init__(
        self,
        table: Table,
        nprobes: int | None = None,
        refine: int | None = None,
        dim: int | None = None,
    ) -> None:
        self.table, self.nprobes, self.refine, self.dim = table, nprobes, refine, dim

    @classmethod
    def open(cls, folder: Path | str) -> LanceIndex:
        """The newest version of the table in a folder or at a URI, searched as its facts say.

        Raises:
            ArtifactError: no index there.
        """
        table = open_table(folder)
        facts, _ = IndexFacts.read(folder)
        return cls(table, facts.nprobes, facts.refine, facts.config.dim)

    def with_setting(self, nprobes: int | None, refine: int | None) -> LanceIndex:
        """The same table, searched with another effort."""
        return LanceIndex(self.table, nprobes, refine, self.dim)

    def __len__(self) -> int:
        return int(self.table.count_rows())

    def search(
        self, vectors_QD: np.ndarray, k: int, where: str | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Product ids and cosines, best first; `where` is SQL over the columns, applied first.

        Further partitions are searched until k rows are found, so a filter that few rows satisfy
        still gets all of them.

        Raises:
            ConfigError: k below 1, or a query vector without a direction: zero, NaN or infinite.
        """
        _check_k(k)
        vectors_QD = np.asarray(vectors_QD, np.float32)
        _check_lengths(vectors_QD[:, : self.dim])
        vectors_QD = cut(vectors_QD, self.dim)
        ids: list[list[str]] = []
        scores: list[list[float]] = []
        for start in range(0, len(vectors_QD), QUERIES_AT_ONCE):
            block_BD = vectors_QD[start : start + QUERIES_AT_ONCE]
            rows = self._query(block_BD, k, where).to_arrow()
            found = rows["product_id"].to_numpy(zero_copy_only=False)
            cosine = 1.0 - rows["_distance"].to_numpy()
            if len(block_BD) == 1:
                ids.append(found.tolist())
                scores.append(cosine.tolist())
                continue
            owner = rows["query_index"].to_numpy()
            for i in range(len(block_BD)):
                own = np.flatnonzero(owner == i)
                own = own[np.argsort(-cosine[own], kind="stable")]
                ids.append(found[own].tolist())
                scores.append(cosine[own].tolist())
        return ids, scores

    def _query(self, block_BD: np.ndarray, k: int, where: str | None) -> Any:
        vectors = block_BD[0] if len(block_BD) == 1 else list(block_BD)
        query = self.table.search(vectors, vector_column_name="vector", query_type="vector")
        query = query.distance_type("cosine").select(["product_id", "_distance"]).limit(k)
        if self.nprobes is not None:
            query = query.minimum_nprobes(self.nprobes)
        query = query.maximum_nprobes(0)
        if self.refine is not None:
            query = query.refine_factor(self.refine)
        return query if where is None else query.where(where, prefilter=True)

    def search_text(self, query: str, k: int, where: str | None = None) -> list[tuple[str, float]]:
        """(product id, BM25 score), best first; nothing for a query without words.

        Raises:
            ConfigError: k below 1, or an index without full text.
        """
        _check_k(k)
        if not self._has_full_text:
            do = "search by vector, or build it with full_text=true"
            raise ConfigError(explain("an index without full text", "one with it", do))
        if not terms(query):
            return []
        search = self.table.search(_words(query), query_type="fts")
        search = search.select(["product_id", "_score"]).limit(k)
        if where is not None:
            search = search.where(where, prefilter=True)
        rows = search.to_arrow()
        return list(zip(rows["product_id"].to_pylist(), rows["_score"].to_pylist(), strict=True))

    @functools.cached_property
    def _has_full_text(self) -> bool:
        return any(index.index_type == "FTS" for index in self.table.list_indices())

    def search_hybrid(
        self, query: str, vector_D: np.ndarray, k: int, where: str | None = None
    ) -> list[tuple[str, float]]:
        """(product id, reciprocal-rank score) of both channels together, best first.

        Raises:
            ConfigError: as `search` and `search_text`.
        """
        _check_k(k)
        depth = max(k, FUSED_DEPTH)
        by_vector, _ = self.search(np.asarray(vector_D, np.float32)[None], depth, where)
        by_words = [product_id for product_id, _ in self.search_text(query, depth, where)]
        return reciprocal_rank_fusion([by_vector[0], by_words], k)

    def products(self, ids: Sequence[str]) -> dict[str, Product]:
        """The stored products behind `ids`, by id; unknown ids are left out."""
        if not ids:
            return {}
        stored = [name for name in schema(1).names if name not in ("text", "text_hash", "vector")]
        query = self.table.search().where(one_of("product_id", ids)).select(stored)
        return {row["product_id"]: to_product(row) for row in query.limit(len(ids)).to_list()}

    def vector_batches(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids [B], vectors [B, D]) of all rows, in the table's order, a batch at a time."""
        query = self.table.search().select(["product_id", "vector"]).limit(None)
        for batch in query.to_batches(SCANNED_ROWS):
            if len(batch):
                flat = batch.column("vector").flatten().to_numpy(zero_copy_only=False)
                yield batch.column("product_id").to_pylist(), flat.reshape(len(batch), -1)

    def vectors(self) -> tuple[list[str], np.ndarray]:
        """All product ids [N], ascending, and their vectors [N, D]; in memory."""
        parts = list(self.vector_batches())
        ids = np.concatenate([np.array(ids, object) for ids, _ in parts])
        order = np.argsort(ids, kind="stable")
        vectors_ND = np.concatenate([vectors_BD for _, vectors_BD in parts])
        return ids[order].tolist(), vectors_ND[order]

    def unindexed_rows(self) -> int:
        """Rows no vector index covers: searched by a scan. All of them for an exact index."""
        stats = vector_index_stats(self.table)
        return len(self) if stats is None else int(stats.num_unindexed_rows)


def open_table(folder: Path | str) -> Table:
    """The products table of a folder or a URI, at its newest version.

    Raises:
        ArtifactError: none there.
    """
    nothing = ArtifactError(
        explain(f"no {TABLE}.lance in {folder}", "an index folder", "build the index again")
    )
    if isinstance(folder, Path) and not (folder / f"{TABLE}.lance").is_dir():
        raise nothing
    try:
        return connect(folder).open_table(TABLE)
    except ValueError as error:
        if "was not found" in str(error):
            raise nothing from None
        raise


def vector_index_stats(table: Table) -> Any:
    """LanceDB's statistics of the vector index, None when there is none."""
    names = [i.name for i in table.list_indices() if "vector" in i.columns]
    return table.index_stats(names[0]) if names else None


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(explain(f"k = {k}", "at least 1", "ask for one result or more"))


def _check_lengths(vectors_QD: np.ndarray) -> None:
    """Refuse vectors that LanceDB finds nothing for, or anything."""
    with np.errstate(over="ignore", invalid="ignore"):
        length_Q = np.linalg.norm(vectors_QD, axis=1)
    wrong = np.flatnonzero(~(np.isfinite(length_Q) & (length_Q > 0)))
    if len(wrong):
        got = f"query vector {wrong[0]} (from 0) of length {length_Q[wrong[0]]:g}"
        do = "look at what embedded it: an encoder of a training that diverged gives such vectors"
        raise ConfigError(explain(got, "a finite length above 0", do))


def _words(query: str) -> str:
    """The query without the characters a query language would read as its own."""
    return "".join(c if c.isalnum() or c in ".-'" else " " for c in query)
