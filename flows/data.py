"""Data: source files -> ingest -> validate -> a split store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect import flow

from flows.recipes import DataConfig
from models.errors import ConfigError, explain
from models.sources import digest
from tasks.artifacts import ArtifactRef
from tasks.ingest import ingest, validate_store
from tasks.settings import settings
from tasks.stage import reading_from


@flow(name="prepare-data", flow_run_name="data", log_prints=False)
def prepare_data(config: DataConfig) -> ArtifactRef:
    """Read the store, set faulty rows aside, validate, split by query."""
    content = digest(config.source, settings().data_dir)
    raw = ingest(source=config.source, split=config.split, content=content)
    return validate_store(raw=raw, quality=config.quality)


@contextmanager
def data_folder(given: str | Path | None) -> Iterator[None]:
    """`settings()` names the folder `given` inside: circumstance, so no part of a config.

    given: None: the folder stays what it was.

    Raises:
        ConfigError: there is no such folder on this machine.
    """
    if given is None:
        yield
        return
    folder = Path(given).expanduser()
    if not folder.is_dir():
        got = f"data {given} on this machine"
        raise ConfigError(explain(got, "a folder of source files", "fix the path"))
    before = os.environ.get("RELEARN_DATA_DIR")
    os.environ["RELEARN_DATA_DIR"] = str(folder.resolve())
    try:
        with reading_from(folder.resolve()):
            yield
    finally:
        del os.environ["RELEARN_DATA_DIR"]
        if before is not None:
            os.environ["RELEARN_DATA_DIR"] = before
