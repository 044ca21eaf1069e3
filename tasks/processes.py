"""Processes that outlive the command that started them, and the file that remembers them.

Consumes commands -> produces processes in sessions of their own, a log file each, and a state file
with pids and start times. A pid alone is no identity: it is used again after a reboot. A process is
ours when pid and start time are those of the state file, or when its environment names our home
(`MARK`): children inherit it, so flow runs that a worker put into a session of their own, and
processes whose state file was lost, are found too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import ConfigError, ServiceError, explain

MARK = "RELEARN_SERVICES"
"""Environment variable of every process started here: the home it belongs to."""
LOOPBACK = "127.0.0.1"
SAME_START_S = 1.0
"""Two readings of one process's start time differ by less (the kernel counts in 10 ms)."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
GRACE_S = 20.0
"""From SIGTERM to SIGKILL: long enough for a flow run to record that it was ended."""
POLL_S = 0.2
LOG_LINES = 15
"""Last lines of a log that an error shows."""


class Record(BaseModel):
    """One started process, as the state file keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pid: int
    created: float
    """Start time in seconds since the epoch, as the system reports it."""
    log: Path
    port: int | None = None
    start: str = ""
    """`start_of` it; "" in a record that knows `created` alone."""


class StateFile:
    """name -> Record, as JSON; a missing or unreadable file is an empty one.

    An unreadable file loses nothing: what it named still carries the mark.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Record]:
        """The records, in the order they were started."""
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8"))
            return {r.name: r for r in map(Record.model_validate, rows)}
        except (FileNotFoundError, ValueError, TypeError, ValidationError):
            return {}

    def write(self, records: Iterable[Record]) -> None:
        """Replace the file at once; without records it is removed."""
        rows = [r.model_dump(mode="json") for r in records]
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        partial.replace(self.path)


def start(
    name: str, command: Sequence[str], env: Mapping[str, str], home: Path, port: int | None = None
) -> Record:
    """Start `command` in a session of its own, output appended to home/logs/<name>.log."""
    import psutil

    log = home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} starting {name}\n")
        out.flush()
        child = subprocess.Popen(
            list(command),
            env={**env, MARK: str(home)},
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Record(
        name=name,
        pid=child.pid,
        created=psutil.Process(child.pid).create_time(),
        log=log,
        port=port,
        start=start_of(child.pid) or "",
    )


def start_of(pid: int) -> str | None:
    """When a process began, in a form that tells it from another one of its pid; None: it is gone.

    Counted from the start of the machine where the system says so: the time of day that psutil
    gives moves with every step of the clock.
    """
    import psutil

    if BOOT_ID.is_file():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # the name, in brackets, may hold blanks; the 20th field behind it are ticks since the boot
        ticks = fields.rpartition(")")[2].split()[19]
        return f"{BOOT_ID.read_text(encoding='ascii').strip()[:8]}-{ticks}"
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def alive(record: Record) -> bool:
    """Whether the recorded process runs; another one under its pid does not count."""
    return _process(record) is not None


def variable(record: Record, name: str) -> str | None:
    """An environment variable that the recorded process was started with; None: not known."""
    import psutil

    found = _process(record)
    with contextlib.suppress(psutil.Error, OSError):
        return None if found is None else found.environ().get(name)
    return None


def _process(record: Record) -> Any:
    import psutil

    try:
        found = psutil.Process(record.pid)
        if record.start:
            same = start_of(record.pid) == record.start
        else:
            same = abs(found.create_time() - record.created) < SAME_START_S
        return found if same and _runs(found) else None
    except psutil.Error:
        return None


def _runs(process: Any) -> bool:
    """Not gone, and not a zombie whose parent has yet to ask for its exit code."""
    import psutil

    with contextlib.suppress(psutil.Error):
        if process.status() == psutil.STATUS_ZOMBIE:
            with contextlib.suppress(OSError):
                os.waitpid(process.pid, os.WNOHANG)  # if that parent is this process
            return False
        return bool(process.is_running())
    return False


def marked(home: Path) -> list[Any]:
    """Running processes that carry the mark of `home`, this one and its parents left out."""
    import psutil

    found = []
    mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in mine and process.environ().get(MARK) == str(home):
                found.append(process)
    return [p for p in found if _runs(p)]


def in_session(processes: Iterable[Any], record: Record) -> list[Any]:
    """Those of `processes` that live in the session the recorded process opened."""
    found = []
    for process in processes:
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == record.pid:
                found.append(process)
    return found


def family(processes: Iterable[Any], record: Record) -> list[Any]:
    """Those in the recorded process's session, and its descendants wherever they went."""
    import psutil

    processes = list(processes)
    found = in_session(processes, record)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process not in found and record.pid in {p.pid for p in process.parents()}:
                found.append(process)
    return found


def stop(processes: Sequence[Any], grace_s: float = GRACE_S) -> None:
    """SIGTERM to their process groups, SIGKILL to what is left after `grace_s`.

    Raises:
        ServiceError: a process that survives SIGKILL.
    """
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        left = [p for p in processes if _runs(p)]
        for group in {_group(p) for p in left} - {None, os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)  # type: ignore[arg-type]
        deadline = time.monotonic() + wait_s
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = [p for p in left if _runs(p)]
        if not left:
            return
    pids = ", ".join(str(p.pid) for p in left)
    raise ServiceError(explain(f"processes {pids} after SIGKILL", "none", "look at them with ps"))


def _group(process: Any) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def wait_until(
    record: Record, ready: Callable[[], bool], timeout_s: float, what: str = "an answer"
) -> None:
    """Return when `ready` says so.

    Raises:
        ServiceError: the process ended, or time is up; the message has its log's last lines.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        if not alive(record):
            got = f"{record.name} ended while starting. Its log ends:\n{tail(record.log)}\n"
            raise ServiceError(explain(got, "a running process", f"read {record.log}"))
        if time.monotonic() > deadline:
            got = f"no {what} of {record.name} in {timeout_s:.0f} s. Its log ends:\n"
            got += f"{tail(record.log)}\n"
            raise ServiceError(explain(got, what, f"read {record.log}, then try again"))
        time.sleep(POLL_S)


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, indented."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"  ({error})"
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def refuse_taken_port(port: int, name: str, option: str) -> None:
    """Raise where something listens on 127.0.0.1:`port` already.

    Raises:
        ConfigError: it does; the message names the process where the system tells.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            got = f"port {port} on {LOOPBACK} for {name}: {error.strerror}{_owner(port)}"
            do = f"stop that program, or choose another port with {option} N"
            raise ConfigError(explain(got, "a free port", do)) from None


def _owner(port: int) -> str:
    """ " by NAME (pid N)" of what listens on `port`, "" where the system does not tell."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("inet"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
