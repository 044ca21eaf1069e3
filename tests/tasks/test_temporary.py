"""The server of one command: there when it is needed, gone with the command, however that ends."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from models.errors import ServiceError
from tasks import temporary
from tasks.settings import settings

REPOSITORY = Path(__file__).resolve().parents[2]
STARTING = """
import json, os, sys
from tasks import temporary
from tasks.settings import prepare_environment, settings
prepare_environment(settings())
server = temporary.start(settings())
print(server.process.pid, flush=True)
"""
A_FLOW = (
    STARTING
    + """
from prefect import flow, task
from prefect.settings import get_current_settings
from prefect.utilities.urls import url_for

@task
def one() -> int:
    return 1

@flow
def chain() -> str | None:
    from prefect.context import FlowRunContext
    assert one() == 1
    return url_for(FlowRunContext.get().flow_run)

taken = []
with server.ready(meanwhile=[lambda: taken.append(1)]):
    print(json.dumps({
        "page": chain(),
        "lasting": temporary.lasting_server(),
        "taken": taken,
        "heartbeat": get_current_settings().flows.heartbeat_frequency,
        "server code": "prefect.server.api.server" in sys.modules,
    }), flush=True)
"""
)
WAITING = STARTING + "sys.stdin.read()"
TIMEOUT_S = 480


def command(code: str, home: Path, **env: str) -> subprocess.Popen[str]:
    """`code` in a process of its own, with nothing of Prefect's or ours in its environment."""
    own = ("RELEARN_", "PREFECT_", "MLFLOW_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    fixed = {"RELEARN_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=home,
        env={**clean, **fixed, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gone(pid: int) -> bool:
    """Whether the process ends in time; one that only waits to be reaped has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_a_flow_is_recorded_and_the_server_ends_with_the_command(tmp_path: Path) -> None:
    child = command(A_FLOW, tmp_path)
    out, err = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0, err
    pid, said = out.splitlines()
    assert json.loads(said) == {
        "page": None,
        "lasting": False,
        "taken": [1],
        "heartbeat": None,
        "server code": False,
    }
    assert gone(int(pid))
    with sqlite3.connect(tmp_path / "prefect" / "prefect.db") as database:
        for table in ("flow_run", "task_run"):
            rows = database.execute(f"SELECT state_type FROM {table}").fetchall()
            assert rows == [("COMPLETED",)], table
        # left to `relearn up`, which must not find a memo that says it is done
        assert database.execute("SELECT count(*) FROM block_type").fetchall() == [(0,)]
    assert not (tmp_path / "prefect" / "memo_store.toml").exists()


def test_the_server_of_a_killed_command_ends_by_itself(tmp_path: Path) -> None:
    child = command(WAITING, tmp_path)
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    assert psutil.pid_exists(pid)
    assert os.getpgid(pid) != os.getpgid(child.pid), "Ctrl-C reaches the command alone"
    child.kill()
    child.wait()
    assert gone(pid)


def test_a_server_that_cannot_start_is_a_line(tmp_path: Path) -> None:
    code = STARTING + "with server.ready(): pass"
    bad = f"sqlite+aiosqlite:///{tmp_path}/none/prefect.db"
    child = command(code, tmp_path, PREFECT_API_DATABASE_CONNECTION_URL=bad)
    _, err = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("models.errors.ServiceError: got no answer from Prefect's temporary")
    assert "which ended with code 3" in last


def test_several_servers_may_make_one_new_database(tmp_path: Path) -> None:
    code = STARTING + "with server.ready(): print('ready')"
    children = [command(code, tmp_path) for _ in range(3)]
    for child in children:
        out, err = child.communicate(timeout=TIMEOUT_S)
        assert child.returncode == 0, err[-2000:]
        assert out.endswith("ready\n") and "Traceback" not in err


class NoServer(temporary.TemporaryServer):
    """Answers when it is told to."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self._answer = None
        self._asking = threading.Thread(target=ask)


def test_steps_are_taken_only_while_the_server_starts() -> None:
    answered = threading.Event()
    taken: list[int] = []

    def ask() -> None:
        answered.wait(TIMEOUT_S)

    def second() -> None:
        taken.append(2)
        answered.set()
        server._asking.join()

    server = NoServer(ask)
    steps = (lambda: taken.append(1), second, lambda: taken.append(3))
    with server.ready(meanwhile=steps):
        assert taken == [1, 2]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of a process that has not imported Prefect; starting anything fails."""

    def started() -> Any:
        raise ServiceError("started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setattr(temporary, "TemporaryServer", started)
    return tmp_path


def test_prefect_finds_a_server_by_itself_where_one_may_be_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_alone() -> bool:
        try:
            return temporary.start(settings()) is None
        except ServiceError:
            return False

    assert not left_alone()
    for name, text, named in (
        ("pyproject.toml", "[tool.ruff]\n", False),
        ("pyproject.toml", "[tool.prefect.api]\nurl = 'http://mine/api'\n", True),
        ("prefect.toml", "api.url = 'http://mine/api'\n", True),
        (".env", "RELEARN_LOG_LEVEL=INFO\n", False),
        (".env", "PREFECT_API_URL=http://mine/api\n", True),
        ("prefect/profiles.toml", "active = 'mine'\n", True),
    ):
        (fresh / name).parent.mkdir(exist_ok=True)
        (fresh / name).write_text(text)
        assert left_alone() == named, name
        (fresh / name).unlink()
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://mine/api")
            assert left_alone(), name
    monkeypatch.setitem(sys.modules, "prefect", os)
    assert left_alone()


def test_what_libraries_made_while_loading_is_never_looked_through_again() -> None:
    frozen, was_on = gc.get_freeze_count(), gc.isenabled()
    gc.enable()
    try:
        with pytest.raises(ImportError), temporary.uncollected():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.unfreeze()
        (gc.enable if was_on else gc.disable)()


def test_loading_knows_what_its_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def slow(name: str) -> None:
        loaded.append(name)
        time.sleep(0.05)

    monkeypatch.setattr(temporary.importlib, "import_module", slow)
    loading = temporary.Loading(("torch", "lancedb", "never"))
    for step, _ in zip(loading, range(2), strict=False):
        step()
    assert loaded == ["torch", "lancedb"]
    assert 0.1 <= loading.seconds < 5
