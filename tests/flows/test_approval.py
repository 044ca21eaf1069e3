"""A borderline candidate: held at once, or paused until a person answers in the Prefect UI."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from prefect import flow

from flows import release
from models.evaluation.gate import Decision, Outcome, Reason
from tasks.gate import Verdict
from tasks.release import Action, Release

BORDERLINE = Decision.of([Reason("a clear gain", 0.005, None, 0.01, False, Outcome.ASK, "small")])
NOBODY: Any = Release({})


def verdict(*reasons: Reason, champion: Release | None = NOBODY) -> Verdict:
    """A verdict of these reasons."""
    return Verdict(NOBODY, champion, Decision.of(reasons))


def test_without_the_setting_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "_ask", lambda _: pytest.fail("asked"))
    assert release._action(verdict(*BORDERLINE.reasons)) == (None, "")


@pytest.mark.parametrize(("answer", "action"), [(True, Action.APPROVED), (False, None)])
def test_only_a_borderline_candidate_is_asked_about(
    monkeypatch: pytest.MonkeyPatch, answer: bool, action: Action | None
) -> None:
    monkeypatch.setenv("RELEARN_WAIT_FOR_APPROVAL", "true")
    asked: list[Decision] = []
    monkeypatch.setattr(release, "_ask", lambda d: asked.append(d) or (answer, "said so"))
    assert release._action(verdict(*BORDERLINE.reasons)) == (action, "said so")
    assert asked == [BORDERLINE]
    hold = Reason("judge kappa", 0.1, None, 0.2, False, Outcome.HOLD)
    assert release._action(verdict(*BORDERLINE.reasons, hold)) == (None, "")
    assert release._action(verdict())[0] is Action.PROMOTED
    assert release._action(verdict(champion=None))[0] is Action.FIRST
    assert len(asked) == 1


def test_nobody_is_asked_about_a_past_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEARN_WAIT_FOR_APPROVAL", "true")
    monkeypatch.setattr(release, "_ask", lambda decision: (True, "asked"))
    with release.unattended():
        assert release._action(verdict(*BORDERLINE.reasons)) == (None, "")
    assert release._action(verdict(*BORDERLINE.reasons)) == (Action.APPROVED, "asked")


def test_without_a_server_there_is_nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert release._ask(BORDERLINE) == (False, "")


@flow(name="outer")
def outer() -> tuple[bool, str]:
    """As the pipeline does: the pause is in a flow inside a flow."""
    return inner()


@flow(name="inner")
def inner() -> tuple[bool, str]:
    """Asks."""
    return release._ask(BORDERLINE)


def resume(values: dict[str, Any]) -> None:
    """Answer the first paused run of `inner`, as the UI does."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
    with get_client(sync_client=True) as client:
        for _ in range(100):
            runs = client.read_flow_runs(flow_run_filter=wanted)
            if runs:
                client.resume_flow_run(runs[0].id, run_input=values)
                return
            time.sleep(0.2)


def last_state(name: str) -> str | None:
    """How the newest run of a flow ended."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter
    from prefect.client.schemas.sorting import FlowRunSort

    wanted = FlowFilter.model_validate({"name": {"any_": [name]}})
    with get_client(sync_client=True) as client:
        order = FlowRunSort.START_TIME_DESC
        return client.read_flow_runs(flow_filter=wanted, sort=order, limit=1)[0].state_name


def test_a_paused_flow_goes_on_with_the_answer(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "APPROVAL_POLL_S", 1)
    answer = threading.Thread(target=resume, args=({"promote": True, "reason": "looks fine"},))
    answer.start()
    try:
        assert outer() == (True, "looks fine")
    finally:
        answer.join()


def test_nobody_answers(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEARN_APPROVAL_TIMEOUT_S", "1")
    monkeypatch.setattr(release, "APPROVAL_POLL_S", 1)
    assert outer() == (False, "")
    assert last_state("inner") == last_state("outer") == "Completed"
