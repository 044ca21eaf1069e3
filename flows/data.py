"""Data: source files -> ingest -> validate -> a split store."""

from __future__ import annotations

from prefect import flow

from flows.recipes import DataConfig
from models.sources import digest
from tasks.artifacts import ArtifactRef
from tasks.ingest import ingest, validate_store
from tasks.settings import settings


@flow(name="prepare-data", flow_run_name="data", log_prints=False)
def prepare_data(config: DataConfig) -> ArtifactRef:
    """Read the store, set faulty rows aside, validate, split by query."""
    content = digest(config.source, settings().data_dir)
    raw = ingest(source=config.source, split=config.split, content=content)
    return validate_store(raw=raw, quality=config.quality)
