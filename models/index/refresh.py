"""A delta of the catalogue applied to the published index.

Consumes the published version, changed products and deleted ids -> produces the next version. A row
whose text did not change keeps its vector; a row in which nothing changed is not written at all.
What is nearest to the probes is known from before and follows the delta: the gate scans nothing.

An interrupted refresh goes on where it stopped: rows already merged count as unchanged. Anything
else that was begun and not published is left behind by starting from the published version.

Shapes: N rows, D dim.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.errors import ArtifactError, ConfigError, explain
from models.files import replace_text
from models.index.build import index_vectors, measured_facts
from models.index.config import RefreshConfig, resolve_kind
from models.index.facts import IndexFacts
from models.index.filters import one_of
from models.index.lance import open_table, vector_index_stats
from models.index.nearest import NearestProducts
from models.index.published import Publication, PublishedIndex
from models.index.recall import check
from models.index.reuse import Known, known_of, vectors_of
from models.index.rows import Encode, batches, columns, record_batch, shortened
from models.sources.cleaning import refusals
from models.sources.delta import Delta
from models.types import MetricSink, Product

if TYPE_CHECKING:
    from lancedb.table import Table

log = logging.getLogger(__name__)
NEVER = timedelta(days=36_500)
"""`optimize` removes old versions as well, after seven days by itself; `published.py` does that."""
Changes = Callable[[Publication], Delta]
"""The delta that a served version needs."""


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
    """Rows of the delta, or product rows of the catalogue, that were set aside: faulty ones, whose
    product stays as it is served, and those of a delta that a later row replaces."""
    encode_s: float = 0.0

    @property
    def written(self) -> int:
        """Rows inserted or replaced."""
        return self.inserted + self.updated


def refresh(
    published: PublishedIndex,
    delta: Delta | Changes,
    encoder_of: Callable[[str], Encode],
    config: RefreshConfig,
    sink: MetricSink,
) -> tuple[Publication, RefreshCounts]:
    """Apply `delta` to the published index and serve the result, once it passes the gate.

    Functions given are called under the lock, for the version that the result is built on: a move
    of what is served comes before or after, never between. They must not write to `published`.

    encoder_of: `Origin.encoder` -> the encoder the index was built with; another one would mix two
    vector spaces.

    Raises:
        ArtifactError: nothing is published. ConfigError: nothing would be left, or the gate.
    """
    with published.writing():
        base = published.current()
        if base is None:
            got = f"nothing published in {published.folder}"
            raise ArtifactError(explain(got, "an index to refresh", "run `relearn run` first"))
        if not isinstance(delta, Delta):
            delta = delta(base)
        counts = RefreshCounts(refused=delta.quarantine.num_rows)
        if counts.refused:
            said = refusals(delta.quarantine)
            log.warning("rows are set aside, what is served of faulty ones stays: %s", said)
        work = f"refresh {delta.digest} over {base.version}"
        made = published.finished(work)
        if made is None:
            started = time.perf_counter()
            table, resumed = _writable(published, base, work)
            rows_before = int(table.count_rows())
            encode = shortened(encoder_of(base.origin.encoder), base.facts.config.dim)
            probes_PD = published.probes(base.version)
            # what an interrupted refresh wrote is not followed, so nothing is known after it
            nearest = NearestProducts(probes_PD) if resumed else published.nearest(base.version)
            _merge(table, delta.products, base.facts, encode, config.batch_size, counts, nearest)
            _delete(table, delta.deleted, counts, nearest)
            if not (resumed or counts.written or counts.deleted):
                published.pending.unlink()
                log.info("the delta changes nothing: version %d stays", base.version)
                return base, counts
            # what an interrupted refresh wrote is not in the counts: all of it may have been
            since = base.facts.rows_since + (len(delta.products) if resumed else counts.written)
            facts, nearest = _indexed(table, base.facts, since, config, nearest)
            seconds = time.perf_counter() - started - counts.encode_s - facts.measure_s
            spent = {"encode_s": counts.encode_s, "build_s": seconds}
            facts = facts.model_copy(update={"encoded_rows": counts.encoded} | spent)
            check(facts, rows_before + counts.inserted - counts.deleted)
            deltas = (*base.deltas, delta.digest)
            made = published.record(table, base.origin, deltas, work, facts, probes_PD, nearest)
        published.serve(made, sink)
    sink.log({f"refresh/{k}": float(v) for k, v in dataclasses.asdict(counts).items()})
    return made, counts


def _writable(published: PublishedIndex, base: Publication, work: str) -> tuple[Table, bool]:
    """The newest version, made equal to the published one unless it holds a part of this work."""
    table = open_table(published.folder)
    held = published.held(base.version)
    begun = published.pending.is_file() and published.pending.read_text(encoding="utf-8") == work
    if begun and table.version != held:  # else it wrote nothing, and the record there is another's
        log.info("going on with an interrupted refresh")
        return table, True
    if table.version != held:
        table.checkout(held)
        table.restore()
    replace_text(published.pending, work)
    return table, False


def _merge(
    table: Table,
    products: Sequence[Product],
    facts: IndexFacts,
    encode: Encode,
    size: int,
    counts: RefreshCounts,
    nearest: NearestProducts,
) -> None:
    def timed(texts: Sequence[str]) -> np.ndarray:
        started = time.perf_counter()
        vectors_ND = encode(texts)
        counts.encode_s += time.perf_counter() - started
        return vectors_ND

    for batch in batches(products, size):
        rows = [columns(p, facts.config.max_text_chars) for p in batch]
        old, known = _stored(table, [row["product_id"] for row in rows])
        changed = [row for row in rows if old.get(row["product_id"]) != row]
        counts.unchanged += len(rows) - len(changed)
        counts.updated += sum(row["product_id"] in old for row in changed)
        counts.inserted += sum(row["product_id"] not in old for row in changed)
        if changed:
            vectors_ND, encoded = vectors_of(changed, known, timed, facts.dim)
            counts.encoded += encoded
            data = pa.Table.from_batches([record_batch(changed, vectors_ND)])
            merge = table.merge_insert("product_id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(data)
            nearest.replace([row["product_id"] for row in changed], vectors_ND)


def _stored(table: Table, ids: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Known]]:
    """The rows behind `ids` as `rows.columns` writes them, and their vectors, by id."""
    found = table.search().where(one_of("product_id", ids)).limit(len(ids)).to_arrow()
    rows = found.drop_columns(["vector"]).to_pylist()
    return {row["product_id"]: row for row in rows}, known_of(found)


def _delete(
    table: Table, ids: Sequence[str], counts: RefreshCounts, nearest: NearestProducts
) -> None:
    nearest.remove(ids)
    remaining = iter(ids)
    while part := list(islice(remaining, 1000)):
        gone = int(table.delete(one_of("product_id", part)).num_deleted_rows)
        counts.deleted += gone
        counts.absent += len(part) - gone


def _indexed(
    table: Table,
    before: IndexFacts,
    since: int,
    config: RefreshConfig,
    nearest: NearestProducts,
) -> tuple[IndexFacts, NearestProducts]:
    """Compact, take new rows into the indexes, train the vector index anew where it must; measure.

    since: rows written since the vector index was trained. nearest: as it is after the delta; what
    the index was measured against comes back.

    Raises:
        ConfigError: no rows are left.
    """
    rows = int(table.count_rows())
    if rows == 0:
        got = "a delta that deletes every product"
        raise ConfigError(explain(got, "some products left", "check the delta"))
    kind, probes_PD = resolve_kind(before.config.kind, rows), nearest.probes_PD
    measured = partial(measured_facts, table, kind, before.config)
    table.optimize(cleanup_older_than=NEVER)
    stats = vector_index_stats(table)
    if kind == "exact":
        for index in table.list_indices():
            if "vector" in index.columns:
                table.drop_index(index.name)
        return measured(probes_PD, known=nearest)
    worn = since > config.rebuild_share * before.trained_rows
    worn |= stats is None or kind != before.kind or (stats.num_indices or 1) > config.max_parts
    if not worn:
        trained = before.trained_rows, since
        served = _served_with(before)
        facts, nearest = measured(probes_PD[: config.probes], *trained, served, nearest)
        if facts.recall_at_10 < before.config.min_recall:  # by so few probes: maybe by chance
            facts, nearest = measured(probes_PD, *trained, served, nearest)
        if facts.recall_at_10 < before.config.min_recall:
            facts, nearest = measured(probes_PD, *trained, known=nearest)
        if facts.recall_at_10 >= before.config.min_recall:
            return facts, nearest
        log.info("recall@10 fell to %.3f: training the vector index anew", facts.recall_at_10)
    index_vectors(table, kind)
    return measured(probes_PD, known=nearest)


def _served_with(facts: IndexFacts) -> tuple[int, int] | None:
    """(nprobes, refine) of a vector index, None of a scan."""
    if facts.nprobes is None or facts.refine is None:
        return None
    return facts.nprobes, facts.refine
