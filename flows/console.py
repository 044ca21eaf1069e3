"""What every command of `relearn` shares: the terminal, options, the home, one-line errors."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from models.errors import ConfigError, RelearnError, explain
from tasks import temporary
from tasks.faults import databases_ready, told
from tasks.settings import prepare_environment, settings

console = Console(width=None if sys.stdout.isatty() else 150)

Home = Annotated[
    Path | None,
    typer.Option("--home", help="Folder for what relearn makes and records. [default: .relearn]"),
]
StoreName = Annotated[
    str,
    typer.Option(
        "--store",
        help="Name of the store: as given to `relearn run`; of the smoke recipe, STORE-smoke.",
        show_default=True,
    ),
]


AGAIN_S = 0.05
"""How long after a SIGTERM was lost it is sent again: a destructor has ended by then, or the next
one loses it as well."""


class Terminated(SystemExit):
    """SIGTERM, as an exception: what is open is closed on the way out."""


class NoTraceback(logging.Filter):
    """Of a user's mistake Prefect logs the message, not the way there: it is said once more, in a
    line, at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        if record.exc_info and isinstance(record.exc_info[1], RelearnError):
            record.exc_info = None
        return True


NO_TRACEBACK = NoTraceback()


def guarded(body: Callable[[], object]) -> None:
    """Call `body`; a user's mistake, a fault or SIGTERM is one line, not a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _dropped
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(NO_TRACEBACK)
    try:
        body()
    except Terminated:
        _complain("Terminated", "stopped by SIGTERM; run the same command again and it goes on")
        raise
    except Exception as error:
        known = error if isinstance(error, RelearnError) else told(error, settings())
        if known is None:
            raise
        _complain(type(known).__name__, str(known))
        sys.exit(2)


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # the way out is not interrupted
    raise Terminated(128 + number)


def _dropped(what: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised inside a destructor: a SIGTERM among it is sent once more."""
    kinds: tuple[type[BaseException], ...] = (Terminated,)
    if prefect := sys.modules.get("prefect.exceptions"):  # in a flow the handler is Prefect's
        kinds += (prefect.TerminationSignal,)
    if not isinstance(what.exc_value, kinds):
        sys.__unraisablehook__(what)
        return
    if isinstance(what.exc_value, Terminated):
        signal.signal(signal.SIGTERM, _terminate)
    again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True
    again.start()


def _complain(kind: str, text: str) -> None:
    Console(stderr=True).print(f"[bold red]{kind}[/]: {escape(text)}", highlight=False)


def prepare(home: Path | None, data: Path | None = None, **extra: str) -> None:
    """Point the environment at `home` and `data`, before any library reads it.

    Raises:
        ConfigError: `data` is no folder.
    """
    if home is not None:
        os.environ["RELEARN_HOME"] = str(home.expanduser().resolve())
    if data is not None:
        if not data.expanduser().is_dir():
            raise ConfigError(explain(f"--data {data}", "a folder of source files", "fix the path"))
        os.environ["RELEARN_DATA_DIR"] = str(data.expanduser().resolve())
    os.environ.update(extra)
    from tasks.services import use_running_servers

    current = settings()
    use_running_servers(current)
    prepare_environment(current)


def start_server() -> temporary.TemporaryServer | None:
    """`temporary.start`, once the databases can be written: before anything imports Prefect.

    Raises:
        StoreError: a damaged database, or one that stays locked.
    """
    databases_ready(settings())
    return temporary.start(settings())


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
