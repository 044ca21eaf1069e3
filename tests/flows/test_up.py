"""`relearn up` for real: servers on loopback, deployments, scheduled runs, a run; nothing left.

Run it with `make test-live`: starting two servers, a worker and a flow takes a minute or two.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks import processes
from tests.live import free_port, ours, prefect_at, relearn, wait_for

SCHEDULED = "evaluate-champion monitor refresh-index retrain retrain-embedder retrain-judge".split()
NAMES = sorted([*SCHEDULED, "backfill"])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose processes are gone afterwards, whatever the test did."""
    folder = tmp_path / "home"
    yield folder
    for process in ours(folder):
        process.kill()


@pytest.mark.live
def test_up_runs_what_is_due_on_loopback_and_down_leaves_nothing(home: Path) -> None:
    prefect, mlflow = free_port(), free_port()
    ports = ("--port-prefect", str(prefect), "--port-mlflow", str(mlflow))
    done = relearn(home, "up", *ports)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"http://127.0.0.1:{prefect}" in done.stdout

    listening = [
        c.laddr
        for process in ours(home)
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert {prefect, mlflow} <= {a.port for a in listening}
    assert {a.ip for a in listening} == {"127.0.0.1"}

    with prefect_at(prefect) as client:
        found = {d.name: d for d in client.read_deployments()}
        assert sorted(found) == NAMES
        # with sqlalchemy 2.1 these silently never appear
        scheduled = wait_for(lambda: scheduled_runs(client), lambda r: len(r) == len(SCHEDULED))
        assert sorted(scheduled) == SCHEDULED
        # through the worker: a process of its own imports the flow, and says what is missing
        run = client.create_flow_run_from_deployment(found["evaluate-champion"].id)
        state = wait_for(lambda: client.read_flow_run(run.id).state, lambda s: s.is_final())
        assert state.is_failed() and "no champion judge of synthetic" in state.message, state
        assert client.read_flow_run(run.id).name == "synthetic small"

        # the monitor's event runs the deployment that it names, with the chain that it watched
        wanted = {"chain": {"recipe": "smoke", "store": "synthetic", "data": None, "changes": []}}
        assert ask(wanted)
        rows = wait_for(lambda: event_runs(client, found["retrain-judge"].id), len)
        assert rows[0].parameters == wanted
        (automation,) = [a for a in client.read_automations() if "retrain-judge" in a.name]
        client.pause_automation(automation.id)

    again = relearn(home, "up")
    assert again.returncode == 0 and again.stdout.count("already running") == 3
    assert relearn(home, "down").returncode == 0
    assert "runs retrain-judge, switched off" in relearn(home, "up", *ports).stdout

    stopped = relearn(home, "down")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert ours(home) == [] and not (home / "services.json").exists()
    for port in (prefect, mlflow):
        processes.refuse_taken_port(port, "the test", "--port")
    shown = relearn(home, "status")
    assert shown.returncode == 1 and shown.stdout.count("not started") == 3


def ask(parameters: dict[str, Any]) -> bool:
    """An event as the monitor sends it."""
    from prefect.events.worker import EventsWorker

    from models.evaluation.monitor import MonitorConfig, Reaction, Report
    from tasks.monitor import send
    from tasks.release import Release

    report = Report.of(MonitorConfig(), {"entropy_rise": 1.0}, {})
    sent = send("synthetic", Reaction.RETRAIN_JUDGE, report, parameters, Release({}), "run")
    EventsWorker.drain_all()
    return sent


def event_runs(client: Any, deployment_id: Any) -> list[Any]:
    """Runs of a deployment that an automation made."""
    rows = client.read_flow_runs()
    return [r for r in rows if r.deployment_id == deployment_id and not r.auto_scheduled]


def scheduled_runs(client: Any) -> set[str]:
    """Names of the deployments with a run that the server scheduled by itself."""
    names = {d.id: d.name for d in client.read_deployments()}
    rows = client.read_flow_runs()
    return {names[r.deployment_id] for r in rows if r.auto_scheduled and r.state.is_scheduled()}
