"""Raw store files -> a validated, split store."""

from __future__ import annotations

import pyarrow.parquet as pq

from models.errors import DataContractError, explain
from models.schemas import QUARANTINE_FILE
from models.sources import SourceConfig
from models.split import SplitConfig
from models.store import Store
from tasks.artifacts import ArtifactRef
from tasks.quality import QualityConfig
from tasks.stage import StageContext, stage


def open_store(ctx: StageContext, ref: ArtifactRef) -> Store:
    """The store inside an ingest or validate artifact."""
    return Store.read(ctx.open(ref) / "store")


@stage(name="ingest", kind="data", code_version="5")
def ingest(
    ctx: StageContext, source: SourceConfig, split: SplitConfig, content: str
) -> dict[str, float]:
    """Read the source files, set faulty rows aside, and split the queries by their hash.

    content: digest of the source files, so that changed files are a changed artifact.

    Raises:
        DataContractError: they are not those of `content` any more.
    """
    from dataclasses import replace

    from models.sources import digest, load
    from models.sources.cleaning import refusals
    from models.split import assign

    loaded = load(source, ctx.settings.data_dir, split)
    if digest(source, ctx.settings.data_dir) != content:
        got = f"source files of {source.kind} that changed while they were read"
        do = "let the export move finished files into place, then run again"
        raise DataContractError(explain(got, "files at rest", do))
    judged = set(loaded.store.judgments["query_id"].to_pylist())
    try:
        queries = assign(loaded.store.queries, split, judged)
    except DataContractError as error:
        if not loaded.quarantine.num_rows:
            raise
        why = f"{error}. Rows were refused: {refusals(loaded.quarantine)}"
        raise DataContractError(why) from None
    store = replace(loaded.store, queries=queries)
    store.write(ctx.out / "store")
    pq.write_table(loaded.quarantine, ctx.out / QUARANTINE_FILE)
    counts = {name: getattr(store, name).num_rows for name in ("products", "queries", "judgments")}
    ctx.table("store", [counts | {"quarantined": loaded.quarantine.num_rows, **store.notes}])
    return {f"rows/{k}": v for k, v in counts.items()}


@stage(name="validate", kind="data", code_version="1")
def validate_store(ctx: StageContext, raw: ArtifactRef, quality: QualityConfig) -> dict[str, float]:
    """Great Expectations over every table; a failed blocking expectation stops the flow."""
    from tasks.quality import validate

    folder = ctx.open(raw)
    store = Store.read(folder / "store")
    quarantine = pq.read_table(folder / QUARANTINE_FILE)
    validate(store, quarantine, quality, ctx.out)
    ctx.markdown("validation", (ctx.out / "report.md").read_text(encoding="utf-8"))
    store.write(ctx.out / "store")
    return {"quarantined": quarantine.num_rows}
