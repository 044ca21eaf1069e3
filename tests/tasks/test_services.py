"""`up`, `down` and `status` with small stand-ins for the servers, which start in a moment."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from models.errors import ConfigError, ServiceError
from tasks import processes, services
from tasks.services import MLFLOW, PREFECT, WORKER, Service
from tasks.settings import Settings, settings

REGISTER = services._register

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
SLEEPER = "import time; time.sleep(120)"
RUN = """
import os, signal, sys, time, urllib.request
def end(*_):
    code = urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=5).status
    os.kill(int(sys.argv[2]), 0)
    open(sys.argv[3], "w").write(f"told the server: {code}")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("began", flush=True)
time.sleep(120)
"""
"""A flow run: ended, it tells the server, and needs the worker for it."""
WORKS = """
import os, subprocess, sys, time
run = [sys.executable, "-c", sys.argv[1], sys.argv[2], str(os.getpid()), sys.argv[3]]
subprocess.Popen(run, start_new_session=True)
time.sleep(120)
"""
DIES = "import sys; print('no such table: flow_run'); sys.exit(1)"


class Stage:
    """The fakes, what was said, and what was registered."""

    def __init__(self, current: Settings) -> None:
        self.current = current
        self.said: list[str] = []
        self.registered = 0
        self.worker = SLEEPER
        self.ports = (free_port(), free_port())

    def up(self, prefect: int | None = None, mlflow: int | None = None) -> list[int]:
        """Pids after `up`; ports default to the test's own."""
        asked = [given or own for given, own in zip((prefect, mlflow), self.ports, strict=True)]
        return [r.pid for r in services.up(self.current, self.said.append, *asked)]

    def down(self) -> int:
        return services.down(self.current, self.said.append, grace_s=5)

    def states(self) -> list[str]:
        return [row.state for row in services.status(self.current)]

    @property
    def file(self) -> Path:
        return self.current.home / "services.json"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill(pid: int) -> None:
    """Gone when this returns."""
    process = psutil.Process(pid)
    process.kill()
    process.wait()


def address(port: int) -> dict[str, str]:
    """What tells a process where Prefect is."""
    return {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    made = Stage(Settings(home=tmp_path / "home"))
    made.current.home.mkdir()

    def servers(current: Settings, *ports: int) -> tuple[Service, ...]:
        return tuple(
            Service(
                name=name,
                title=name,
                command=(sys.executable, "-c", SERVER, str(port)),
                env=os.environ | address(ports[0]),
                port=port,
                option=f"--port-{name}",
                health="/health",
            )
            for name, port in zip((PREFECT, MLFLOW), ports, strict=True)
        )

    def worker(current: Settings, prefect: int, *_: object) -> Service:
        env = os.environ | address(prefect)
        return Service(WORKER, WORKER, (sys.executable, "-c", made.worker), env)

    def register(*_: object) -> None:
        made.registered += 1

    def wait_for_worker(record: processes.Record, env: object) -> None:
        running = made.worker == SLEEPER
        processes.wait_until(record, lambda: running, 20, "heartbeat")

    monkeypatch.setattr(services, "server_services", servers)
    monkeypatch.setattr(services, "worker_service", worker)
    monkeypatch.setattr(services, "_register", register)
    monkeypatch.setattr(services, "_wait_for_worker", wait_for_worker)
    yield made
    for process in processes.marked(made.current.home):
        process.kill()


def test_up_status_down(stage: Stage) -> None:
    assert stage.states() == ["not started"] * 3
    pids = stage.up()
    assert stage.states() == ["running"] * 3
    rows = services.status(stage.current)
    assert [row.url for row in rows] == [*(f"http://127.0.0.1:{p}" for p in stage.ports), ""]
    assert all(psutil.pid_exists(pid) for pid in pids)
    assert stage.down() == 3
    assert processes.marked(stage.current.home) == [] and not stage.file.exists()
    for port in stage.ports:
        processes.refuse_taken_port(port, "x", "x")
    assert stage.states() == ["not started"] * 3
    assert stage.down() == 0


def test_second_up_starts_nothing_and_says_so(stage: Stage) -> None:
    pids = stage.up()
    before = stage.file.read_text()
    stage.said.clear()
    assert stage.up() == pids
    assert [line.split(":")[:2] for line in stage.said] == [
        [name, f" already running (pid {pid}) http"] if name != WORKER else
        [name, f" already running (pid {pid})"]
        for name, pid in zip((PREFECT, MLFLOW, WORKER), pids, strict=True)
    ]  # fmt: skip
    assert stage.file.read_text() == before and stage.registered == 1
    assert len(processes.marked(stage.current.home)) == 3


def test_second_up_keeps_the_ports_of_the_running_servers(stage: Stage) -> None:
    pids = stage.up()
    assert [r.pid for r in services.up(stage.current, stage.said.append)] == pids
    with pytest.raises(ConfigError, match=f"--port-mlflow .* runs on port {stage.ports[1]}"):
        stage.up(mlflow=free_port())
    assert stage.states() == ["running"] * 3


@pytest.mark.parametrize("index", [0, 2])
def test_up_starts_again_only_what_ended(stage: Stage, index: int) -> None:
    pids = stage.up()
    kill(pids[index])
    assert stage.states()[index] == "ended"
    again = stage.up()
    assert len(set(again) & set(pids)) == 2
    assert pids[index] not in again and stage.states() == ["running"] * 3
    assert stage.registered == 2


def test_a_server_that_ended_starts_on_its_last_port(stage: Stage) -> None:
    pids = stage.up()
    for pid in pids[:2]:
        kill(pid)
    services.up(stage.current, stage.said.append)
    rows = services.status(stage.current)
    assert [row.url for row in rows] == [*(f"http://127.0.0.1:{p}" for p in stage.ports), ""]


def test_prefect_does_not_move_away_from_a_running_worker(stage: Stage) -> None:
    pids = stage.up()
    kill(pids[0])
    with pytest.raises(ConfigError, match=f"the worker .* asks http://127.0.0.1:{stage.ports[0]}/"):
        stage.up(prefect=free_port())
    stage.up()
    assert stage.states() == ["running"] * 3 and psutil.pid_exists(pids[2])


def test_stale_records_are_said_and_stopped_by_nobody(stage: Stage) -> None:
    me = psutil.Process()
    row = {"name": PREFECT, "pid": me.pid, "created": me.create_time() - 3600, "port": 1}
    stage.file.write_text(json.dumps([row | {"log": str(stage.current.home / "x.log")}]))
    assert stage.states() == ["ended", "not started", "not started"]
    assert stage.down() == 0
    assert stage.said == [f"prefect (pid {me.pid}) had already ended"]
    assert me.is_running() and not stage.file.exists()


def test_down_finds_what_a_lost_state_file_named(stage: Stage) -> None:
    stage.up()
    stage.file.write_text("{")
    assert stage.down() == 3
    assert processes.marked(stage.current.home) == []


def test_down_ends_flow_runs_while_server_and_worker_can_still_be_told(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    command = (sys.executable, "-c", WORKS, RUN, str(stage.ports[0]), str(told))
    worker = Service(WORKER, WORKER, command, os.environ)
    monkeypatch.setattr(services, "worker_service", lambda *_: worker)
    stage.up()
    log = stage.current.home / "logs" / "worker.log"
    deadline = time.monotonic() + 30
    while "began" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert stage.down() == 4
    assert told.read_text() == "told the server: 200"
    assert processes.marked(stage.current.home) == []


def test_a_taken_port_undoes_what_was_started(stage: Stage) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", stage.ports[1]))
        listener.listen()
        with pytest.raises(ConfigError, match=f"got port {stage.ports[1]} .*--port-mlflow N"):
            stage.up()
    assert processes.marked(stage.current.home) == [] and not stage.file.exists()


def test_a_worker_that_dies_undoes_only_what_this_call_started(stage: Stage) -> None:
    pids = stage.up()
    kill(pids[2])
    stage.worker = DIES
    with pytest.raises(ServiceError, match="worker ended while starting") as raised:
        stage.up()
    assert "no such table: flow_run" in str(raised.value)
    assert stage.states() == ["running", "running", "not started"]
    assert {p.pid for p in processes.marked(stage.current.home)} == set(pids[:2])


def test_a_hung_server_is_not_called_running(stage: Stage) -> None:
    pids = stage.up()
    psutil.Process(pids[1]).suspend()
    try:
        services.HEALTH_TIMEOUT_S, before = 0.5, services.HEALTH_TIMEOUT_S
        assert stage.states() == ["running", "not answering", "running"]
    finally:
        services.HEALTH_TIMEOUT_S = before
        psutil.Process(pids[1]).resume()


def test_two_at_once_are_refused(stage: Stage) -> None:
    from filelock import FileLock

    lock = stage.current.home / "locks" / "services.lock"
    lock.parent.mkdir()
    with FileLock(lock), pytest.raises(ServiceError, match="one at a time"):
        stage.up()


@pytest.mark.parametrize("name", ["prefect_api_url", "mlflow_uri"])
def test_servers_elsewhere_are_not_doubled(stage: Stage, name: str) -> None:
    stage.current = stage.current.model_copy(update={name: "http://10.0.0.1:1"})
    with pytest.raises(ConfigError, match=f"RELEARN_{name.upper()}"):
        stage.up()
    assert processes.marked(stage.current.home) == []


def test_other_commands_use_the_running_servers(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PREFECT_API_URL", "RELEARN_MLFLOW_UI"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    services.use_running_servers(stage.current)
    assert "PREFECT_API_URL" not in os.environ
    stage.up()
    services.use_running_servers(stage.current)
    assert os.environ["PREFECT_API_URL"] == f"http://127.0.0.1:{stage.ports[0]}/api"
    assert os.environ["RELEARN_MLFLOW_UI"] == f"http://127.0.0.1:{stage.ports[1]}"
    monkeypatch.delenv("PREFECT_API_URL")
    elsewhere = stage.current.model_copy(update={"prefect_api_url": "http://elsewhere/api"})
    services.use_running_servers(elsewhere)
    assert "PREFECT_API_URL" not in os.environ
    monkeypatch.setenv("PREFECT_API_URL", "http://mine/api")
    services.use_running_servers(stage.current)
    assert os.environ["PREFECT_API_URL"] == "http://mine/api"


def test_a_server_that_is_starting_is_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "x")
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.setenv("RELEARN_MLFLOW_UI", "x")
    pids = stage.up()
    answers, asked = [False, False, True], []

    def slow(url: str) -> bool:
        asked.append(url)
        return answers.pop(0)

    monkeypatch.setattr(services, "answers", slow)
    services.use_running_servers(stage.current)
    assert asked == [f"http://127.0.0.1:{stage.ports[0]}/api/health"] * 3
    assert f"waiting for the prefect server of relearn up (pid {pids[0]})" in caplog.text


def test_what_was_switched_off_stays_so_when_registering_fails(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each deployment that is registered is active, also where a later one is refused."""
    from tasks import deployments

    again: list[object] = []

    def refused(*_: object) -> list[str]:
        raise ServiceError("got a refused deployment")

    def missing(url: str, file: Path, off: set[str]) -> list[str]:
        again.append(off)
        raise ServiceError("got no automation")

    def hold_back(url: str, held: dict[str, str]) -> list[str]:
        again.append(held)
        return []

    monkeypatch.setattr(deployments, "ensure_pool", lambda url: None)
    monkeypatch.setattr(deployments, "switched_off", lambda url: {"drift"})
    monkeypatch.setattr(deployments, "held_back", lambda url: {"retrain": "held"})
    monkeypatch.setattr(deployments, "deploy", refused)
    monkeypatch.setattr(deployments, "hold_back", hold_back)
    monkeypatch.setattr(deployments, "settle_automations", missing)
    launch: Any = SimpleNamespace(home=stage.current.home)
    with pytest.raises(ServiceError, match="refused deployment"):
        REGISTER(launch, address(1), stage.said.append)
    assert again == [{"retrain": "held"}, {"drift"}]


def test_no_secret_is_in_a_command_line_and_every_server_is_on_loopback(tmp_path: Path) -> None:
    uri = "postgresql://user:hunter2@db/mlflow"
    current = Settings(home=tmp_path, mlflow_uri=uri)
    for service in services.server_services(current, 1, 2):
        words = " ".join(service.command)
        assert "hunter2" not in words and "--host 127.0.0.1" in words
    assert services.server_services(current, 1, 2)[1].env["MLFLOW_BACKEND_STORE_URI"] == uri


def test_relative_folders_reach_the_worker_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("HOME", "h"), ("WEIGHTS", "w"), ("DATA_DIR", "d"), ("ARTIFACT_ROOT", "a")):
        monkeypatch.setenv(f"RELEARN_{name}", value)
    monkeypatch.setenv("RELEARN_MLFLOW_URI", "sqlite:///mlflow.db")
    here, artifacts = settings(), settings().artifact_uri
    env = services.worker_service(here, 1, 2, 1).env
    monkeypatch.chdir("/")
    for name, value in env.items():
        if name.startswith("RELEARN_"):
            monkeypatch.setenv(name, value)
    there = settings()
    for field in ("home", "weights_dir", "data_dir"):
        assert getattr(there, field) == getattr(here, field)
    assert there.tracking_uri == here.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert there.artifact_uri == artifacts == f"file://{tmp_path}/a"
    assert str(there.data_dir) == f"{tmp_path}/d" and there.mlflow_pages == "http://127.0.0.1:2"
