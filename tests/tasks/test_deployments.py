"""Runs left behind and schedules missed, on a live Prefect server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError, ServiceError
from tasks import deployments
from tasks.deployments import POOL


@pytest.fixture
def url(prefect_server: None) -> str:
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    assert address is not None
    return address


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with deployments._client(url) as made:
        yield made


@pytest.fixture
def deployment(url: str, client: Any) -> Iterator[Any]:
    """A deployment of nothing in the pool, due 5, 15, 25 ... minutes ago; gone afterwards.

    The times hang on now and not on the clock's round minutes, so that as many lie in a
    span whatever the minute is.
    """
    from prefect import flow
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import IntervalSchedule

    @flow(name="nothing")
    def nothing() -> None:
        """Does nothing."""

    deployments.ensure_pool(url)
    every = IntervalSchedule(
        interval=timedelta(minutes=10), anchor_date=datetime.now(UTC) - timedelta(minutes=35)
    )
    schedule = DeploymentScheduleCreate(schedule=every, active=True)
    made = client.create_deployment(
        flow_id=client.create_flow(nothing),
        name="nothing",
        work_pool_name=POOL,
        schedules=[schedule],
    )
    yield client.read_deployment(made)
    client.delete_deployment(made)


def schedule(client: Any, deployment: Any, start: datetime, end: datetime) -> None:
    """Let the server make the runs that its scheduler would have made."""
    body = {"start_time": start.isoformat(), "end_time": end.isoformat(), "max_runs": 50}
    path = f"/deployments/{deployment.id}/schedule"
    client._client.post(path, json=body).raise_for_status()


def runs(client: Any, deployment: Any) -> list[Any]:
    """Every run of the deployment, oldest due first."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    return sorted(
        client.read_flow_runs(deployment_filter=only), key=lambda r: r.expected_start_time
    )


def test_of_missed_runs_the_newest_is_kept_and_asked_for_ones_all(
    url: str, client: Any, deployment: Any
) -> None:
    from prefect.states import Scheduled

    now = datetime.now(UTC)
    schedule(client, deployment, now - timedelta(minutes=41), now + timedelta(minutes=15))
    missed = [r for r in runs(client, deployment) if r.expected_start_time < now]
    assert len(missed) == 4
    by_hand = client.create_flow_run_from_deployment(
        deployment.id, state=Scheduled(scheduled_time=now - timedelta(minutes=30))
    )
    said = deployments.settle_runs(url)
    assert len(said) == 3 and all("in its place" in line for line in said)
    after = {r.id: r for r in runs(client, deployment)}
    assert [after[r.id].state.name for r in missed] == ["Missed"] * 3 + ["Scheduled"]
    assert after[missed[0].id].state.is_cancelled()
    assert missed[-1].name in after[missed[0].id].state.message
    assert after[by_hand.id].state.name == "Scheduled"
    coming = [r for r in after.values() if r.expected_start_time > now]
    assert coming and all(r.state.name == "Scheduled" for r in coming)
    assert deployments.settle_runs(url) == []


def test_runs_without_a_process_are_closed_with_the_flows_inside(
    url: str, client: Any, deployment: Any
) -> None:
    from prefect import flow, task
    from prefect.states import Cancelling, Completed, Pending, Running

    @flow(name="inner")
    def inner() -> None:
        """Does nothing."""

    @task(name="call")
    def call() -> None:
        """Stands for the inner run in the outer one."""

    outer = client.create_flow_run_from_deployment(deployment.id, state=Running())
    stands_for = client.create_task_run(call, outer.id, "0", state=Running())
    child = client.create_flow_run(inner, parent_task_run_id=stands_for.id, state=Running())
    others = {
        state.name: client.create_flow_run_from_deployment(deployment.id, state=state)
        for state in (Pending(), Cancelling(), Completed())
    }
    elsewhere = client.create_flow_run(inner, state=Running())
    said = deployments.settle_runs(url)
    assert len(said) == 4
    state = {r.id: client.read_flow_run(r.id).state for r in (outer, child, elsewhere)}
    assert state[outer.id].is_crashed() and "checkpoints are kept" in state[outer.id].message
    assert state[child.id].is_crashed()
    assert state[elsewhere.id].is_running()
    names = {n: client.read_flow_run(r.id).state.name for n, r in others.items()}
    assert names == {"Pending": "Crashed", "Cancelling": "Cancelled", "Completed": "Completed"}


def test_an_existing_pool_stays_as_people_set_it(url: str, client: Any, deployment: Any) -> None:
    from prefect.client.schemas.actions import WorkPoolUpdate

    client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=3))
    deployments.ensure_pool(url)
    pool = client.read_work_pool(POOL)
    assert (pool.concurrency_limit, pool.type) == (3, "process")


def test_automations_are_checked_and_stay_as_people_switched_them(
    url: str, client: Any, deployment: Any, tmp_path: Path
) -> None:
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger

    name = "drift runs nothing"
    trigger = DeploymentEventTrigger(name=name, expect={"relearn.drift"})
    trigger.set_deployment_id(deployment.id)
    file = tmp_path / "prefect.yaml"
    entry = "deployments: [{name: nothing, triggers: [{name: %s}]}, {name: other}]"
    file.write_text(entry % name)
    with pytest.raises(ServiceError, match=rf"no automation {name}.*triggers in .*yaml"):
        deployments.settle_automations(url, file, ())
    made = client.create_automation(trigger.as_automation())
    try:
        assert deployments.settle_automations(url, file, ()) == [name]
        assert deployments.switched_off(url) == set()
        said = deployments.settle_automations(url, file, {name, "another"})
        assert said == [f"{name}, switched off"] and deployments.switched_off(url) == {name}
    finally:
        client.delete_automation(made)


def test_what_a_person_paused_stays_paused_when_registered_again(
    url: str, client: Any, tmp_path: Path
) -> None:
    names = ("all-off", "one-off", "paused", "running")
    (tmp_path / "nothing.py").write_text(
        "from prefect import flow\n@flow\ndef nothing() -> None: ...\n"
    )
    entry = "{name: %s, entrypoint: 'nothing.py:nothing', work_pool: {name: relearn}, schedules: "
    entry += "[{cron: 0 2 * * 0, timezone: UTC}, {cron: 0 3 * * 0, timezone: UTC}]}"
    file = tmp_path / "prefect.yaml"
    entries = ", ".join(entry % name for name in names)
    file.write_text(f"name: test\npull: []\ndeployments: [{entries}]\n")
    env = os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path / "prefect")}

    def found() -> dict[str, Any]:
        return {d.name: d for d in client.read_deployments() if d.name in names}

    def state() -> dict[str, tuple[bool, list[str]]]:
        return {
            n: (d.paused, sorted(s.schedule.cron[2] for s in d.schedules if s.active))
            for n, d in sorted(found().items())
        }

    deployments.ensure_pool(url)
    deployments.deploy(file, env, tmp_path)
    try:
        made = found()
        assert state() == dict.fromkeys(names, (False, ["2", "3"]))
        client.pause_deployment(made["paused"].id)
        three = [s for s in made["one-off"].schedules if s.schedule.cron == "0 3 * * 0"]
        for name, off in (("all-off", made["all-off"].schedules), ("one-off", three)):
            for schedule in off:
                client.update_deployment_schedule(made[name].id, schedule.id, active=False)
        before, held = state(), deployments.held_back(url)
        assert sorted(held) == ["all-off", "one-off", "paused"]
        deployments.deploy(file, env, tmp_path)
        assert state() != before, "else nothing is to be done"
        deployments.hold_back(url, held)
        assert state() == before
        assert before["paused"][0] and before["one-off"] == (False, ["2"])
        assert deployments.hold_back(url, held) == []
    finally:
        for deployment in found().values():
            client.delete_deployment(deployment.id)


def test_without_a_checkout_deploy_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefect\.yaml.*do this"):
        deployments.deploy(tmp_path / "prefect.yaml", {}, tmp_path)


def test_no_worker_is_online_before_its_heartbeat(url: str, client: Any, deployment: Any) -> None:
    now = datetime.now(UTC).timestamp()
    assert not deployments.worker_is_online(url, since=now)
    client.send_worker_heartbeat(POOL, deployments.WORKER_NAME)
    assert deployments.worker_is_online(url, since=now - 60)
    assert not deployments.worker_is_online(url, since=now + 60)
    assert not deployments.worker_is_online("http://127.0.0.1:9/api", since=0)
