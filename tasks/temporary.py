"""A Prefect server for the length of one command, on a port of loopback that the system chooses.

Prefect starts one by itself where no address is set, but late (its first client does, which loads
the server's code into the command as well) and it outlives a command that is killed. This one is
started first, so that both load at once on two cores, and ends with whoever started it:

    server = start(settings())           # before anything imports Prefect
    with server.ready(meanwhile=...):    # imports and the like, while it starts
        run_pipeline(config)

It serves what Prefect's own would: the API on the same database, without pages, without the types
of block that pages offer and without the services that watch deployments.
`python -m tasks.temporary FD` is the server: it listens on the inherited socket FD until it gets
SIGTERM or its standard input ends, as it does by itself when the command dies.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from models.errors import ServiceError, explain
from tasks.blank import prefect_database
from tasks.settings import Settings, settings

LOOPBACK = "127.0.0.1"
REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 480.0
"""As for `relearn up`: seconds on calm cores, minutes where all cores train."""
STOP_TIMEOUT_S = 5.0
STAGES_IMPORT = ("lancedb", "torch", "great_expectations", "sentence_transformers")
"""What most stages load sooner or later, two to five seconds each."""
BACKLOG = 128
ELSEWHERE = (Path("prefect.toml"), Path("pyproject.toml"), Path(".env"))
"""Where Prefect reads settings from besides the environment and its profiles."""
FIXED = {
    # there are no pages, so no links to them
    "PREFECT_UI_URL": "",
    # this server gives out no tokens: each client would ask for one in vain
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
}
"""What the command's Prefect is told about this server."""
SERVER_ONLY = {
    "PREFECT_UI_ENABLED": "0",
    # pages offer types of block; without the memo, `relearn up` registers them on this database
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
}
"""What the server is told beside its command's environment."""

_address = ""
"""Of the server that this process started."""


class TemporaryServer:
    """A server that is starting, or has started; stop it with `stop` or by ending the process."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind((LOOPBACK, 0))
            listener.listen(BACKLOG)
            self.url = f"http://{LOOPBACK}:{listener.getsockname()[1]}/api"
            path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tasks.temporary", str(listener.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **SERVER_ONLY},
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                # Ctrl-C is for the command alone, which still has its end to report
                start_new_session=True,
            )
        self._answer: BaseException | None = None
        self._asking = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        """One request, which waits in the socket's queue until the server takes it."""
        from urllib.request import ProxyHandler, build_opener

        try:
            opener = build_opener(ProxyHandler({}))
            opener.open(f"{self.url}/health", timeout=START_TIMEOUT_S).close()
        except BaseException as error:
            self._answer = error

    @contextlib.contextmanager
    def ready(self, meanwhile: Iterable[Callable[[], object]] = ()) -> Iterator[None]:
        """The server answers inside. Steps of `meanwhile` are taken until it does.

        Flows inside send no heartbeats: nothing of this server listens for them.

        Raises:
            ServiceError: it ended while starting, or does not answer.
        """
        self._asking.start()
        for step in meanwhile:
            if not self._asking.is_alive():
                break
            step()
        self._asking.join()
        if self._answer is not None:
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):  # it resets connections, then ends
                code = self.process.wait(STOP_TIMEOUT_S)
            ended = f", which ended with code {code}" if code is not None else ""
            got = f"no answer from Prefect's temporary server{ended} ({self._answer})"
            raise ServiceError(explain(got, "an answer", "read what it said above, then try again"))
        with without_heartbeats():
            yield

    def stop(self) -> None:
        """End it, at the latest after `STOP_TIMEOUT_S`."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(current: Settings) -> TemporaryServer | None:
    """Start a server and point this process at it; None where Prefect is to find one by itself.

    That is so where an address is set, where Prefect has been imported (it has read its settings),
    and where there are settings in files, which may name an address.
    """
    global _address
    if "prefect" in sys.modules or os.environ.get("PREFECT_API_URL") or _settings_in_files(current):
        return None
    server = TemporaryServer()
    # registered before any handler of Prefect's, so it runs after them: they send what is left
    atexit.register(server.stop)
    _address = server.url
    os.environ["PREFECT_API_URL"] = server.url
    for name, value in FIXED.items():
        os.environ.setdefault(name, value)
    return server


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for while libraries load inside, and never again in what they made.

    They make a million objects that stay: looking through them, again and again while they load and
    once more when the interpreter ends, took a fifth of the loading and three seconds of the end.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def answering(
    server: TemporaryServer | None, meanwhile: Iterable[Callable[[], object]] = ()
) -> contextlib.AbstractContextManager[None]:
    """`server.ready`, or nothing to wait for where `start` left it to Prefect to find one."""
    return contextlib.nullcontext() if server is None else server.ready(meanwhile)


class Loading:
    """Steps for `ready`: one import each, in this thread, as two at once can deadlock.

    seconds: what those taken so far took.
    """

    def __init__(self, names: Iterable[str] = STAGES_IMPORT) -> None:
        self.names, self.seconds = tuple(names), 0.0

    def __iter__(self) -> Iterator[Callable[[], None]]:
        return (functools.partial(self._load, name) for name in self.names)

    def _load(self, name: str) -> None:
        began_s = time.monotonic()
        importlib.import_module(name)
        self.seconds += time.monotonic() - began_s


@contextlib.contextmanager
def without_heartbeats() -> Iterator[None]:
    """Flows that begin inside send none: the end of each would wait up to a second for its thread.

    Without Prefect in this process there is nothing to do.
    """
    if "prefect" not in sys.modules:
        yield
        return
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


def lasting_server() -> bool:
    """Whether Prefect uses a server that was there before this command and has pages."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    return bool(url) and url != _address


def _settings_in_files(current: Settings) -> bool:
    home = Path(os.environ.get("PREFECT_HOME", current.home / "prefect"))
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    if os.environ.get("PREFECT_PROFILE") or profiles.expanduser().exists():
        return True
    found = (path for path in ELSEWHERE if path.is_file())
    return any(_names_prefect(path) for path in found)


def _names_prefect(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name == "pyproject.toml":
        return "[tool.prefect" in text
    return path.name == "prefect.toml" or "PREFECT_" in text.upper()


def main() -> None:
    """Be the server, as `python -m tasks.temporary FD`."""
    left = threading.Event()
    threading.Thread(target=_watch, args=(left,), daemon=True).start()
    with uncollected():
        import uvicorn
        from prefect.server.api.server import create_app
        from prefect.settings import get_current_settings

    end_turn = _turn(get_current_settings().home, left)
    if end_turn is None:
        return
    if (address := get_current_settings().server.database.connection_url) is not None:
        prefect_database(address.get_secret_value(), settings().blanks_dir)
    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    threading.Thread(target=_leave, args=(left, server), daemon=True).start()
    threading.Thread(target=_started, args=(server, end_turn), daemon=True).start()
    server.run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


def starting_lock(home: Path) -> Path:
    """The file that a server of the database in `home` locks while it starts."""
    home.mkdir(parents=True, exist_ok=True)
    return home / "starting.lock"


def _turn(home: Path, left: threading.Event) -> Callable[[], None] | None:
    """Wait for the turn to start on the database in `home`; returns what ends it.

    Of several servers that make a new database at once, some would find half of its tables.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(starting_lock(home), thread_local=False)
    while not left.is_set():
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=1)
            return lock.release
    return None


def _started(server: Any, end_turn: Callable[[], None]) -> None:
    while not (server.started or server.should_exit):
        time.sleep(0.05)
    end_turn()


def _watch(left: threading.Event) -> None:
    """Standard input is a pipe that nothing is ever written to: it ends with the command.

    Read without Python's buffer, whose lock a thread must not hold when the interpreter ends.
    """
    os.read(0, 1)
    left.set()


def _leave(left: threading.Event, server: Any) -> None:
    left.wait()
    server.should_exit = True
    time.sleep(STOP_TIMEOUT_S)
    os._exit(0)


if __name__ == "__main__":
    main()
