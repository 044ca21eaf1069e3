"""What the live tests share: the command in a process of its own, and the processes of a home."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from tasks.processes import MARK

REPOSITORY = Path(__file__).resolve().parents[1]
WAIT_S = 240
COMMAND_S = 600


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a person who has set nothing but `more`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return env | {"PYTHONPATH": str(REPOSITORY), "RELEARN_HOME": str(home)} | dict(more or {})


def relearn(
    home: Path, *arguments: str, env: Mapping[str, str] | None = None, limit_s: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a person starts it."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments, "--home", str(home)],
        env=environment(home, env),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


def ours(home: Path) -> list[psutil.Process]:
    """Running processes of the home, found without the code under test."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home) and process.status() != "zombie":
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_for(read: Callable[[], Any], good: Callable[[Any], bool], limit_s: float = WAIT_S) -> Any:
    """The first reading that is good."""
    deadline = time.monotonic() + limit_s
    while not good(value := read()):
        assert time.monotonic() < deadline, value
        time.sleep(0.5)
    return value


@contextmanager
def prefect_at(port: int) -> Iterator[Any]:
    """A client of the server on this port of loopback."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}),
        get_client(sync_client=True) as client,
    ):
        yield client


def fetch(url: str, body: bytes | None = None) -> bytes | None:
    """What a server on loopback answers, None while it does not; an HTTP error is raised."""
    from urllib.error import HTTPError

    asked = Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with build_opener(ProxyHandler({})).open(asked, timeout=120) as response:
            return bytes(response.read())
    except HTTPError:
        raise
    except OSError:
        return None


@contextmanager
def served(
    command: list[str], env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the time of a test; it and its descendants are gone afterwards."""
    with log.open("w") as stream:
        server = subprocess.Popen(
            command,
            env=dict(env),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        family = [psutil.Process(server.pid)] if server.poll() is None else []
        family += [child for p in family for child in p.children(recursive=True)]
        for process in family:
            process.terminate()
        _, alive = psutil.wait_procs(family, timeout=30)
        for process in alive:
            process.kill()
        server.wait(30)
