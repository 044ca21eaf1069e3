"""A delta of the catalogue applied to the published index.

Consumes the published version, changed products and deleted ids -> produces the next version. A row
whose text did not change keeps its vector; a row in which nothing changed is not written at all.

An interrupted refresh goes on where it stopped: rows already merged count as unchanged. Anything
else that was begun and not published is left behind by starting from the published version.

Shapes: N rows, D dim.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.errors import ArtifactError, ConfigError, explain
from models.index.build import index_vectors, measured_facts
from models.index.config import RefreshConfig, resolve_kind
from models.index.facts import IndexFacts, write_text
from models.index.filters import one_of
from models.index.lance import open_table, vector_index_stats
from models.index.published import Publication, PublishedIndex
from models.index.recall import check
from models.index.rows import Encode, batches, columns, record_batch
from models.sources.delta import Delta
from models.types import MetricSink, Product

if TYPE_CHECKING:
    from lancedb.table import Table

log = logging.getLogger(__name__)
NEVER = timedelta(days=36_500)
"""`optimize` removes old versions as well, after seven days by itself; `published.py` does that."""


@dataclass
class RefreshCounts:
    """What a delta did. After an interruption: what was left to do."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    """Given, but equal in every column."""
    encoded: int = 0
    """Texts embedded."""
    deleted: int = 0
    absent: int = 0
    """Deleted, but not there."""
    refused: int = 0
    """Faulty rows of the delta."""
    encode_s: float = 0.0

    @property
    def written(self) -> int:
        """Rows inserted or replaced."""
        return self.inserted + self.updated


def refresh(
    published: PublishedIndex,
    delta: Delta,
    encode: Encode,
    config: RefreshConfig,
    sink: MetricSink,
) -> tuple[Publication, RefreshCounts]:
    """Apply `delta` to the published index and serve the result, once it passes the gate.

    encode: the encoder the index was built with; another one would mix two vector spaces.

    Raises:
        ArtifactError: nothing is published. ConfigError: nothing would be left, or the gate.
    """
    counts = RefreshCounts(refused=delta.quarantine.num_rows)
    with published.writing():
        base = published.current()
        if base is None:
            got = f"nothing published in {published.folder}"
            raise ArtifactError(explain(got, "an index to refresh", "run `relearn run` first"))
        work = f"refresh {delta.digest} over {base.version}"
        made = published.finished(work)
        if made is None:
            started = time.perf_counter()
            table, resumed = _writable(published, base, work)
            rows_before = int(table.count_rows())
            _merge(table, delta.products, base.facts, encode, config.batch_size, counts)
            _delete(table, delta.deleted, counts)
            if not (resumed or counts.written or counts.deleted):
                log.info("the delta changes nothing: version %d stays", base.version)
                return base, counts
            probes_PD = published.probes(base.version)
            facts = _indexed(table, base.facts, counts, config, probes_PD)
            seconds = time.perf_counter() - started - counts.encode_s - facts.measure_s
            facts = facts.model_copy(update={"encode_s": counts.encode_s, "build_s": seconds})
            check(facts, rows_before + counts.inserted - counts.deleted)
            deltas = (*base.deltas, delta.digest)
            made = published.record(table, base.origin, deltas, work, facts, probes_PD)
        published.serve(made, sink)
    sink.log({f"refresh/{k}": float(v) for k, v in dataclasses.asdict(counts).items()})
    return made, counts


def _writable(published: PublishedIndex, base: Publication, work: str) -> tuple[Table, bool]:
    """The newest version, made equal to the published one unless it holds a part of this work."""
    table = open_table(published.folder)
    if published.pending.is_file() and published.pending.read_text(encoding="utf-8") == work:
        log.info("going on with an interrupted refresh")
        return table, True
    if table.version != base.version:
        table.checkout(base.version)
        table.restore()
    write_text(published.pending, work)
    return table, False


def _merge(
    table: Table,
    products: Sequence[Product],
    facts: IndexFacts,
    encode: Encode,
    size: int,
    counts: RefreshCounts,
) -> None:
    for batch in batches(products, size):
        rows = [columns(p, facts.config.max_text_chars) for p in batch]
        old, vector_of = _stored(table, [row["product_id"] for row in rows])
        changed = [row for row in rows if old.get(row["product_id"]) != row]
        counts.unchanged += len(rows) - len(changed)
        counts.updated += sum(row["product_id"] in old for row in changed)
        counts.inserted += sum(row["product_id"] not in old for row in changed)
        if changed:
            vectors_ND = _vectors(changed, old, vector_of, facts.dim, encode, counts)
            data = pa.Table.from_batches([record_batch(changed, vectors_ND)])
            merge = table.merge_insert("product_id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(data)


def _stored(
    table: Table, ids: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """The rows behind `ids` as `rows.columns` writes them, and their vectors, by id."""
    found = table.search().where(one_of("product_id", ids)).limit(len(ids)).to_arrow()
    flat = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors_ND = flat.reshape(len(found), -1) if len(found) else flat
    rows = found.drop_columns(["vector"]).to_pylist()
    pairs = zip(rows, vectors_ND, strict=True)
    vector_of = {row["product_id"]: vector_D for row, vector_D in pairs}
    return {row["product_id"]: row for row in rows}, vector_of


def _vectors(
    rows: Sequence[dict[str, Any]],
    old: dict[str, dict[str, Any]],
    vector_of: dict[str, np.ndarray],
    dim: int,
    encode: Encode,
    counts: RefreshCounts,
) -> np.ndarray:
    """[N, D]: kept where the text is the stored one, embedded elsewhere."""

    def same_text(row: dict[str, Any]) -> bool:
        stored = old.get(row["product_id"])
        return stored is not None and stored["text_hash"] == row["text_hash"]

    fresh = [i for i, row in enumerate(rows) if not same_text(row)]
    out_ND = np.zeros((len(rows), dim), np.float32)
    for i, row in enumerate(rows):
        if row["product_id"] in vector_of:
            out_ND[i] = vector_of[row["product_id"]]
    if fresh:
        started = time.perf_counter()
        vectors_FD = encode([rows[i]["text"] for i in fresh])
        counts.encode_s += time.perf_counter() - started
        if vectors_FD.shape[1] != dim:
            got = f"an encoder of {vectors_FD.shape[1]} dimensions"
            raise ConfigError(explain(got, f"{dim}, the index's", "publish an index of its own"))
        out_ND[fresh] = vectors_FD
        counts.encoded += len(fresh)
    return out_ND


def _delete(table: Table, ids: Sequence[str], counts: RefreshCounts) -> None:
    remaining = iter(ids)
    while part := list(islice(remaining, 1000)):
        gone = int(table.delete(one_of("product_id", part)).num_deleted_rows)
        counts.deleted += gone
        counts.absent += len(part) - gone


def _indexed(
    table: Table,
    before: IndexFacts,
    counts: RefreshCounts,
    config: RefreshConfig,
    probes_PD: np.ndarray,
) -> IndexFacts:
    """Compact, take new rows into the indexes, train the vector index anew where it must; measure.

    Raises:
        ConfigError: no rows are left.
    """
    rows = int(table.count_rows())
    if rows == 0:
        got = "a delta that deletes every product"
        raise ConfigError(explain(got, "some products left", "check the delta"))
    kind = resolve_kind(before.config.kind, rows)
    table.optimize(cleanup_older_than=NEVER)
    stats, since = vector_index_stats(table), before.rows_since + counts.written
    if kind == "exact":
        for index in table.list_indices():
            if "vector" in index.columns:
                table.drop_index(index.name)
        return measured_facts(table, kind, before.config, probes_PD)
    worn = since > config.rebuild_share * before.trained_rows
    worn |= stats is None or kind != before.kind or (stats.num_indices or 1) > config.max_parts
    if not worn:
        facts = measured_facts(table, kind, before.config, probes_PD, before.trained_rows, since)
        if facts.recall_at_10 >= before.config.min_recall:
            return facts
        log.info("recall@10 fell to %.3f: training the vector index anew", facts.recall_at_10)
    index_vectors(table, kind)
    return measured_facts(table, kind, before.config, probes_PD)
