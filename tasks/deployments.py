"""Prefect's side of `relearn up`: the work pool, the deployments, and runs left behind.

Consumes the address of a Prefect server -> produces a process pool, the deployments of
infra/prefect.yaml with the automations that run them when the monitor asks, and a run list without
runs that no process works on any more. What a person paused or switched off stays so.

Catch-up of missed schedules: of a deployment's scheduled runs that came due while nothing was up,
the newest runs at once and the older ones are cancelled with that reason. Runs that a person asked
for are kept, all of them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError, ServiceError, explain

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOL = "relearn"
WORKER_NAME = "relearn"
DEPLOY_TIMEOUT_S = 300.0
LIVE = ("RUNNING", "PENDING", "CANCELLING", "PAUSED")
"""A run that waits for an approval is a process that polls."""
PAGE = 200
"""Runs the server hands out a request."""
LOST = "The process that worked on it is gone. Its finished stages and checkpoints are kept: the "
LOST += "next run, or Retry, goes on from them."


@contextmanager
def _client(url: str) -> Iterator[SyncPrefectClient]:
    """A client of the server at `url`, whatever the environment said when Prefect was imported."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        yield client


def ensure_pool(url: str) -> None:
    """Make the process work pool where there is none; an existing one stays as people set it."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    pool = WorkPoolCreate(
        name=POOL,
        type=ProcessWorker.type,
        description="Flow runs of relearn, each a process on this machine.",
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    with _client(url) as client:
        try:
            client.create_work_pool(pool)
        except ObjectAlreadyExists:
            return


def deploy(file: Path, env: Mapping[str, str], folder: Path) -> list[str]:
    """Register every deployment of `file`, as `prefect deploy --all` does; returns their names.

    Raises:
        ConfigError: there is no such file.
        ServiceError: Prefect refuses it; the message ends with Prefect's own words.
    """
    if not file.is_file():
        do = "run relearn from a checkout (make setup), which has infra/"
        raise ConfigError(explain(f"no {file}", "the deployments", do))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    try:
        done = subprocess.run(
            [*command, "--prefect-file", str(file)],
            env=dict(env),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEPLOY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        got = f"no end of prefect deploy in {DEPLOY_TIMEOUT_S:.0f} s"
        raise ServiceError(explain(got, "registered deployments", "try again")) from None
    text = done.stdout + done.stderr
    # a deployment that cannot be read is reported, and the command still ends with 0
    names = re.findall(r"Deployment '([^']+)' successfully created", text)
    wanted = _deployments_in(file)
    missing = wanted - {name.split("/")[-1] for name in names}
    if done.returncode or missing:
        got = f"{', '.join(sorted(missing)) or 'deployments'} refused by prefect deploy:\n{text}\n"
        raise ServiceError(explain(got, f"{len(wanted)} deployments", f"correct {file}"))
    return names


def _deployments_in(file: Path) -> set[str]:
    return {entry["name"] for entry in _entries(file)}


def _entries(file: Path) -> list[dict[str, Any]]:
    import yaml

    entries: list[dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]
    return entries


def switched_off(url: str) -> set[str]:
    """Names of the automations that a person has switched off."""
    with _client(url) as client:
        return {found.name for found in client.read_automations() if not found.enabled}


def settle_automations(url: str, file: Path, off: Collection[str]) -> list[str]:
    """Check that the automations of `file` exist, and switch those named in `off` off again: a
    deployment that is registered again gets new ones. Returns a line each.

    Raises:
        ServiceError: the server has not made one.
    """
    wanted = [trigger["name"] for entry in _entries(file) for trigger in entry.get("triggers", ())]
    with _client(url) as client:
        found = {automation.name: automation for automation in client.read_automations()}
        for name in off & found.keys():
            client.pause_automation(found[name].id)
    if missing := sorted(set(wanted) - set(found)):
        got = f"no automation {', '.join(missing)} on the server"
        raise ServiceError(explain(got, "one a trigger", f"check the triggers in {file}"))
    return [f"{name}{', switched off' if name in off else ''}" for name in wanted]


@dataclass(frozen=True)
class Held:
    """What a person has switched off of one deployment."""

    paused: bool
    schedules: tuple[Any, ...]
    """Its inactive schedules."""
    all_schedules: bool
    """Whether it has no other ones."""


def held_back(url: str) -> dict[str, Held]:
    """Per deployment that is paused or has inactive schedules, by name: what is switched off."""
    held = {}
    with _client(url) as client:
        for found in client.read_deployments():
            off = tuple(s.schedule for s in found.schedules if not s.active)
            if found.paused or off:
                held[found.name] = Held(found.paused, off, len(off) == len(found.schedules))
    return held


def hold_back(url: str, held: Mapping[str, Held]) -> list[str]:
    """Switch off again what `held` names: a deployment that is registered again runs, and has new
    schedules, all active. Returns a line for each that was switched off."""
    said = []
    with _client(url) as client:
        for found in client.read_deployments():
            before = held.get(found.name)
            if before is None:
                continue
            if before.paused and not found.paused:
                client.pause_deployment(found.id)
                said.append(f"{found.name}, paused")
            for new in found.schedules:
                if new.active and (before.all_schedules or new.schedule in before.schedules):
                    client.update_deployment_schedule(found.id, new.id, active=False)
                    said.append(f"{found.name}, a schedule switched off")
    return said


def settle_runs(url: str) -> list[str]:
    """Close runs whose process is gone, and keep one missed run a deployment; says what it did.

    Call it only while no worker of this machine and none of its flow runs is alive.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.states import Cancelled, Crashed

    said = []
    with _client(url) as client:
        left = _runs(client, LIVE)
        while left:
            for run in left:
                close = Cancelled if run.state_type == StateType.CANCELLING else Crashed
                state: Any = close(message=LOST)
                client.set_flow_run_state(run.id, state, force=True)
                said.append(f"Run {run.name}: its process is gone, now {state.name}")
            # the flows inside have no pool: they are found by the run that they are part of
            left = _runs(client, LIVE, inside=[run.id for run in left])
        due: dict[Any, list[Any]] = defaultdict(list)
        for run in _runs(client, ("SCHEDULED",), due_before=datetime.now(UTC)):
            if run.auto_scheduled:
                due[run.deployment_id].append(run)
        for missed in due.values():
            missed.sort(key=lambda r: r.next_scheduled_start_time or r.created)
            *older, newest = missed
            for run in older:
                message = f"Missed while nothing was up; {newest.name} runs in its place."
                client.set_flow_run_state(run.id, Cancelled(name="Missed", message=message))
                said.append(f"Run {run.name}: missed; {newest.name} runs in its place")
    return said


def _runs(
    client: SyncPrefectClient,
    states: Sequence[str],
    due_before: datetime | None = None,
    inside: Sequence[Any] = (),
) -> list[Any]:
    """Runs in one of `states`: those of the pool, or the flows `inside` these runs."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.objects import StateType

    types = filters.FlowRunFilterStateType(any_=[StateType(state) for state in states])
    conditions: dict[str, Any] = {"state": filters.FlowRunFilterState(type=types)}
    if due_before is not None:
        due = filters.FlowRunFilterNextScheduledStartTime(before_=due_before)
        conditions["next_scheduled_start_time"] = due
    if inside:
        parents = filters.FlowRunFilterParentFlowRunId(any_=list(inside))
        conditions["parent_flow_run_id"] = parents
    pool = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[POOL]))
    found: list[Any] = []
    while True:
        page = client.read_flow_runs(
            flow_run_filter=filters.FlowRunFilter(**conditions),
            work_pool_filter=None if inside else pool,
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


def worker_is_online(url: str, since: float) -> bool:
    """Whether the worker has sent a heartbeat after `since` (seconds since the epoch)."""
    import httpx

    with _client(url) as client:
        try:
            workers = client.read_workers_for_work_pool(POOL)
        except httpx.HTTPError:
            return False
    return any(
        w.name == WORKER_NAME
        and w.last_heartbeat_time is not None
        and w.last_heartbeat_time.timestamp() > since
        for w in workers
    )
