"""Release: judge, retriever and index become versions, and champions if the gate says so."""

from __future__ import annotations

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from prefect import flow, task

from flows.embedder import EmbedderResult
from flows.judge import JudgeResult
from models.errors import ConfigError, explain
from models.evaluation.gate import Decision, GateConfig, Outcome, Reason
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.gate import Call, Verdict, compare, config_of, record
from tasks.registry import CHAMPION
from tasks.release import (
    Action,
    Moved,
    Release,
    candidates,
    finish_pending,
    named,
    promote,
    register_candidates,
    registered_rows,
    release_of,
    rollback,
    serve_champion,
    version_rows,
)
from tasks.settings import settings
from tasks.stage import Stage, current_settings, pipeline
from tasks.temporary import lasting_server

APPROVAL_POLL_S = 10
"""Seconds between two looks whether somebody has answered."""

_attended: ContextVar[bool] = ContextVar("attended", default=True)

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleaseResult:
    """What became of the candidates."""

    store_name: str
    registered: list[dict[str, Any]]
    """One row a model: name, version, aliases as they are now, artifact."""
    decision: Decision
    action: Action | None
    """How they became champions; None when they did not."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What each part of the flow took, without Prefect's part and without stages inside."""


class _Parts:
    """The parts of a release as Prefect tasks, and the seconds each needs for itself."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def task(self, function: Callable[P, R], name: str) -> Callable[P, R]:
        """`function` as a task."""

        @functools.wraps(function)
        def measured(*args: P.args, **kw: P.kwargs) -> R:
            with self.measured(name):
                return function(*args, **kw)

        return task(name=name, task_run_name=name, persist_result=False)(measured)

    @contextmanager
    def measured(self, name: str, sign: int = 1) -> Iterator[None]:
        """Add what is done inside to the part `name`; with sign -1, take it out."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += sign * (time.monotonic() - began_s)

    def stages_of(self, name: str) -> Call:
        """Runs stages inside the part `name`, which report their own seconds."""

        def call(stage: Stage, **inputs: Any) -> ArtifactRef:
            with self.measured(name, sign=-1):
                return stage(**inputs)

        return call


@flow(name="release", flow_run_name="release", log_prints=False)
def release(
    name: str,
    judge: JudgeResult | None = None,
    retriever: EmbedderResult | None = None,
    gate: GateConfig | None = None,
) -> ReleaseResult:
    """Register candidates, compare them with the champions, and promote a clear win.

    A judge alone or a retriever alone is completed by the champion's other parts.

    A borderline candidate waits for a person in the Prefect UI where `Settings.wait_for_approval`
    is on and there is a server with a UI; elsewhere it is held, and `relearn promote` decides.
    """
    config = gate or GateConfig()
    artifacts, parts = _artifacts(name), _Parts()
    refs, evaluations = {}, {}
    if judge is not None:
        refs["judge"], evaluations["judge"] = judge.judge, judge.evaluation
    if retriever is not None:
        refs |= {"embedder": retriever.embedder, "index": retriever.index}
        evaluations["retrieval"] = retriever.evaluation
    finish_pending(name, artifacts=artifacts)
    register = parts.task(register_candidates, "register")
    candidate = register(name, refs, evaluations, artifacts=artifacts)
    with parts.measured("gate"):
        call = parts.stages_of("gate")
        verdict = compare(name, candidate, config, artifacts=artifacts, call=call)
    parts.task(record, "gate")(name, verdict, config, artifacts=artifacts)
    _show_markdown(name, verdict.decision)
    action, reason = _action(verdict)
    if action is not None:
        become = parts.task(_promote, "promote")
        verdict, action = become(name, verdict, action, reason, config, artifacts)
    else:
        parts.task(serve_champion, "publish")(name, artifacts=artifacts)
    rows = registered_rows(name, candidate, artifacts=artifacts)
    return ReleaseResult(name, rows, verdict.decision, action, dict(parts.seconds))


def _artifacts(name: str) -> ArtifactStore:
    return ArtifactStore(current_settings().model_copy(update={"experiment": name}))


def _action(verdict: Verdict) -> tuple[Action | None, str]:
    """What to do about a decision; a borderline one may wait here for a person."""
    decision = verdict.decision
    if decision.outcome is Outcome.PROMOTE:
        return (Action.FIRST if verdict.champion is None else Action.PROMOTED), decision.summary
    if decision.outcome is Outcome.ASK and settings().wait_for_approval and _attended.get():
        approved, reason = _ask(decision)
        return (Action.APPROVED if approved else None), reason
    return None, ""


@contextmanager
def unattended() -> Iterator[None]:
    """Nobody is asked inside: borderline candidates are held."""
    token = _attended.set(False)
    try:
        yield
    finally:
        _attended.reset(token)


def _ask(decision: Decision) -> tuple[bool, str]:
    """Pause this flow run until somebody resumes it in the UI with the form filled in."""
    from prefect.exceptions import FlowPauseTimeout
    from prefect.flow_runs import pause_flow_run
    from prefect.input import RunInput

    class Approval(RunInput):
        """The form."""

        promote: bool = False
        reason: str = ""

    if not lasting_server():
        log.warning("no Prefect server with a UI to wait for: the candidate is held")
        return False, ""
    form = Approval.with_initial_data(description=decision.as_markdown())
    wait_s = settings().approval_timeout_s
    log.warning("borderline; waiting %d s for approval in the Prefect UI", wait_s)
    try:
        answer = pause_flow_run(form, timeout=wait_s, poll_interval=APPROVAL_POLL_S)
    except FlowPauseTimeout:
        log.warning("nobody answered within %d s: the candidate is held", wait_s)
        _unpause()
        return False, ""
    return answer.promote, answer.reason or "approved in the Prefect UI"


def _unpause() -> None:
    """Go on after a pause that timed out: of a run that is still paused Prefect takes no end."""
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext
    from prefect.states import Running

    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "called inside a flow"
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(context.flow_run.id, Running(), force=True)


def _promote(
    name: str,
    verdict: Verdict,
    action: Action,
    reason: str,
    config: GateConfig,
    artifacts: ArtifactStore,
) -> tuple[Verdict, Action | None]:
    """Promote, or hold where another run was quicker; one just like this one has done its work."""
    candidate = verdict.candidate
    moved = promote(name, candidate, verdict.champion, action, reason, artifacts=artifacts)
    if moved is Moved.DONE:
        return verdict, action
    now = release_of(name, CHAMPION, artifacts=artifacts)
    if now is not None and now.fingerprints == candidate.fingerprints:
        return compare(name, candidate, config, artifacts=artifacts, call=Stage.make), None
    late = Reason(
        "champion unchanged meanwhile",
        "no",
        None,
        None,
        False,
        note="another run promoted while this one compared; the next run compares with that",
    )
    held = Verdict(candidate, verdict.champion, verdict.decision.but(late))
    record(name, held, config, artifacts=artifacts)
    return held, None


def promote_candidates(
    name: str,
    force: bool = False,
    reason: str = "",
    judge: str | None = None,
    index: str | None = None,
) -> ReleaseResult:
    """A person's promotion: decide again, then promote unless the gate holds.

    force: promote even then; needs a reason, which the history keeps.
    judge, index: version numbers of an earlier candidate (`tasks.release.named`); without them,
    the newest one.

    Raises:
        ConfigError: force without a reason, or no such version.
        ArtifactError: no candidates, or their files are gone.
    """
    if force and not reason.strip():
        raise ConfigError(explain("--force alone", "a reason for the history", "add --reason TEXT"))
    artifacts = _artifacts(name)
    finish_pending(name, artifacts=artifacts)
    if judge is None and index is None:
        candidate = candidates(name, artifacts=artifacts)
    else:
        candidate = named(name, judge, index, artifacts=artifacts)
    config = config_of(candidate, artifacts=artifacts)
    call: Call = Stage.make
    with pipeline(f"promote {name}", experiment=name):
        artifacts = _artifacts(name)
        verdict = compare(name, candidate, config, artifacts=artifacts, call=call)
        record(name, verdict, config, artifacts=artifacts)
        action = _by_hand(verdict, force)
        if action is not None:
            why = reason or verdict.decision.summary
            verdict, action = _promote(name, verdict, action, why, config, artifacts)
        else:
            serve_champion(name, artifacts=artifacts)
    rows = registered_rows(name, candidate, artifacts=artifacts)
    return ReleaseResult(name, rows, verdict.decision, action)


def _by_hand(verdict: Verdict, force: bool) -> Action | None:
    """Asking is what this answers; a hold needs force, unless there is nothing to promote."""
    champion = verdict.champion
    if champion is None:
        return Action.FIRST
    if champion.fingerprints == verdict.candidate.fingerprints:
        return None
    if verdict.decision.outcome is Outcome.HOLD:
        return Action.FORCED if force else None
    asked = verdict.decision.outcome is Outcome.ASK
    return Action.APPROVED if asked else Action.PROMOTED


def roll_back(name: str, to: str | None = None, reason: str = "") -> tuple[Release, Release]:
    """Champions before and after: the earlier ones, or those with index version `to`, again."""
    artifacts = _artifacts(name)
    return rollback(name, to, reason, artifacts=artifacts)


def list_versions(name: str) -> list[dict[str, Any]]:
    """Every version of a store, once what a crash left pending is carried out."""
    artifacts = _artifacts(name)
    finish_pending(name, artifacts=artifacts, wait=False)
    return version_rows(name, artifacts=artifacts)


def _show_markdown(name: str, decision: Decision) -> None:
    """The reasons in the Prefect UI. What is only shown may fail: MLflow has it too."""
    from prefect.artifacts import create_markdown_artifact

    try:
        create_markdown_artifact(
            key=f"gate-{name.replace('_', '-')}",
            markdown=decision.as_markdown(),
            description=f"{decision.outcome}: {decision.summary}"[:500],
        )
    except Exception as error:
        log.warning("Prefect does not show the decision: %s", error)
