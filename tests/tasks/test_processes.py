"""Processes that outlive a command: found again, stopped exactly, told apart from strangers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from models.errors import ConfigError, ServiceError
from tasks import processes
from tasks.processes import MARK, Record, StateFile

SLEEPER = "import time; print('ready', flush=True); time.sleep(120)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
print("ready", flush=True)
time.sleep(120)
"""
"""A child in a session of its own, as Prefect's worker starts its flow runs."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose processes are gone afterwards, whatever the test did."""
    yield tmp_path
    for process in processes.marked(tmp_path):
        process.kill()


def begin(home: Path, code: str, name: str = "fake") -> Record:
    """A started process that has got as far as saying so."""
    record = processes.start(name, [sys.executable, "-c", code], os.environ, home)
    processes.wait_until(record, lambda: "ready" in record.log.read_text(), 30)
    return record


def everything(home: Path) -> list[psutil.Process]:
    """Running processes that carry the home's mark, found without the code under test."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_stop_ends_a_process_and_its_child_in_another_session(home: Path) -> None:
    record = begin(home, PARENT)
    assert processes.alive(record)
    assert len(everything(home)) == 2
    assert os.getsid(record.pid) == record.pid != os.getsid(0)
    assert len(processes.in_session(everything(home), record)) == 1
    assert len(processes.family(everything(home), record)) == 2
    processes.stop(processes.marked(home))
    assert everything(home) == [] and not processes.alive(record)


def test_stop_kills_what_ignores_sigterm_only_after_the_grace(home: Path) -> None:
    begin(home, STUBBORN)
    started = time.monotonic()
    processes.stop(processes.marked(home), grace_s=1.0)
    assert 1.0 <= time.monotonic() - started < 5
    assert everything(home) == []


def test_strangers_are_neither_found_nor_stopped(home: Path, tmp_path: Path) -> None:
    record = begin(home, SLEEPER)
    env = os.environ | {MARK: str(tmp_path / "another home")}
    other = subprocess.Popen([sys.executable, "-c", SLEEPER], env=env, stdout=subprocess.DEVNULL)
    try:
        assert [p.pid for p in processes.marked(home)] == [record.pid]
        processes.stop(processes.marked(home))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_pid_used_again_is_not_ours() -> None:
    me = psutil.Process()
    mine = Record(name="x", pid=me.pid, created=me.create_time(), log=Path("x.log"))
    assert processes.alive(mine)
    assert not processes.alive(mine.model_copy(update={"created": me.create_time() - 60}))
    assert not processes.alive(mine.model_copy(update={"pid": 2**22 + 1}))


def test_a_clock_that_is_set_changes_no_process() -> None:
    me = psutil.Process()
    start = processes.start_of(me.pid)
    assert start is not None and start == processes.start_of(me.pid)
    mine = Record(name="x", pid=me.pid, created=0.0, log=Path("x.log"), start=start)
    assert processes.alive(mine)
    assert not processes.alive(mine.model_copy(update={"start": f"{start}1"}))
    child = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL)
    assert processes.start_of(child.pid) not in (start, None)
    child.kill()
    child.wait()
    assert processes.start_of(child.pid) is None


def test_a_zombie_is_not_alive(home: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.DEVNULL)
    created = psutil.Process(child.pid).create_time()
    record = Record(name="x", pid=child.pid, created=created, log=home / "x.log")
    assert processes.alive(record)
    child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes.alive(record):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_ended_process_shows_the_end_of_its_log(home: Path) -> None:
    code = "for i in range(40): print('line', i)\nraise SystemExit(3)"
    record = processes.start("fake", [sys.executable, "-c", code], os.environ, home)
    with pytest.raises(ServiceError, match="fake ended while starting") as raised:
        processes.wait_until(record, lambda: False, 30)
    text = str(raised.value)
    assert "line 39" in text and "line 24" not in text and str(record.log) in text


def test_waiting_has_an_end(home: Path) -> None:
    record = begin(home, SLEEPER)
    with pytest.raises(ServiceError, match="no heartbeat of fake in 0 s"):
        processes.wait_until(record, lambda: False, 0.3, "heartbeat")


def test_log_of_an_earlier_start_is_kept(home: Path) -> None:
    begin(home, SLEEPER)
    record = begin(home, SLEEPER)
    assert record.log.read_text().count("starting fake") == 2


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '[{"name": "x"}]', '{"a": 1}'])
def test_a_missing_or_broken_state_file_is_empty(tmp_path: Path, content: str | None) -> None:
    file = StateFile(tmp_path / "services.json")
    if content is not None:
        file.path.write_text(content)
    assert file.read() == {}


def test_state_file_returns_what_was_written(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "services.json")
    records = [
        Record(name=name, pid=pid, created=1.5, log=tmp_path / name, port=port)
        for name, pid, port in (("b", 2, 4200), ("a", 1, None))
    ]
    file.write(records)
    assert list(file.read().items()) == [("b", records[0]), ("a", records[1])]
    assert [p.name for p in tmp_path.iterdir()] == ["services.json"]
    file.write([])
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_names_its_owner_and_the_option() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen()
        with pytest.raises(ConfigError) as raised:
            processes.refuse_taken_port(port, "Prefect", "--port-prefect")
    text = str(raised.value)
    assert all(s in text for s in (f"port {port}", f"pid {os.getpid()}", "--port-prefect N"))
    processes.refuse_taken_port(port, "Prefect", "--port-prefect")
