"""`@stage`: a function that fills a folder becomes a cached, explained, recorded pipeline step.

    @stage(name="judge_dpo", kind="judge", code_version="1")
    def judge_dpo(ctx: StageContext, config: DpoConfig, sft: ArtifactRef) -> dict[str, float]:
        return train_dpo(ctx.open(sft), ctx.out, ctx.scratch, config, ctx.sink)

    ref = judge_dpo(config=DpoConfig(), sft=sft_ref)        # inside a flow: a Prefect task
    ref = judge_dpo.make(config=DpoConfig(), sft=sft_ref)   # the same without Prefect

Consumes ArtifactRefs (parents) and configs -> produces one ArtifactRef in one MLflow run:

1. The fingerprint (tasks/artifacts.py) is looked up; a whole artifact is returned as `Cached`.
2. Otherwise the log says why it is made, and the body runs in a RUNNING MLflow run.
3. Files are moved in, the manifest is written, and only then is the run FINISHED. A crash, even
   `kill -9`, leaves a run that is never served; `ctx.scratch` survives for the next attempt.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import json
import logging
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from models.errors import ConfigError, StoreError, TransientError, explain
from models.types import MetricSink
from tasks.artifacts import (
    TAG,
    ArtifactRef,
    ArtifactStore,
    Identity,
    Lookup,
    flatten,
    identify,
    refs_in,
    this_process,
)
from tasks.faults import scrub, told
from tasks.links import link_to_mlflow
from tasks.settings import Settings, settings
from tasks.temporary import without_heartbeats

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from prefect import Task
    from prefect.futures import PrefectFuture

Body = Callable[..., Mapping[str, float] | None]
Log = logging.Logger | logging.LoggerAdapter[logging.Logger]
OnProgress = Callable[[str, str, int, int], None]
"""Called with (stage, what, done, total)."""

LEFT_OPEN = "left open"
RETRIES = 2
"""Attempts after the first, for TransientError only."""
RETRY_DELAY_S = 10.0
FLUSH_EVERY_S = 1.0
"""Longest time a metric waits before MLflow has it."""
PROGRESS_EVERY_S = 10.0
"""Shortest time between two progress lines of one stage."""
MEMORY_EVERY_S = 0.5
STAGES_KEY = "stages"
"""Prefect artifact of a flow run: what every stage did."""
PARAM_CHARS = 500
PARAM_NAME_CHARS = 250
"""MLflow params are for reading; the manifest holds the whole config. Of two keys that MLflow would
call the same, one is shown."""
METRICS_PER_BATCH = 500
"""Below MLflow's limit of 1000 metrics a call."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageReport:
    """What one call of a stage did; the CLI's closing table is made of these."""

    ref: ArtifactRef
    cached: bool
    reason: str
    """Why it was made, or where the cached one comes from."""
    seconds: float


@dataclass
class Pipeline:
    """One run of the whole chain: the MLflow run its stages nest under, and what they did."""

    run_id: str
    settings: Settings
    """With the pipeline's experiment and run id."""
    reports: list[StageReport] = field(default_factory=list)
    on_progress: OnProgress | None = None


_pipeline: contextvars.ContextVar[Pipeline | None] = contextvars.ContextVar(
    "relearn_pipeline", default=None
)


@contextlib.contextmanager
def pipeline(
    name: str, experiment: str | None = None, on_progress: OnProgress | None = None
) -> Iterator[Pipeline]:
    """Open the MLflow run that the stages called inside nest under.

    Flows that begin inside send no heartbeats: the one around them does. Inside another pipeline
    this is that pipeline: a flow works alone and as part of a larger one.
    """
    outer = _pipeline.get()
    if outer is not None:
        yield outer
        return
    current = settings()
    current = current.model_copy(update={"experiment": experiment or current.experiment})
    store = ArtifactStore(current)
    store.settle_dead()
    tags = {"mlflow.runName": name, f"{TAG}pipeline": name, f"{TAG}process": this_process()}
    tags |= _source_tags()
    run_id = store.client.create_run(store.experiment_id, tags=tags).info.run_id
    link_to_mlflow(current, store.experiment_id, run_id, name)
    current = current.model_copy(update={"pipeline_run": run_id})
    opened = Pipeline(run_id, current, on_progress=on_progress)
    token = _pipeline.set(opened)
    status = "KILLED"
    try:
        with without_heartbeats():
            yield opened
        status = "FINISHED"
    except StoreError:
        status = LEFT_OPEN
        raise
    except Exception:
        status = "FAILED"
        raise
    finally:
        _pipeline.reset(token)
        _show_stages(opened.reports)
        _close(store, run_id, status)


def _close(store: ArtifactStore, run_id: str, status: str, error: str = "") -> None:
    """End a run, unless the store did not answer a moment ago: `settle_dead` does it then."""
    if status == LEFT_OPEN:
        return
    try:
        if store.client.get_run(run_id).info.status == "FINISHED":
            return  # what interrupted it came after its commit: the artifact is whole
        if error:
            store.client.set_tag(run_id, f"{TAG}error", error)
        store.client.set_terminated(run_id, status)
    except StoreError as trouble:
        logger.warning("run %s stays RUNNING until the next pipeline: %s", run_id, trouble)


class MlflowSink:
    """Sends metrics to one MLflow run, in batches at most a second old. Thread-safe."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._pending: list[Any] = []
        self._flushed_s = time.monotonic()
        self._lock = threading.Lock()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record `metrics` at `step` (None: 0). A name's "@" becomes "_at_", as MLflow needs."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with self._lock:
            self._pending += [
                Metric(metric_name(name), float(value), now_ms, step or 0)
                for name, value in metrics.items()
            ]
            full = len(self._pending) >= METRICS_PER_BATCH
            if full or time.monotonic() - self._flushed_s > FLUSH_EVERY_S:
                self._flush()

    def flush(self) -> None:
        """Send what is pending."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), METRICS_PER_BATCH):
            batch = pending[start : start + METRICS_PER_BATCH]
            self._client.log_batch(self._run_id, metrics=batch)
        self._flushed_s = time.monotonic()


def metric_name(name: str) -> str:
    """A name MLflow accepts.

    >>> metric_name("eval/Recall@10 [long tail]")
    'eval/Recall_at_10 _long tail_'
    """
    return re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"))


@dataclass(frozen=True)
class StageContext:
    """What a stage's body may touch."""

    stage: str
    fingerprint: str
    out: Path
    """Empty folder for the artifact's final files."""
    scratch: Path
    """Checkpoints: the same folder for every attempt at this fingerprint; gone after success."""
    sink: MetricSink
    settings: Settings
    log: Log
    run_id: str
    store: ArtifactStore
    _progress: _Progress

    def open(self, ref: ArtifactRef) -> Path:
        """A local, read-only-by-agreement folder with the files of `ref`.

        Raises:
            ArtifactError: its files are gone.
        """
        return self.store.path(ref)

    def progress(self, done: int, total: int, what: str = "") -> None:
        """Say that `done` of `total` units are finished; logged at times, with the time left."""
        self._progress.update(done, total, what)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show `rows` in Prefect and keep them as tables/<name>.json in the MLflow run."""
        plain = [{key: _plain(value) for key, value in row.items()} for row in rows]
        self.store.client.log_dict(self.run_id, plain, f"tables/{name}.json")  # type: ignore[arg-type]
        _show("create_table_artifact", key=self._key(name), table=plain, description=name)

    def markdown(self, name: str, text: str) -> None:
        """Show `text` in Prefect and keep it as reports/<name>.md in the MLflow run."""
        self.store.client.log_text(self.run_id, text, f"reports/{name}.md")
        _show("create_markdown_artifact", key=self._key(name), markdown=text, description=name)

    def figure(self, name: str, fig: Any) -> None:
        """Keep a matplotlib or plotly figure as figures/<name>.png (.html) in the MLflow run."""
        suffix = "html" if hasattr(fig, "write_html") else "png"
        self.store.client.log_figure(self.run_id, fig, f"figures/{name}.{suffix}")

    def _key(self, name: str) -> str:
        return _artifact_key(f"{self.stage}-{name}")


def _plain(value: Any) -> Any:
    """A cell JSON can hold: numpy scalars become Python's, NaN becomes null."""
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class _Progress:
    """Throttled progress: a log line, a Prefect progress artifact, the pipeline's own display."""

    def __init__(self, stage: str, log: Log) -> None:
        self._stage, self._log = stage, log
        self._started: dict[str, float] = {}
        self._said_s = time.monotonic()
        self._artifact: Any = None

    def update(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        began = self._started.setdefault(what, now)
        current = _pipeline.get()
        if current is not None and current.on_progress is not None:
            current.on_progress(self._stage, what, done, total)
        if now - self._said_s < PROGRESS_EVERY_S:
            return
        self._said_s = now
        left = (now - began) / done * (total - done) if done else math.nan
        eta = f", about {left:.0f} s left" if math.isfinite(left) else ""
        self._log.info("%s: %s %d of %d%s", self._stage, what or "done", done, total, eta)
        self._show(100.0 * done / max(1, total), what)

    def _show(self, percent: float, what: str) -> None:
        if self._artifact is None:
            key = _artifact_key(f"{self._stage}-progress")
            self._artifact = _show(
                "create_progress_artifact", progress=percent, key=key, description=what
            )
        else:
            _show("update_progress_artifact", artifact_id=self._artifact, progress=percent)


def _in_task_run() -> bool:
    """Whether this thread runs inside a Prefect task (never imports Prefect to find out)."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import TaskRunContext

    return TaskRunContext.get() is not None


def _show(function: str, **arguments: Any) -> Any:
    """Call one of `prefect.artifacts` inside a task run. What is only shown may fail: a lost table
    in the UI is no reason to lose a training run, and MLflow has it too."""
    if not _in_task_run():
        return None
    import prefect.artifacts

    try:
        return getattr(prefect.artifacts, function)(**arguments)
    except Exception as error:
        logger.warning("Prefect does not show %s: %s", arguments.get("key"), error)
        return None


def _run_log() -> Log:
    if not _in_task_run():
        return logger
    from prefect import get_run_logger

    return get_run_logger()


class _PeakMemory:
    """Samples this process's resident memory (and its children's) on a thread."""

    def __enter__(self) -> _PeakMemory:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            total = 0
            with contextlib.suppress(psutil.Error):
                for process in (me, *me.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += process.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, total)
            if self._done.wait(MEMORY_EVERY_S):
                return


@contextlib.contextmanager
def _system_metrics(current: Settings, run_id: str) -> Iterator[None]:
    """MLflow samples the machine into the run, where `Settings.system_metrics` asks for it."""
    if not current.system_metrics:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, tracking_uri=current.tracking_uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _show_report(store: ArtifactStore, report: StageReport) -> None:
    """The numbers of the artifact's MLflow run and the way there, made now or found."""
    if not _in_task_run():
        return
    ref = report.ref
    run = store.client.get_run(ref.run_id)
    rows = [
        {"metric": name, "value": _plain(value)}
        for name, value in sorted(run.data.metrics.items())
        if not name.startswith("system/")
    ]
    key = _artifact_key(f"{ref.name}-metrics")
    _show("create_table_artifact", key=key, table=rows, description=f"{ref.label}: {report.reason}")
    key = _artifact_key(f"{ref.name}-mlflow")
    link_to_mlflow(store.settings, run.info.experiment_id, ref.run_id, ref.label, key)


def _show_stages(reports: Sequence[StageReport]) -> None:
    """What every stage of a flow run did and why, as one table."""
    if not reports or "prefect" not in sys.modules:
        return
    from prefect.artifacts import create_table_artifact
    from prefect.context import FlowRunContext

    if FlowRunContext.get() is None:
        return
    rows = [
        {
            "stage": report.ref.label,
            "state": "cached" if report.cached else "made",
            "seconds": round(report.seconds, 1),
            "why": report.reason,
        }
        for report in reports
    ]
    try:
        create_table_artifact(table=rows, key=STAGES_KEY, description="What every stage did.")
    except Exception as error:
        logger.warning("Prefect does not show the stages: %s", error)


def _artifact_key(name: str) -> str:
    """A name Prefect accepts as the key of an artifact.

    >>> _artifact_key("judge_dpo-Recall@10")
    'judge-dpo-recall-10'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def _source_tags() -> dict[str, str]:
    """The git commit of the code, where there is one."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    commit = done.stdout.strip()
    return {"mlflow.source.git.commit": commit} if done.returncode == 0 and commit else {}


@dataclass(frozen=True)
class Stage:
    """A decorated body. Call it in a flow, `.submit` it, or `.make` it without Prefect."""

    body: Body
    name: str
    kind: str
    code_version: str = "1"
    retries: int = RETRIES
    retry_delay_s: float = RETRY_DELAY_S

    def __call__(self, **inputs: Any) -> ArtifactRef:
        """Run as a Prefect task; the state is `Cached` when the artifact was there."""
        self._bind(inputs)
        made = self.task(**inputs)
        # a task that returns a state hands back that state, not what it holds
        return made if isinstance(made, ArtifactRef) else made.result()

    def submit(self, **inputs: Any) -> PrefectFuture[ArtifactRef]:
        """Run as a Prefect task on the flow's task runner."""
        return self.task.submit(**inputs)

    def make(self, **inputs: Any) -> ArtifactRef:
        """The same without Prefect: same cache, same MLflow run, same retries."""
        for attempt in range(self.retries + 1):
            try:
                return self.run(inputs).ref
            except TransientError as error:
                if attempt == self.retries:
                    raise
                logger.warning("%s: %s; trying again", self.name, error)
                time.sleep(self.retry_delay_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def identity(self, **inputs: Any) -> Identity:
        """What these inputs amount to; its `fingerprint` is the artifact's."""
        return identify(self.name, self.code_version, self._bind(inputs))

    @functools.cached_property
    def task(self) -> Task[..., ArtifactRef]:
        """The Prefect task. Prefect's own cache stays off: its key holds the run id."""
        from prefect import task
        from prefect.cache_policies import NO_CACHE
        from prefect.states import Completed

        def run(**inputs: Any) -> Any:
            report = self.run(inputs)
            if report.cached:
                return Completed(name="Cached", message=report.reason, data=report.ref)
            return report.ref

        decorate = task(
            name=self.name,
            description=inspect.getdoc(self.body),
            task_run_name=self.name,
            version=self.code_version,
            retries=self.retries,
            retry_delay_seconds=self.retry_delay_s,
            retry_condition_fn=_is_transient,
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        return decorate(run)

    def run(self, inputs: Mapping[str, Any]) -> StageReport:
        """Find or make the artifact of `inputs`, once."""
        started = time.monotonic()
        bound = self._bind(inputs)
        identity = identify(self.name, self.code_version, bound)
        current = current_settings()
        store = ArtifactStore(current)
        log = _run_log()
        report = self._cached(store, identity, store.find(identity.fingerprint), log, started)
        if report is None:
            with _only_one(store, identity, log):
                # another process may have made it while this one waited
                found = store.find(identity.fingerprint)
                report = self._cached(store, identity, found, log, started) or self._make(
                    store, identity, bound, found.reason, log, started
                )
        outer = _pipeline.get()
        if outer is not None:
            outer.reports.append(report)
        if current.pipeline_run:
            what = f"{'cached' if report.cached else 'made'} in run {report.ref.run_id}"
            key = f"{TAG}stage.{report.ref.name}.{report.ref.version}"
            store.client.set_tag(current.pipeline_run, key, what)
        _show_report(store, report)
        return report

    def _cached(
        self, store: ArtifactStore, identity: Identity, found: Lookup, log: Log, started: float
    ) -> StageReport | None:
        if found.ref is None:
            return None
        reason = f"cached: {found.ref.label} made {found.made} in run {found.ref.run_id}"
        log.info(reason)
        # left where a process died between its commit and its clean-up
        shutil.rmtree(store.scratch(identity.fingerprint), ignore_errors=True)
        return StageReport(found.ref, True, reason, time.monotonic() - started)

    def _make(
        self,
        store: ArtifactStore,
        identity: Identity,
        bound: Mapping[str, Any],
        lost: str,
        log: Log,
        started: float,
    ) -> StageReport:
        """lost: what is wrong with an artifact that was made before, "" without one."""
        fingerprint = identity.fingerprint
        stale = store.forget_unfinished(fingerprint, socket.gethostname())
        why = lost or store.why(identity)
        going_on = store.scratch(fingerprint).exists()
        log.info("%s: %s%s", self.name, why, "; going on from its checkpoint" if going_on else "")
        if stale:
            log.info("%s: %d unfinished run(s) of a dead process marked KILLED", self.name, stale)
        try:
            run_id = self._open_run(store, identity, bound, why)
        except StoreError:
            raise
        except BaseException as error:
            # SIGTERM, say, when the run was there but not yet its id
            store.forget_unfinished(fingerprint, socket.gethostname(), type(error).__name__)
            raise
        try:
            ref = self._fill(store, identity, bound, log, run_id)
        except StoreError:
            raise  # the store does not answer: asking it again would only take longer
        except BaseException as error:
            scrub(error)
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            _close(store, run_id, status, f"{type(error).__name__}: {error}"[:5000])
            if isinstance(error, Exception) and (full := told(error, store.settings)) is not None:
                raise full from error
            raise
        seconds = time.monotonic() - started
        log.info("%s: made %s in %.1f s", self.name, ref.label, seconds)
        return StageReport(ref, False, why, seconds)

    def _open_run(
        self, store: ArtifactStore, identity: Identity, bound: Mapping[str, Any], why: str
    ) -> str:
        """A RUNNING MLflow run with the identity in its tags, params and dataset inputs."""
        from mlflow.entities import Param

        tags = {
            "mlflow.runName": self.name,
            "mlflow.note.content": f"{inspect.getdoc(self.body) or self.name}\n\nWhy: {why}",
            f"{TAG}stage": self.name,
            f"{TAG}kind": self.kind,
            f"{TAG}code_version": self.code_version,
            f"{TAG}fingerprint": identity.fingerprint,
            f"{TAG}parents": _json(identity.labels),
            f"{TAG}why": why[:5000],
            f"{TAG}host": socket.gethostname(),
            f"{TAG}process": this_process(),
        } | _source_tags()
        if store.settings.pipeline_run:
            tags["mlflow.parentRunId"] = store.settings.pipeline_run
        run_id: str = store.client.create_run(store.experiment_id, tags=tags).info.run_id
        params = {
            metric_name(key)[:PARAM_NAME_CHARS]: str(value)[:PARAM_CHARS]
            for key, value in flatten(identity.config).items()
        }
        store.client.log_batch(run_id, params=[Param(*param) for param in params.items()])
        _log_parents(store, run_id, bound)
        return run_id

    def _fill(
        self,
        store: ArtifactStore,
        identity: Identity,
        bound: Mapping[str, Any],
        log: Log,
        run_id: str,
    ) -> ArtifactRef:
        """Run the body on an empty folder and commit that folder."""
        scratch = store.scratch(identity.fingerprint)
        scratch.mkdir(parents=True, exist_ok=True)
        sink = MlflowSink(store.client, run_id)
        with _empty_folder(store.settings.home / "work" / identity.fingerprint[:32]) as out:
            context = StageContext(
                stage=self.name,
                fingerprint=identity.fingerprint,
                out=out,
                scratch=scratch,
                sink=sink,
                settings=store.settings,
                log=log,
                run_id=run_id,
                store=store,
                _progress=_Progress(self.name, log),
            )
            clock = _Clock(scratch / "seconds")
            try:
                with clock, _PeakMemory() as memory, _system_metrics(store.settings, run_id):
                    metrics = self.body(context, **bound)
                sink.log(dict(metrics or {}))
                sink.log(
                    {
                        "stage/duration_s": clock.seconds,
                        "stage/peak_rss_bytes": memory.peak_bytes,
                    }
                )
            finally:
                sink.flush()
            ref = store.commit(run_id, out, identity)
        shutil.rmtree(scratch, ignore_errors=True)
        return ref

    def _bind(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs with the body's defaults filled in: a changed default is a changed config."""
        try:
            bound = inspect.signature(self.body).bind(None, **inputs)
        except TypeError as error:
            expected = ", ".join(list(inspect.signature(self.body).parameters)[1:])
            raise ConfigError(
                explain(f"{self.name}: {error}", f"inputs {expected}", "correct the call")
            ) from None
        bound.apply_defaults()
        first, *rest = bound.arguments.items()
        assert first[1] is None, "the first parameter is the context"
        out: dict[str, Any] = {}
        for name, value in rest:
            kind = inspect.signature(self.body).parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                out |= value
            else:
                out[name] = value
        return out


def stage(
    name: str,
    kind: str,
    code_version: str = "1",
    retries: int = RETRIES,
    retry_delay_s: float = RETRY_DELAY_S,
) -> Callable[[Body], Stage]:
    """Make a body `(ctx, **inputs) -> metrics` a `Stage`.

    Raise `code_version` when the body computes something else for the same inputs; nothing watches
    the source, so that a comment does not cost a training run.
    """

    def decorate(body: Body) -> Stage:
        return Stage(body, name, kind, code_version, retries, retry_delay_s)

    return decorate


def _is_transient(task: object, run: object, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), TransientError)


def current_settings() -> Settings:
    """The open pipeline's settings, else those of the environment."""
    outer = _pipeline.get()
    return settings() if outer is None else outer.settings


@contextlib.contextmanager
def reading_from(folder: Path) -> Iterator[None]:
    """Stages that are called inside read their source files in `folder`, though the pipeline is
    open already; without an open one the environment is what they go by."""
    outer = _pipeline.get()
    if outer is None:
        yield
        return
    before = outer.settings
    outer.settings = before.model_copy(update={"data_dir": folder})
    try:
        yield
    finally:
        outer.settings = before


@contextlib.contextmanager
def _only_one(store: ArtifactStore, identity: Identity, log: Log) -> Iterator[None]:
    """Hold the lock of a fingerprint; the system releases it when the process dies."""
    lock = FileLock(store.lock_file(identity.fingerprint[:32]))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is making it; waiting", identity.stage)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Clock:
    """Seconds spent inside, those of earlier attempts that an exception or a signal ended included:
    they are kept in `path`. An attempt that was killed outright is not counted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = 0.0

    def __enter__(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.seconds = float(self._path.read_text())
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._began
        with contextlib.suppress(OSError):  # a full disk has an error of its own
            self._path.write_text(f"{self.seconds:.3f}")


@contextlib.contextmanager
def _empty_folder(path: Path) -> Iterator[Path]:
    """An empty folder, gone afterwards; what a killed process left there goes first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _log_parents(store: ArtifactStore, run_id: str, bound: Mapping[str, Any]) -> None:
    """Parents as MLflow dataset inputs, so that its UI shows them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow refuses one dataset twice: an artifact in several places is named by the first
    places: dict[str, tuple[str, ArtifactRef]] = {}
    for name, value in bound.items():
        for place, ref in refs_in(name, value):
            places.setdefault(ref.fingerprint, (place, ref))
    inputs = [
        DatasetInput(
            Dataset(ref.name, ref.version, "local", _json({"uri": ref.uri})),
            [InputTag("mlflow.data.context", place)],
        )
        for place, ref in places.values()
    ]
    if inputs:
        store.client.log_inputs(run_id, datasets=inputs)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
