"""The published index, kept fresh between two trainings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefect import flow, task

from models.errors import ConfigError, explain
from models.index.config import RefreshConfig
from tasks.artifacts import ArtifactStore
from tasks.publish import refresh
from tasks.release import finish_pending
from tasks.settings import settings
from tasks.stage import MlflowSink, pipeline


@flow(name="refresh-index", log_prints=False)
def refresh_index(name: str, config: RefreshConfig | None = None) -> dict[str, Any]:
    """Apply the products delta in the data folder to the published index of store `name`.

    Returns:
        version, rows, recall_at_10, latency_p50_ms and the counts of `RefreshCounts`.
    """
    folder = settings().data_dir
    if folder is None:
        raise ConfigError(explain("no data folder", "a folder with the delta", "pass --data DIR"))
    apply = task(name="refresh_index", persist_result=False)(refresh)
    with pipeline(f"refresh {name}", experiment=name) as current:
        artifacts = ArtifactStore(settings().model_copy(update={"experiment": name}))
        finish_pending(name, artifacts=artifacts)
        sink = MlflowSink(artifacts.client, current.run_id)
        made, counts = apply(
            name, folder, config or RefreshConfig(), artifacts=artifacts, sink=sink
        )
        sink.flush()
    facts = made.facts
    return {
        "version": made.version,
        "rows": facts.rows,
        "recall_at_10": facts.recall_at_10,
        "latency_p50_ms": facts.latency_p50_ms,
        **asdict(counts),
    }
