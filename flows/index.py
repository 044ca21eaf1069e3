"""The published index, kept fresh between two trainings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, task

from flows.data import data_folder, prepare_data
from flows.recipes import csv_encoding
from flows.scheduled import RUN_NAME, Chain
from models.errors import ConfigError, explain
from models.index.config import RefreshConfig
from models.index.published import Publication
from tasks.artifacts import ArtifactStore
from tasks.publish import published, refresh, refresh_to, undo_refresh
from tasks.registry import nothing_of
from tasks.release import finish_pending
from tasks.settings import prepare_environment, settings
from tasks.stage import MlflowSink, current_settings, pipeline

Apply = Callable[..., tuple[Any, Any]]


@flow(name="refresh", log_prints=False)
def refresh_published(
    name: str, config: RefreshConfig | None = None, encoding: str = "utf-8"
) -> dict[str, Any]:
    """Apply the products delta in the data folder to the published index of store `name`.

    encoding: of a CSV.

    Returns:
        version, rows, recall_at_10, latency_p50_ms and the counts of `RefreshCounts`.
    """
    folder = settings().data_dir
    if folder is None:
        raise ConfigError(explain("no data folder", "a folder with the delta", "pass --data DIR"))
    with pipeline(f"refresh {name}", experiment=name) as current:
        return _refreshed(name, refresh, folder, config, current.run_id, encoding=encoding)


@flow(name="refresh-index", flow_run_name=RUN_NAME)
def refresh_index(chain: Chain, delta: str | None = None) -> dict[str, Any]:
    """Bring the published index up to date with changed products.

    delta: folder on the machine that runs the flow, with changed rows as products.parquet or .csv;
    an empty one means that nothing changed; CSV in `data.source.encoding`. None: the products of
    today's whole catalogue that the index lacks or holds otherwise, and those that it holds no
    more, unless these are more than `refresh.max_deleted` of what is served.

    Returns:
        as `refresh_published`; of an empty delta folder the version alone.

    Raises:
        ArtifactError: nothing is published. ConfigError: no such folder, too much to delete.
    """
    prepare_environment(settings())
    config = chain.config
    _require_published(config.name)
    if delta is None:
        with data_folder(chain.data), pipeline(f"refresh {config.name}", config.name) as current:
            today = prepare_data(config.data)
            return _refreshed(config.name, refresh_to, today, config.refresh, current.run_id)
    folder = Path(delta).expanduser()
    if not folder.is_dir():
        got = f"delta {delta} on this machine"
        raise ConfigError(explain(got, "a folder with the delta", "fix the path"))
    with pipeline(f"refresh {config.name}", config.name) as current:
        if not any(folder.iterdir()):
            current_version = _require_published(config.name)
            return {"version": current_version, "delta": f"{folder} is empty: nothing changed"}
        encoding = csv_encoding(config.data.source)
        return _refreshed(
            config.name, refresh, folder, config.refresh, current.run_id, encoding=encoding
        )


def take_back_refresh(name: str) -> Publication:
    """Serve the published index of store `name` as it was before its last refresh.

    Raises:
        ArtifactError: as `undo_refresh`.
    """
    with pipeline(f"undo refresh {name}", experiment=name) as current:
        artifacts = ArtifactStore(settings().model_copy(update={"experiment": name}))
        finish_pending(name, artifacts=artifacts)
        served = undo_refresh(name, artifacts=artifacts)
        sink = MlflowSink(artifacts.client, current.run_id)
        sink.log({"index/version": float(served.version), "index/rows": float(served.facts.rows)})
        sink.flush()
    return served


def _require_published(name: str) -> int:
    """The served version.

    Raises:
        ArtifactError: nothing is published.
    """
    artifacts = ArtifactStore(current_settings().model_copy(update={"experiment": name}))
    finish_pending(name, artifacts=artifacts)
    served = published(name, artifacts=artifacts)
    if served is None:
        raise nothing_of(name, "published index", store=artifacts)
    return served.version


def _refreshed(
    name: str, apply: Apply, source: Any, config: RefreshConfig | None, run_id: str, **how: str
) -> dict[str, Any]:
    """Apply `source` to the index of `name`, with the run's numbers in MLflow; `how` it is read."""
    run = task(name="refresh_index", persist_result=False)(apply)
    artifacts = ArtifactStore(settings().model_copy(update={"experiment": name}))
    finish_pending(name, artifacts=artifacts)
    sink = MlflowSink(artifacts.client, run_id)
    config = config or RefreshConfig()
    made, counts = run(name, source, config, artifacts=artifacts, sink=sink, **how)
    sink.flush()
    facts = made.facts
    return {
        "version": made.version,
        "rows": facts.rows,
        "recall_at_10": facts.recall_at_10,
        "latency_p50_ms": facts.latency_p50_ms,
        **asdict(counts),
    }
