"""`relearn up`, `down` and `status`: Prefect, MLflow and a worker for one machine, on loopback.

Consumes Settings and two ports -> produces three processes that listen on 127.0.0.1 alone, and
under the home folder prefect/ and mlflow.db (as `relearn run` lays them out), logs/ and
services.json. Flow runs write to MLflow's database directly, as `relearn run` does; the MLflow
server shows it. So neither a slow nor a stopped server can hold up a stage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from models.errors import ConfigError, ServiceError, explain
from tasks import processes
from tasks.artifacts import ArtifactStore
from tasks.processes import LOOPBACK, Record, StateFile
from tasks.settings import Settings
from tasks.temporary import starting_lock

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOYMENTS = REPOSITORY / "infra" / "prefect.yaml"
PREFECT, MLFLOW, WORKER = "prefect", "mlflow", "worker"
RUNNING = "running"
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
START_TIMEOUT_S = 480.0
"""A server starts in 5 to 11 s on calm cores; minutes where all cores train."""
HEALTH_TIMEOUT_S = 5.0
WORKER_QUERY_S = "5"
"""Seconds between two looks of the worker for runs that are due."""

Say = Callable[[str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What is started, and how it shows that it is ready."""

    name: str
    title: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    port: int | None = None
    option: str = ""
    """Option of `relearn up` that sets the port."""
    health: str = ""
    """Path that answers 200 when the server is ready."""


@dataclass(frozen=True)
class Status:
    """One line of `relearn status`."""

    title: str
    state: str
    """running, ended, not answering, or not started."""
    record: Record | None

    @property
    def url(self) -> str:
        """Where its pages are; "" for the worker."""
        return url_of(self.record) if self.record else ""


def server_services(current: Settings, prefect_port: int, mlflow_port: int) -> tuple[Service, ...]:
    """The two servers. Addresses of databases travel in the environment: they may hold secrets."""
    env = _environment(current, prefect_port, mlflow_port)
    return (
        Service(
            PREFECT,
            "Prefect",
            (*_module("prefect"), *f"server start --host {LOOPBACK} --port {prefect_port}".split()),
            env,
            prefect_port,
            "--port-prefect",
            "/api/health",
        ),
        Service(
            MLFLOW,
            "MLflow",
            (
                *_module("mlflow"),
                *f"server --host {LOOPBACK} --port {mlflow_port} --workers 1".split(),
                "--no-serve-artifacts",
            ),
            env
            | {
                "MLFLOW_BACKEND_STORE_URI": current.tracking_uri,
                "MLFLOW_DEFAULT_ARTIFACT_ROOT": current.artifact_uri,
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight more processes
            },
            mlflow_port,
            "--port-mlflow",
            "/health",
        ),
    )


def worker_service(current: Settings, prefect_port: int, mlflow_port: int, limit: int) -> Service:
    """The process worker; every flow run is a process of its own, at most `limit` at once."""
    from tasks.deployments import POOL, WORKER_NAME

    options = f"--pool {POOL} --name {WORKER_NAME} --type process --limit {limit}"
    return Service(
        WORKER,
        "Worker",
        (*_module("prefect"), "worker", "start", *options.split(), "--install-policy", "never"),
        _environment(current, prefect_port, mlflow_port)
        | {"PREFECT_WORKER_QUERY_SECONDS": WORKER_QUERY_S},
    )


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


def _environment(current: Settings, prefect_port: int, mlflow_port: int) -> dict[str, str]:
    """The caller's environment, which `prepare_environment` has completed, and the addresses."""
    # made absolute here: a flow run has a working folder of its own
    folders = {
        "RELEARN_HOME": str(current.home),
        "RELEARN_WEIGHTS": str(current.weights_dir),
        "RELEARN_BLANKS_DIR": str(current.blanks_dir),
        "RELEARN_ARTIFACT_ROOT": current.artifact_uri,
    }
    if current.data_dir is not None:
        folders["RELEARN_DATA_DIR"] = str(current.data_dir)
    if current.mlflow_uri:
        folders["RELEARN_MLFLOW_URI"] = current.mlflow_uri
    path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **folders,
        "RELEARN_MLFLOW_UI": f"http://{LOOPBACK}:{mlflow_port}",
        "PREFECT_API_URL": f"http://{LOOPBACK}:{prefect_port}/api",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


def up(
    current: Settings,
    say: Say,
    prefect_port: int | None = None,
    mlflow_port: int | None = None,
    limit: int = 1,
) -> list[Record]:
    """Start what does not run yet, register pool and deployments, and wait until all answer.

    A server that has ended starts on its last port, where no other one is asked for.
    What this call started is stopped again when it cannot finish.

    Raises:
        ConfigError: a port is taken, or another one than a running server's, or than the one that a
            running worker asks for work, was asked for.
        ServiceError: a process ended or did not answer in time.
    """
    _refuse_servers_elsewhere(current)
    with _exclusive(current), _all_or_nothing(current) as launch:
        running = dict(launch.records)
        last = launch.last_port(PREFECT, PREFECT_PORT)
        prefect = _port(running.get(PREFECT), prefect_port, last, "--port-prefect")
        last = launch.last_port(MLFLOW, MLFLOW_PORT)
        mlflow = _port(running.get(MLFLOW), mlflow_port, last, "--port-mlflow")
        servers = server_services(current, prefect, mlflow)
        if WORKER in running:
            _refuse_another_address(running[WORKER], servers[0].env["PREFECT_API_URL"])
        # both make or migrate their tables while they start: no other process may meanwhile
        prefect_home = Path(servers[0].env.get("PREFECT_HOME", current.home / "prefect"))
        with (
            FileLock(ArtifactStore(current).lock_file("mlflow")),
            FileLock(starting_lock(prefect_home)),
        ):
            for service in servers:
                launch.start(service, say)
            for service in servers:
                _wait_for_server(service, launch.records[service.name])
        if PREFECT in launch.started or WORKER not in running:
            _register(launch, servers[0].env, say)
        launch.start(worker_service(current, prefect, mlflow, limit), say)
        if WORKER in launch.started:
            _wait_for_worker(launch.records[WORKER], servers[0].env)
        return list(launch.records.values())


def down(current: Settings, say: Say, grace_s: float = processes.GRACE_S) -> int:
    """Stop flow runs, then the worker, then the servers, and nothing else; returns how many
    processes. In this order a flow run that is ended can still tell the server so.

    Raises:
        ServiceError: a process that survives SIGKILL.
    """
    with _exclusive(current):
        state = _state_file(current)
        records = state.read()
        for record in records.values():
            if not processes.alive(record):
                say(f"{record.name} (pid {record.pid}) had already ended")
        stopped: set[int] = set()
        servers = (PREFECT, MLFLOW)
        # twice without the servers: a worker that is stopped may just have begun another run
        for kept in ((*servers, WORKER), servers, servers, ()):
            found = _outside(processes.marked(current.home), records, kept)
            processes.stop(found, grace_s)
            stopped |= {p.pid for p in found}
        state.write([])
        return len(stopped)


def _outside(
    found: Iterable[Any], records: Mapping[str, Record], names: Iterable[str]
) -> list[Any]:
    """Those of `found` that are in no session of the services `names`."""
    found = list(found)
    inside = [
        process
        for name in names
        if name in records
        for process in processes.in_session(found, records[name])
    ]
    return [p for p in found if p not in inside]


def status(current: Settings) -> list[Status]:
    """The three services as they are now."""
    records = _state_file(current).read()
    rows = []
    for name, title, health in (
        (PREFECT, "Prefect", "/api/health"),
        (MLFLOW, "MLflow", "/health"),
        (WORKER, "Worker", ""),
    ):
        record = records.get(name)
        if record is None:
            state = "not started"
        elif not processes.alive(record):
            state = "ended"
        elif health and not answers(url_of(record) + health):
            state = "not answering"
        else:
            state = RUNNING
        rows.append(Status(title, state, record))
    return rows


def use_running_servers(current: Settings) -> None:
    """Point this process at the servers of `relearn up`, where they run and nothing else was set.

    Two Prefect servers on one sqlite file would lock each other out.
    """
    records = {n: r for n, r in _state_file(current).read().items() if processes.alive(r)}
    if PREFECT in records and current.prefect_api_url is None:
        url = f"{url_of(records[PREFECT])}/api"
        if os.environ.setdefault("PREFECT_API_URL", url) == url:
            _wait_while_starting(records[PREFECT], f"{url}/health")
    if MLFLOW in records:
        os.environ.setdefault("RELEARN_MLFLOW_UI", url_of(records[MLFLOW]))


def _wait_while_starting(record: Record, url: str) -> None:
    """Wait for a server that was started a moment ago; one that stays silent is for its client to
    report."""
    if answers(url):
        return
    log.warning("waiting for the %s server of relearn up (pid %d)", record.name, record.pid)
    with contextlib.suppress(ServiceError):
        processes.wait_until(record, lambda: answers(url), START_TIMEOUT_S, f"answer at {url}")


def url_of(record: Record) -> str:
    """The address of a server on this machine; "" for a process without a port."""
    return f"http://{LOOPBACK}:{record.port}" if record.port else ""


def answers(url: str) -> bool:
    """Whether GET `url` gives 200. Proxies of the environment are not asked: it is loopback."""
    from urllib.request import ProxyHandler, build_opener

    try:
        with build_opener(ProxyHandler({})).open(url, timeout=HEALTH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _state_file(current: Settings) -> StateFile:
    return StateFile(current.home / "services.json")


@contextlib.contextmanager
def _exclusive(current: Settings) -> Iterator[None]:
    """One `up` or `down` of a home at a time."""
    path = current.home / "locks" / "services.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        got = f"another `relearn up` or `relearn down` at work on {current.home}"
        raise ServiceError(explain(got, "one at a time", "wait for it to end")) from None
    try:
        yield
    finally:
        lock.release()


class _Launch:
    """What runs, what this call has started, and the state file that follows it."""

    def __init__(self, current: Settings) -> None:
        self.home, self.file = current.home, _state_file(current)
        self.last = self.file.read()
        self.records = {n: r for n, r in self.last.items() if processes.alive(r)}
        self.started: set[str] = set()

    def last_port(self, name: str, default: int) -> int:
        """The port that a service has, or had when it ended."""
        record = self.last.get(name)
        return default if record is None or record.port is None else record.port

    def start(self, service: Service, say: Say) -> None:
        """Start `service` unless it runs."""
        running = self.records.get(service.name)
        if running is not None:
            say(f"{service.title}: already running (pid {running.pid}) {url_of(running)}".rstrip())
            return
        if service.port is not None:
            processes.refuse_taken_port(service.port, service.title, service.option)
        record = processes.start(
            service.name, service.command, service.env, self.home, service.port
        )
        self.records[service.name] = record
        self.started.add(service.name)
        self.file.write(self.records.values())
        say(f"{service.title}: starting (pid {record.pid}), log {record.log}")

    def undo(self) -> None:
        """Stop what this call started."""
        found = processes.marked(self.home)
        mine = [self.records.pop(name) for name in self.started]
        processes.stop([p for r in mine for p in processes.family(found, r)])
        self.file.write(self.records.values())


@contextlib.contextmanager
def _all_or_nothing(current: Settings) -> Iterator[_Launch]:
    launch = _Launch(current)
    try:
        yield launch
    except BaseException:
        launch.undo()
        raise


def _port(running: Record | None, asked: int | None, default: int, option: str) -> int:
    if running is None or running.port is None:
        return default if asked is None else asked
    if asked is not None and asked != running.port:
        got = f"{option} {asked} while {running.name} runs on port {running.port}"
        raise ConfigError(explain(got, f"port {running.port}", "leave it out, or relearn down"))
    return running.port


def _refuse_another_address(worker: Record, url: str) -> None:
    """A worker keeps the address of Prefect that it was started with."""
    known = processes.variable(worker, "PREFECT_API_URL")
    if known is not None and known != url:
        got = f"Prefect at {url} while the worker (pid {worker.pid}) asks {known}"
        do = "give --port-prefect that port, or relearn down"
        raise ConfigError(explain(got, "the worker's address", do))


def _refuse_servers_elsewhere(current: Settings) -> None:
    for name, value in (
        ("RELEARN_PREFECT_API_URL", current.prefect_api_url),
        ("RELEARN_MLFLOW_URI", current.mlflow_uri),
    ):
        if value and value.startswith(("http://", "https://")):
            got = f"{name}, which names a server that runs already"
            raise ConfigError(
                explain(got, "none: relearn up starts its own", f"unset {name}, or start a worker")
            )


def _wait_for_server(service: Service, record: Record) -> None:
    url = url_of(record) + service.health
    processes.wait_until(record, lambda: answers(url), START_TIMEOUT_S, f"answer at {url}")


def _wait_for_worker(record: Record, env: Mapping[str, str]) -> None:
    from tasks.deployments import worker_is_online

    url = env["PREFECT_API_URL"]
    processes.wait_until(
        record, lambda: worker_is_online(url, since=record.created), START_TIMEOUT_S, "heartbeat"
    )


def _register(launch: _Launch, env: Mapping[str, str], say: Say) -> None:
    """Pool and deployments; and where no worker or flow run is alive, what they left behind."""
    from tasks.deployments import (
        deploy,
        ensure_pool,
        held_back,
        hold_back,
        settle_automations,
        settle_runs,
        switched_off,
    )

    url = env["PREFECT_API_URL"]
    ensure_pool(url)
    off, held = switched_off(url), held_back(url)
    try:
        for line in deploy(DEPLOYMENTS, env, launch.home):
            say(f"Deployment: {line}")
    except BaseException:
        # what was registered until then is active, whatever a person had switched off
        hold_back(url, held)
        with contextlib.suppress(ServiceError):
            settle_automations(url, DEPLOYMENTS, off)
        raise
    for line in hold_back(url, held):
        say(f"Deployment: {line}, as before")
    for line in settle_automations(url, DEPLOYMENTS, off):
        say(f"Automation: {line}")
    if not _outside(processes.marked(launch.home), launch.records, (PREFECT, MLFLOW)):
        for line in settle_runs(url):
            say(line)
