"""Champions and the published index agree, whatever moves them and wherever that breaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lancedb.table import LanceTable

from models.errors import ConfigError
from models.index.build import build_index
from models.index.config import IndexConfig, RefreshConfig
from models.types import Product
from tasks import publish as module
from tasks import registry
from tasks.artifacts import ArtifactRef
from tasks.publish import open_published, published, refresh
from tasks.release import (
    Action,
    Release,
    finish_pending,
    promote,
    release_of,
    rollback,
    serve_champion,
)
from tasks.stage import StageContext, stage
from tests.releases import STORE, artifacts, champion_labels, labels, make_release


def encode(texts: Sequence[str]) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=6) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@stage(name="index", kind="index")
def small_index(
    ctx: StageContext, config: IndexConfig, encoder: ArtifactRef, store: ArtifactRef
) -> dict[str, float]:
    """A real index of twelve products that carry the encoder's number."""
    mark = (ctx.open(encoder) / "embedder.txt").read_text()
    rows = [Product(f"p{i}", f"{mark} thing{i}") for i in range(12)]
    build_index(encode, rows, config, ctx.out, ctx.sink)
    return {"recall_at_10": 1.0}


class Crash(BaseException):
    """A process that dies."""


def crown(candidate: Release) -> None:
    """Promote against the champion of this moment."""
    now = release_of(STORE, "champion", artifacts=artifacts())
    promote(STORE, candidate, now, Action.PROMOTED, "why", artifacts=artifacts())


def agree(release: Release) -> None:
    """`release` is champion and its index the one that answers a search."""
    assert champion_labels() == labels(release)
    now = published(STORE, artifacts=artifacts())
    assert now is not None and now.origin.fingerprint == release.fingerprints["index"]
    index, weights = open_published(STORE, artifacts=artifacts())
    mark = (Path(weights) / "embedder.txt").read_text()
    assert index.products(["p3"])["p3"].title == f"{mark} thing3"


def breaking(monkeypatch: pytest.MonkeyPatch, role: str, error: type[BaseException]) -> None:
    """The next alias of `role` is not set: the process breaks before it."""
    real = registry.set_alias

    def set_alias(name: str, *args: Any, **more: Any) -> None:
        if name == f"{STORE}-{role}":
            monkeypatch.setattr(registry, "set_alias", real)
            raise error(role)
        real(name, *args, **more)

    monkeypatch.setattr(registry, "set_alias", set_alias)


def test_promotion_rollback_and_repair_leave_them_in_agreement(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (make_release(judge=n, index_by=small_index) for n in (0, 1))
    breaking(monkeypatch, "judge", OSError)
    with pytest.raises(OSError, match="judge"):
        crown(old)
    assert published(STORE, artifacts=artifacts()) is None, "no champion, nothing served"
    crown(old)
    agree(old)
    breaking(monkeypatch, "judge", OSError)
    with pytest.raises(OSError, match="judge"):
        crown(new)
    agree(old)
    breaking(monkeypatch, "embedder", Crash)
    with pytest.raises(Crash):
        crown(new)
    assert champion_labels() not in (labels(old), labels(new))
    finish_pending(STORE, artifacts=artifacts())
    agree(new)
    breaking(monkeypatch, "judge", Crash)
    with pytest.raises(Crash):
        rollback(STORE, artifacts=artifacts())
    finish_pending(STORE, artifacts=artifacts())
    agree(old)
    rollback(STORE, "2", artifacts=artifacts())
    agree(new)
    (home / "published").rename(home / "lost")
    assert published(STORE, artifacts=artifacts()) is None
    serve_champion(STORE, artifacts=artifacts())
    agree(new)


def test_refreshes_outlive_a_failed_promotion_and_a_way_there_and_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (make_release(judge=n, index_by=small_index) for n in (0, 1))
    crown(old)
    (tmp_path / "products.csv").write_text("product_id,title\np1,renamed\n")
    monkeypatch.setattr(module, "_lazy_encoder", lambda *_: encode)
    refresh(STORE, tmp_path, RefreshConfig(), artifacts=artifacts())

    def title() -> str:
        return open_published(STORE, artifacts=artifacts())[0].products(["p1"])["p1"].title

    real = module.publish

    def fails(*_: Any, **__: Any) -> Any:
        raise ConfigError("does not pass its gate")

    monkeypatch.setattr(module, "publish", fails)
    with pytest.raises(ConfigError, match="does not pass"):
        crown(new)
    agree(old)
    assert title() == "renamed"
    monkeypatch.setattr(module, "publish", real)
    crown(new)
    agree(new)
    assert title() == "1 thing1" and "without 1 refreshes" in caplog.text
    caplog.clear()
    rollback(STORE, artifacts=artifacts())
    agree(old)
    assert title() == "renamed" and "without" not in caplog.text


def test_a_clean_up_that_fails_takes_no_promotion_back(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = (make_release(judge=n, index_by=small_index) for n in (0, 1))
    crown(old)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("tagged versions have been marked for cleanup")

    monkeypatch.setattr(LanceTable, "optimize", fails)
    crown(new)
    agree(new)
    assert "marked for cleanup" in caplog.text


def test_a_rollback_to_an_index_that_is_no_longer_kept_counts_what_that_one_loses_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (make_release(judge=n, index_by=small_index) for n in range(3))
    monkeypatch.setattr(module, "_lazy_encoder", lambda *_: encode)

    def refresh_with(*titles: str) -> None:
        for title in titles:
            (tmp_path / "products.csv").write_text(f"product_id,title\np1,{title}\n")
            refresh(STORE, tmp_path, RefreshConfig(), artifacts=artifacts())

    crown(first)
    refresh_with("one", "two")
    crown(second)
    crown(third)
    refresh_with("three", "four", "five")
    caplog.clear()
    rollback(STORE, "1", artifacts=artifacts())
    agree(first)
    index, _ = open_published(STORE, artifacts=artifacts())
    assert index.products(["p1"])["p1"].title == "0 thing1"
    assert "without 5 refreshes" in caplog.text
