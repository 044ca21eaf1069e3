"""Asking for a reaction: once a cooldown, once for all it covers, and only where a server hears."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.evaluation.monitor import MonitorConfig, Reaction, Report
from models.sources import EsciSource, SyntheticSource, TablesSource
from tasks import monitor as module
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.monitor import (
    EVENT,
    MONITOR,
    REACTION_LABEL,
    compare_views,
    label_age,
    last_asked,
    react,
    send,
    trained_on,
)
from tasks.release import Release
from tasks.stage import StageContext, stage
from tests.releases import STORE, artifacts, make_release

CONFIG = MonitorConfig()
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CHAIN = {"chain": {"store": "shop"}}


def report(**values: float) -> Report:
    """A pass in which every value that is not named is 0."""
    return Report.of(CONFIG, dict.fromkeys(CONFIG.bounds, 0.0) | values, {})


EMBEDDER = report(query_mmd=1.0)
WHOLE = report(query_new_terms=1.0)
INDEX = report(index_stale_share=1.0)
TOLD = report(label_age_days=99.0)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Reaction]:
    """The reactions that a server was told of."""
    heard: list[Reaction] = []
    monkeypatch.setattr(module, "send", lambda store, reaction, *rest: heard.append(reaction) or 1)
    return heard


def one_pass(found: Report, hours: float, store: str = STORE) -> list[str]:
    """What a pass says that is made `hours` after the first one; a new process each time."""
    kept: ArtifactStore = artifacts()
    run = kept.client.create_run(kept.experiment_id, tags={MONITOR: store}).info.run_id
    now = NOW + timedelta(hours=hours)
    return react(store, found, CONFIG, CHAIN, Release({}), run, now, artifacts=kept)


def test_a_reaction_is_asked_for_once_a_cooldown(home: Path, sent: list[Reaction]) -> None:
    assert one_pass(EMBEDDER, 0) == ["retrain-embedder asked for: query_mmd"]
    (held,) = one_pass(EMBEDDER, 23.9)
    assert "not asked for again before 2026-03-02 12:00 UTC" in held and "query_mmd" in held
    assert sent == [Reaction.RETRAIN_EMBEDDER]
    one_pass(EMBEDDER, 24)
    assert sent == [Reaction.RETRAIN_EMBEDDER] * 2
    # the cooldown runs from the last request, not from a pass that was held
    assert last_asked(STORE, Reaction.RETRAIN_EMBEDDER, artifacts=artifacts()) == NOW + timedelta(1)


def test_the_whole_chain_holds_its_parts_back_and_not_the_other_way(
    home: Path, sent: list[Reaction]
) -> None:
    one_pass(WHOLE, 0)
    assert "not asked for again" in one_pass(EMBEDDER, 1)[0]
    one_pass(EMBEDDER, 25)
    one_pass(WHOLE, 26)
    assert sent == [Reaction.RETRAIN, Reaction.RETRAIN_EMBEDDER, Reaction.RETRAIN]


def test_the_index_has_a_cooldown_of_its_own_and_each_store_too(
    home: Path, sent: list[Reaction]
) -> None:
    one_pass(WHOLE, 0)
    one_pass(INDEX, 0)
    one_pass(INDEX, 0.5)
    one_pass(INDEX, 1)
    one_pass(INDEX, 1, store="other")
    assert sent == [Reaction.RETRAIN, *[Reaction.REFRESH_INDEX] * 3]


def test_without_a_server_it_says_what_it_would_do_and_keeps_no_cooldown(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: ""}):
        for hours in (0, 1):
            (said,) = one_pass(EMBEDDER, hours)
            assert "no Prefect server: would have asked for retrain-embedder (query_mmd)" in said
        assert "would have told (label_age_days)" in one_pass(TOLD, 0)[0]
    assert last_asked(STORE, Reaction.RETRAIN_EMBEDDER, artifacts=artifacts()) is None


def test_the_event_names_store_deployment_champions_and_breaches(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefect.events
    from prefect.settings import PREFECT_API_URL, temporary_settings

    release = make_release()
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(prefect.events, "emit_event", lambda **kw: heard.append(kw) or kw)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert send(STORE, Reaction.RETRAIN_EMBEDDER, EMBEDDER, CHAIN, release, "run1")
    (event,) = heard
    assert event["event"] == EVENT
    assert event["resource"]["prefect.resource.id"] == "relearn.store.shop"
    assert event["resource"][REACTION_LABEL] == "retrain-embedder"
    champions = [r["prefect.resource.id"] for r in event["related"]]
    assert "relearn.model.shop-judge.1" in champions and len(champions) == 3
    assert event["payload"]["chain"] == CHAIN["chain"] and event["payload"]["mlflow_run"] == "run1"
    (breach,) = event["payload"]["breaches"]
    assert (breach["measure"], breach["value"], breach["limit"]) == ("query_mmd", 1.0, 0.02)


def test_the_reference_is_the_store_that_a_champion_was_trained_on(home: Path) -> None:
    one, two = make_release(data="one"), make_release(data="two")
    for release, word in ((one, "one"), (two, "two")):
        for part in release.parts.values():
            found = trained_on(part.ref, artifacts=artifacts())
            assert (artifacts().path(found) / "data.txt").read_text() == word


def test_views_are_compared_towards_doubt() -> None:
    then = {"confidence": 0.8, "entropy": 0.5, "contradiction": None}
    now = {"confidence": 0.6, "entropy": 0.75, "contradiction": 0.5}
    values, notes = compare_views(then, now)
    assert values["confidence_drop"] == pytest.approx(0.2)
    assert values["entropy_rise"] == pytest.approx(0.25)
    assert values["contradiction_rise"] is None and "no decoded" in notes["contradiction_rise"]


@stage(name="dated", kind="data")
def dated(ctx: StageContext, newest: str) -> None:
    """A store with one interaction."""
    (ctx.out / "store").mkdir()
    when = [datetime.fromisoformat(newest) if newest else None]
    table = pa.table({"timestamp": pa.array(when, pa.timestamp("us"))})
    pq.write_table(table, ctx.out / "store" / "interactions.parquet")


@pytest.fixture
def no_store(home: Path) -> Iterator[ArtifactRef]:
    """A store whose only interaction has no date."""
    yield dated.make(newest="")


def test_labels_age_from_the_newest_and_no_dates_are_no_age(
    no_store: ArtifactRef, tmp_path: Path
) -> None:
    kept = artifacts()
    age, said = label_age(EsciSource(), None, dated.make(newest="2026-02-27T00:00"), NOW, kept)
    assert age == 2.5 and "2026-02-27" in said
    assert label_age(EsciSource(), None, no_store, NOW, kept)[0] is None
    to_come = dated.make(newest="2027-01-01T00:00")
    assert label_age(EsciSource(), None, to_come, NOW, kept)[0] is None
    assert label_age(SyntheticSource(), None, no_store, NOW, kept)[0] is None
    for name, columns in (
        ("products", {"product_id": ["p"], "title": ["t"]}),
        ("queries", {"query_id": ["q"], "text": ["t"]}),
    ):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    judgments = {"query_id": ["q"], "product_id": ["p"], "grade": [4], "updated_at": ["2026-03-01"]}
    pq.write_table(pa.table(judgments), tmp_path / "judgments.parquet")
    age, said = label_age(TablesSource(), tmp_path, no_store, NOW, kept)
    assert age == 0.5 and "judgments" in said
