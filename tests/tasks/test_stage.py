"""Stages: cached, explained, made again when harmed, safe when killed or raced."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from models.errors import ArtifactError, ConfigError, StoreError, TransientError
from tasks.artifacts import ArtifactRef, ArtifactStore, this_process
from tasks.settings import Settings, settings
from tasks.stage import Stage, StageContext, pipeline, stage

REPOSITORY = Path(__file__).resolve().parents[2]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True)
    beta: float = 0.1
    seed: int = 0


calls: list[str] = []


@stage(name="source", kind="text")
def source(ctx: StageContext, config: Config) -> Mapping[str, float]:
    """Writes one file."""
    calls.append("source")
    (ctx.out / "text.txt").write_text(f"beta {config.beta}")
    ctx.sink.log({"loss/Recall@10": 0.5}, step=3)
    return {"rows": 1.0}


@stage(name="copy", kind="text")
def copy(ctx: StageContext, source: ArtifactRef, times: int = 2) -> None:
    """Repeats it."""
    calls.append("copy")
    (ctx.out / "text.txt").write_text((ctx.open(source) / "text.txt").read_text() * times)


@pytest.fixture(autouse=True)
def _no_calls(home: Path) -> None:
    calls.clear()


@stage(name="free", kind="text")
def free(ctx: StageContext, weights: dict[str, int]) -> None:
    """Its keys are whatever a user wrote."""
    (ctx.out / "text.txt").write_text("free")


def test_any_key_of_a_config_can_be_recorded() -> None:
    weights = {"k?b": 1, "k_b": 2, "é" * 300: 3}
    ref = free.make(weights=weights)
    store = ArtifactStore(settings())
    run = store.client.get_run(ref.run_id)
    assert len(run.data.params) == 2
    manifest = store.manifest(run)
    assert manifest is not None and manifest["config"]["weights"] == weights


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    text = "\n".join(r.message for r in caplog.records if r.name == "tasks.stage")
    caplog.clear()
    return text


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="tasks.stage")
    return caplog


def test_second_call_is_cached(log: pytest.LogCaptureFixture) -> None:
    first = source.make(config=Config())
    assert "source: first time" in log_of(log)
    assert source.make(config=Config()) == first
    assert f"cached: {first.label} made" in log_of(log)
    assert calls == ["source"]


def test_a_cached_stage_costs_little() -> None:
    source.make(config=Config())
    started = time.process_time()
    for _ in range(5):
        source.make(config=Config())
    assert (time.process_time() - started) / 5 < 0.3


def test_changed_config_names_the_field_and_remakes_only_what_follows(
    log: pytest.LogCaptureFixture,
) -> None:
    copy.make(source=source.make(config=Config(beta=0.1)))
    log_of(log)
    changed = source.make(config=Config(beta=0.2))
    copy.make(source=changed)
    text = log_of(log)
    assert "source: config changed: beta 0.1 -> 0.2" in text
    assert "copy: parent source changed" in text
    assert calls == ["source", "copy", "source", "copy"]
    copy.make(source=changed, times=3)
    assert "copy: config changed: times 2 -> 3" in log_of(log)
    assert calls == ["source", "copy", "source", "copy", "copy"]


def test_explanation_compares_with_the_nearest_run(log: pytest.LogCaptureFixture) -> None:
    source.make(config=Config(beta=0.1, seed=0))
    source.make(config=Config(beta=0.9, seed=9))
    log_of(log)
    source.make(config=Config(beta=0.1, seed=1))
    assert "config changed: seed 0 -> 1" in log_of(log)


def test_default_of_the_body_is_part_of_the_identity() -> None:
    ref = source.make(config=Config())
    same = copy.identity(source=ref).fingerprint
    assert same == copy.identity(source=ref, times=2).fingerprint
    assert same != copy.identity(source=ref, times=3).fingerprint


def test_deleted_file_makes_it_again_and_nothing_after_it(
    current: Settings, log: pytest.LogCaptureFixture
) -> None:
    ref = source.make(config=Config())
    copy.make(source=ref)
    log_of(log)
    (ArtifactStore(current).path(ref) / "text.txt").unlink()
    again = source.make(config=Config())
    assert "source: files missing: text.txt" in log_of(log)
    assert again.fingerprint == ref.fingerprint
    assert again.uri != ref.uri
    copy.make(source=again)
    assert calls == ["source", "copy", "source"]


def test_record_in_mlflow(current: Settings) -> None:
    with pipeline("chain", experiment="shop") as run:
        ref = copy.make(source=source.make(config=Config()))
        assert [r.cached for r in run.reports] == [False, False]
    client = ArtifactStore(current).client
    made = client.get_run(ref.run_id)
    assert made.info.status == "FINISHED"
    assert client.get_experiment(made.info.experiment_id).name == "shop"
    assert made.data.tags["mlflow.parentRunId"] == run.run_id
    steps = client.get_run(run.run_id).data.tags
    assert steps[f"relearn.stage.copy.{ref.version}"] == f"made in run {ref.run_id}"
    assert re.fullmatch(r'\{"source": "source@[0-9a-f]{12}"\}', made.data.tags["relearn.parents"])
    assert made.data.params == {"times": "2"}
    assert [i.dataset.name for i in made.inputs.dataset_inputs] == ["source"]
    parent = client.get_run(client.search_runs([made.info.experiment_id])[1].info.run_id)
    assert parent.data.metrics["rows"] == 1.0
    assert parent.data.metrics["stage/peak_rss_bytes"] > 10 << 20
    history = client.get_metric_history(parent.info.run_id, "loss/Recall_at_10")
    assert [(m.step, m.value) for m in history] == [(3, 0.5)]
    assert client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("error", [SystemExit(143), ValueError("boom")])
def test_what_ends_a_stage_while_its_run_opens_leaves_no_run_behind(
    current: Settings, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def interrupted(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("tasks.stage._log_parents", interrupted)
        with pytest.raises(type(error)):
            source.make(config=Config())
    runs = ArtifactStore(current).search("tags.`relearn.stage` = 'source'")
    assert [(r.info.status, r.data.tags["relearn.error"]) for r in runs] == [
        ("KILLED", type(error).__name__)
    ]
    assert calls == [] and source.make(config=Config()) and calls == ["source"]


def test_failed_body_is_recorded_and_leaves_its_checkpoint(current: Settings) -> None:
    attempts: list[bool] = []

    @stage(name="fragile", kind="text", retries=0)
    def fragile(ctx: StageContext) -> None:
        """Fails the first time."""
        attempts.append((ctx.scratch / "step").exists())
        (ctx.scratch / "step").write_text("7")
        if len(attempts) == 1:
            (ctx.out / "half").write_text("x")
            time.sleep(0.3)
            raise ValueError("boom")
        assert list(ctx.out.iterdir()) == []

    with pytest.raises(ValueError, match="boom"):
        fragile.make()
    store = ArtifactStore(current)
    failed = store.search("tags.`relearn.stage` = 'fragile'")[0]
    assert failed.info.status == "FAILED"
    assert failed.data.tags["relearn.error"] == "ValueError: boom"
    assert store.find(failed.data.tags["relearn.fingerprint"]).ref is None
    ref = fragile.make()
    assert attempts == [False, True]
    assert not store.scratch(ref.fingerprint).exists()
    metrics = store.client.get_run(ref.run_id).data.metrics
    assert metrics["stage/duration_s"] > 0.3, "the attempt that failed is counted as well"
    assert list((current.home / "work").iterdir()) == []


@pytest.mark.parametrize(("error", "tries"), [(TransientError, 3), (ArtifactError, 1)])
def test_only_transient_errors_are_retried(error: type[Exception], tries: int) -> None:
    seen: list[int] = []

    @stage(name="flaky", kind="text", retries=2, retry_delay_s=0)
    def flaky(ctx: StageContext) -> None:
        """Always fails."""
        seen.append(1)
        raise error("no")

    with pytest.raises(error):
        flaky.make()
    assert len(seen) == tries


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ConfigError, match="inputs source, times"):
        copy.make(sauce=1)


CHILD = """
import sys, time
from pathlib import Path
from tasks.stage import stage

@stage(name="slow", kind="text")
def slow(ctx, config):
    (ctx.scratch / "checkpoint").write_text("1")
    with Path(sys.argv[1]).open("a") as marks:
        marks.write("began\\n")
    (ctx.out / "half.txt").write_text("h")
    time.sleep(float(sys.argv[2]))
    (ctx.out / "whole.txt").write_text("w")

print(slow.make(config=1).run_id)
"""


def child(marks: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(marks), str(seconds)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(marks: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not marks.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_kill_9_is_never_served_and_goes_on_from_its_checkpoint(
    current: Settings, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    victim = child(marks, 60)
    wait_for(marks, victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    store = ArtifactStore(current)
    (dead,) = store.search("tags.`relearn.stage` = 'slow'")
    assert dead.info.status == "RUNNING"
    fingerprint = dead.data.tags["relearn.fingerprint"]
    assert store.find(fingerprint).ref is None
    assert (store.scratch(fingerprint) / "checkpoint").exists()
    second = child(marks, 0)
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    found = store.find(fingerprint).ref
    assert found is not None
    assert found.run_id == out.strip()
    assert sorted(p.name for p in store.path(found).iterdir()) == ["half.txt", "whole.txt"]
    assert store.client.get_run(dead.info.run_id).info.status == "KILLED"
    assert list((current.home / "work").iterdir()) == []


def test_runs_of_dead_processes_are_closed_and_no_others(current: Settings) -> None:
    store = ArtifactStore(current)
    host, pid, start = this_process().rsplit(" ", 2)
    owners = {
        "dead": f"{host} {pid} {start}1",  # the pid is another process's by now
        "alive": this_process(),
        "elsewhere": f"elsewhere {pid} 1.00",
    }
    ids = {
        name: store.client.create_run(
            store.experiment_id, tags={"relearn.process": owner}
        ).info.run_id
        for name, owner in owners.items()
    }
    ids["a move"] = store.client.create_run(store.experiment_id).info.run_id
    with pipeline("chain"):
        pass
    found = {name: store.client.get_run(run_id).info.status for name, run_id in ids.items()}
    assert found.pop("dead") == "KILLED"
    assert set(found.values()) == {"RUNNING"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_interrupts_after_the_commit_takes_nothing_back(
    current: Settings, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """Ctrl-C while gigabytes of checkpoints are removed: the artifact is whole."""
    remove = shutil.rmtree
    hit: list[Path] = []

    def interrupted(path: Path, *args: object, **kw: object) -> None:
        if Path(path).parent.name == "scratch" and not hit:
            hit.append(Path(path))
            raise error
        remove(path, ignore_errors=True)

    monkeypatch.setattr("tasks.stage.shutil.rmtree", interrupted)
    with pytest.raises(error):
        source.make(config=Config())
    assert hit
    ref = source.make(config=Config())
    assert calls == ["source"]
    assert ArtifactStore(current).client.get_run(ref.run_id).info.status == "FINISHED"


def test_a_run_that_ended_after_it_was_listed_is_left_alone(current: Settings) -> None:
    store = ArtifactStore(current)
    listed = store.client.create_run(store.experiment_id)
    store.client.set_terminated(listed.info.run_id, "FINISHED")
    store._give_up(listed)
    assert store.client.get_run(listed.info.run_id).info.status == "FINISHED"


def test_what_a_kill_after_the_commit_left_is_removed(current: Settings) -> None:
    ref = source.make(config=Config())
    left = ArtifactStore(current).scratch(ref.fingerprint)
    left.mkdir(parents=True)
    source.make(config=Config())
    assert not left.exists() and calls == ["source"]


def test_a_store_that_does_not_answer_is_not_asked_again(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    asked: list[str] = []

    @stage(name="asks", kind="text")
    def asks(ctx: StageContext) -> None:
        """The store goes down meanwhile."""

        def locked(self: object, run_id: str, *_: object, **__: object) -> None:
            asked.append(run_id)
            raise sqlite3.OperationalError("database is locked")

        for name in ("log_batch", "set_tag", "set_terminated"):
            monkeypatch.setattr(MlflowClient, name, locked)

    monkeypatch.setenv("RELEARN_PATIENCE_S", "0")
    with pytest.raises(StoreError, match="locked"), pipeline("chain"):
        asks.make()
    assert len(asked) == 1


def test_two_processes_make_one_artifact(current: Settings, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    first = child(marks, 3)
    wait_for(marks, first)
    second = child(marks, 3)
    outs = [p.communicate(timeout=240) for p in (first, second)]
    assert [p.returncode for p in (first, second)] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert marks.read_text() == "began\n"


def test_in_a_flow_the_second_call_shows_cached(prefect_server: None, home: Path) -> None:
    from prefect import flow

    @flow
    def twice() -> tuple[ArtifactRef, list[str]]:
        futures = []
        for _ in range(2):
            futures.append(source.submit(config=Config()))
            futures[-1].wait()
        return copy(source=futures[1]), [f.state.name for f in futures]

    ref, names = twice()
    assert names == ["Completed", "Cached"]
    assert ref.parents == (source.make(config=Config()).label,)
    assert calls == ["source", "copy"]


def test_a_flow_run_shows_numbers_links_and_what_every_stage_did(
    prefect_server: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow, runtime
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    monkeypatch.setenv("RELEARN_MLFLOW_UI", "http://127.0.0.1:5999")

    @flow
    def shown() -> tuple[str, ArtifactRef]:
        with pipeline("chain", experiment="shop"):
            made = source(config=Config())
            source(config=Config())
        return runtime.flow_run.id, made

    run_id, ref = shown()
    with get_client(sync_client=True) as client:
        only = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
        artifacts = client.read_artifacts(flow_run_filter=only)
    by_key: dict[str, list[str]] = {}
    for artifact in artifacts:
        by_key.setdefault(artifact.key, []).append(str(artifact.data))
    assert sorted(by_key) == ["mlflow-run", "source-metrics", "source-mlflow", "stages"]
    # a cached stage shows the numbers it was made with
    assert len(by_key["source-metrics"]) == len(by_key["source-mlflow"]) == 2
    for table in by_key["source-metrics"]:
        assert '"metric": "rows", "value": 1.0' in table and "loss/Recall_at_10" in table
    assert all(f"/runs/{ref.run_id}" in link for link in by_key["source-mlflow"])
    (stages,) = by_key["stages"]
    assert stages.index('"made"') < stages.index('"cached"') and ref.label in stages


@pytest.mark.parametrize("asked", [False, True])
def test_mlflow_samples_the_machine_only_where_asked(
    current: Settings, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    from mlflow.system_metrics import system_metrics_monitor

    seen: list[tuple[str, ...]] = []

    class Monitor:
        def __init__(self, run_id: str, tracking_uri: str) -> None:
            self.run_id, self.uri = run_id, tracking_uri

        def start(self) -> None:
            seen.append(("start", self.run_id, self.uri))

        def finish(self) -> None:
            seen.append(("finish", self.run_id))

    monkeypatch.setattr(system_metrics_monitor, "SystemMetricsMonitor", Monitor)
    monkeypatch.setenv("RELEARN_SYSTEM_METRICS", str(asked))
    ref = source.make(config=Config())
    began = ("start", ref.run_id, current.tracking_uri)
    assert seen == ([began, ("finish", ref.run_id)] if asked else [])


def test_flows_inside_a_pipeline_send_no_heartbeats(home: Path) -> None:
    """The end of each would wait for its thread; the flow around them has one."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        with pipeline("outer"), pipeline("inner"):
            assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() is None
        assert PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() == 30


def test_in_a_flow_only_transient_errors_are_retried(prefect_server: None) -> None:
    from prefect import flow

    seen: list[str] = []

    def failing(error: type[Exception]) -> Stage:
        @stage(name="failing", kind="text", retries=1, retry_delay_s=0)
        def body(ctx: StageContext) -> None:
            """Always fails."""
            seen.append(error.__name__)
            raise error("no")

        return body

    @flow
    def run(index: int) -> None:
        failing((TransientError, ArtifactError)[index])()

    for index, error in enumerate((TransientError, ArtifactError)):
        with pytest.raises(error):
            run(index)
    assert seen == ["TransientError", "TransientError", "ArtifactError"]
