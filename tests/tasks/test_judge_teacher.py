"""The teacher's stage: its data set is made once, wherever and however the model is served."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.errors import ConfigError
from models.judge.config import DrawConfig
from models.judge.cot_sft import reasoned_pairs
from models.rules.base import load_rules
from models.sources import SyntheticSource
from models.split import SplitConfig
from models.store import Store
from models.teacher.config import ChatTeacher, TeacherConfig, TemplateTeacher
from models.teacher.dataset import read_responses
from models.types import Pair
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.ingest import ingest
from tasks.judge import judge_teacher
from tasks.settings import settings
from tasks.stage import RETRY_DELAY_S
from tests.chat_endpoint import FakeEndpoint, failure, good

KEY = "sk-very-secret-hunter2"
DRAW = DrawConfig(max_pairs=24, epochs=1, balance=1.0, cot_share=0.5, seed=0)
CHAT = ChatTeacher(model="fake")


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    """An endpoint that the environment points at."""
    made = FakeEndpoint()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RELEARN_TEACHER_URL", made.url)
    monkeypatch.setenv("RELEARN_TEACHER_API_KEY", KEY)
    monkeypatch.setenv("RELEARN_TEACHER_ATTEMPTS", "1")
    yield made
    made.close()


@pytest.fixture
def store(home: Path) -> ArtifactRef:
    """A small synthetic store."""
    source = SyntheticSource(num_products=100, num_queries=24, judgments_per_query=8)
    return ingest.make(source=source, split=SplitConfig(), content="")


def make(store: ArtifactRef, config: TeacherConfig = CHAT, draw: DrawConfig = DRAW) -> ArtifactRef:
    """Run the stage."""
    rules = load_rules("synthetic").version
    return judge_teacher.make(
        config=config, draw=draw, rule_base="synthetic", rules=rules, store=store
    )


def folder(ref: ArtifactRef) -> Path:
    """The artifact's files."""
    return ArtifactStore(settings()).path(ref)


def drawn(store: ArtifactRef) -> list[Pair]:
    """The pairs SFT will use."""
    return reasoned_pairs(Store.read(folder(store) / "store").pairs("train"), DRAW)


def test_the_answers_are_bought_once(
    server: FakeEndpoint, store: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(store)
    pairs = drawn(store)
    assert len(pairs) == len(server.asked) == 12
    assert set(read_responses(folder(made), "respond_then_think")) == {p.key for p in pairs}
    server.asked.clear()
    monkeypatch.setenv("RELEARN_TEACHER_URL", "http://elsewhere.invalid/v1")
    monkeypatch.setenv("RELEARN_TEACHER_CONCURRENCY", "3")
    monkeypatch.setenv("RELEARN_TEACHER_TIMEOUT_S", "1")
    monkeypatch.delenv("RELEARN_TEACHER_API_KEY")
    assert make(store) == made and server.asked == []
    monkeypatch.setenv("RELEARN_TEACHER_URL", server.url)
    other = make(store, ChatTeacher(model="better"))
    assert other.fingerprint != made.fingerprint and len(server.asked) == 12


def test_a_run_that_failed_goes_on(server: FakeEndpoint, store: ArtifactRef) -> None:
    left = iter(range(5))
    server.script = lambda a: failure(401) if next(left, None) is None else good(a)
    with pytest.raises(ConfigError, match="RELEARN_TEACHER_API_KEY"):
        make(store)
    server.script = good
    server.asked.clear()
    make(store)
    assert len(server.asked) == 12 - 5


def test_a_failure_that_may_pass_is_tried_again_by_the_stage(
    server: FakeEndpoint, store: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("tasks.stage.time.sleep", slept.append)
    bad = iter([failure(500), failure(500)])
    server.script = lambda a: next(bad, None) or good(a)
    monkeypatch.setenv("RELEARN_TEACHER_CONCURRENCY", "1")
    made = make(store)
    assert len(read_responses(folder(made), "respond_then_think")) == 12
    assert RETRY_DELAY_S in slept
    assert len(server.asked) <= 12 + 2 + 2  # what was answered is not asked for again


def test_counts_and_progress_are_recorded_and_the_key_is_not(
    server: FakeEndpoint,
    store: ArtifactRef,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.stage.PROGRESS_EVERY_S", 0.0)
    caplog.set_level(logging.DEBUG)
    made = make(store)
    assert {a.headers["authorization"] for a in server.asked} == {f"Bearer {KEY}"}
    run = ArtifactStore(settings()).client.get_run(made.run_id)
    assert run.data.metrics["from_chat"] == run.data.metrics["requests"] == 12
    assert run.data.params["model"] == "fake"
    assert "responses of fake 12 of 12" in caplog.text
    home = settings().home
    files = b"".join(p.read_bytes() for p in home.rglob("*") if p.is_file())
    assert KEY.encode() not in files and KEY not in caplog.text


def test_the_template_asks_nobody(server: FakeEndpoint, store: ArtifactRef) -> None:
    made = make(store, TemplateTeacher())
    assert server.asked == [] and len(read_responses(folder(made), "respond_then_think")) == 12


def test_without_an_address_nothing_is_made(
    store: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RELEARN_TEACHER_URL", raising=False)
    with pytest.raises(ConfigError, match="RELEARN_TEACHER_URL"):
        make(store)
