"""Builds an index: rows streamed into a table, indexes trained, and all of it measured.

Consumes products and a function that embeds their texts -> produces a folder with one LanceDB table
(vectors, words, and scalar indexes over id, brand, category and price), its facts and its probes.
One batch of products is in memory at a time.

Shapes: N products, P probes, D dim.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import ConfigError, explain
from models.index.config import RQ_MULTIPLE, IndexConfig, Kind, resolve_kind
from models.index.facts import FACTS, IndexFacts
from models.index.lance import TABLE, LanceIndex, connect, open_table
from models.index.nearest import NearestProducts
from models.index.recall import check, measure, percentiles
from models.index.rows import Encode, RowStream, cut, shortened
from models.store import Store
from models.types import MetricSink, Product

if TYPE_CHECKING:
    from lancedb.table import Table

SCALARS = ("product_id", "brand", "category", "price")
"""Columns with a B-tree: equality, ranges and sets of values."""


def build_index(
    encode: Encode,
    products: Store | Iterable[Product],
    config: IndexConfig,
    out: Path,
    sink: MetricSink,
    queries_QD: np.ndarray | None = None,
    total: int | None = None,
    earlier: Path | None = None,
) -> IndexFacts:
    """Embed the catalogue in batches into a LanceDB table under `out`, index it, and measure it.

    Args:
        encode: product texts -> unit vectors.
        queries_QD: real query vectors to measure with; None: a sample of the products' own
            vectors, with a little noise.
        total: number of products, for the progress bar.
        earlier: folder of an index built with the same encoder; its vectors serve again wherever
            a product's text is the same.

    Returns:
        what was measured; the numbers are also logged as `index/...`.

    Raises:
        ConfigError: no products, or the gate of `recall.check`; the folder is left for a look.
    """
    if config.dim is not None:
        check_width(config.kind, config.dim)  # before hours of embedding
    if isinstance(products, Store):
        total = products.products.num_rows
    stream = RowStream(
        shortened(encode, config.dim),
        products.product_by_id.values() if isinstance(products, Store) else products,
        config.batch_size,
        config.max_text_chars,
        config.sample,
        config.seed,
        total,
        None if earlier is None else open_table(earlier),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / FACTS).unlink(missing_ok=True)  # without it the folder is no index: written last
    shutil.rmtree(out / f"{TABLE}.lance", ignore_errors=True)
    table = connect(out).create_table(TABLE, data=stream.reader())
    kind = resolve_kind(config.kind, stream.rows)
    started = time.perf_counter()
    index_all(table, kind, config)
    build_s = time.perf_counter() - started
    probes_PD = stream.probes() if queries_QD is None else queries_QD[: config.sample]
    probes_PD = cut(probes_PD, config.dim)
    facts, _ = measured_facts(table, kind, config, np.asarray(probes_PD, np.float32))
    facts = facts.model_copy(
        update={
            "encoded_rows": stream.encoded,
            "encode_s": stream.encode_s,
            "build_s": build_s,
        }
    )
    facts.write(out, np.asarray(probes_PD, np.float32))
    sink.log({f"index/{name}": value for name, value in facts.numbers().items()})
    check(facts, stream.rows)
    return facts


def index_all(table: Table, kind: Kind, config: IndexConfig) -> None:
    """Every index of a table that has none."""
    from lancedb.index import FTS, BTree

    index_vectors(table, kind)
    if config.full_text:
        table.create_index("text", config=FTS(with_position=False))
    for column in SCALARS:
        table.create_index(column, config=BTree())


def check_width(kind: Kind, dim: int) -> None:
    """Refuse vectors of a width that an index of this kind cannot hold.

    Raises:
        ConfigError: it cannot.
    """
    if kind == "ivf_rq" and dim % RQ_MULTIPLE:
        multiple = f"a multiple of {RQ_MULTIPLE}"
        raise ConfigError(explain(f"kind ivf_rq and {dim} dimensions", multiple, "set index.dim"))


def index_vectors(table: Table, kind: Kind) -> None:
    """Train the vector index from nothing, in place of the one there is.

    Raises:
        ConfigError: a kind that cannot index vectors of this width.
    """
    from lancedb.index import HnswSq, IvfFlat, IvfPq, IvfRq, IvfSq

    check_width(kind, table.schema.field("vector").type.list_size)
    options: dict[str, Any] = {"distance_type": "cosine"}
    makers = {"ivf_flat": IvfFlat, "ivf_sq": IvfSq, "ivf_pq": IvfPq, "ivf_hnsw_sq": HnswSq}
    if kind == "ivf_rq":
        table.create_index("vector", config=IvfRq(num_bits=4, **options))
    elif kind != "exact":
        table.create_index("vector", config=makers[kind](**options))


def measured_facts(
    table: Table,
    kind: Kind,
    config: IndexConfig,
    probes_PD: np.ndarray,
    trained_rows: int | None = None,
    rows_since: int = 0,
    setting: tuple[int, int] | None = None,
    known: NearestProducts | None = None,
) -> tuple[IndexFacts, NearestProducts]:
    """Measure a table that is ready to be searched; the exact neighbours come with the facts.

    trained_rows, rows_since: as in `IndexFacts`; None: trained now, on all rows.
    setting, known: as in `measure`.
    """
    started = time.perf_counter()
    rows = int(table.count_rows())
    found = measure(LanceIndex(table), kind, config, probes_PD, setting, known)
    facts = IndexFacts(
        kind=kind,
        rows=rows,
        dim=probes_PD.shape[1],
        nprobes=found.nprobes,
        refine=found.refine,
        recall_at_10=found.recall_at_10,
        recall_at_100=found.recall_at_100,
        **percentiles(found.times_ms),
        unindexed_rows=found.unindexed_rows,
        trained_rows=rows if trained_rows is None else trained_rows,
        rows_since=rows_since,
        probes=found.probes,
        trials=found.trials,
        measure_s=time.perf_counter() - started,
        config=config,
    )
    return facts, found.nearest
