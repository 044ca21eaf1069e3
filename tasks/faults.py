"""Faults of a disk, a database or a server: which pass by themselves, what to say of the others.

Consumes exceptions -> produces one `Fault` each, or none: then it is no such fault. This module
alone tells them apart. `patiently` waits out those that pass, with a growing pause, and every
wait is logged; what does not pass, or not in time, is one `StoreError`. Secrets in addresses are
masked. Light: it knows the libraries' exceptions by their texts and codes, and imports none.
"""

from __future__ import annotations

import enum
import errno
import functools
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from models.errors import RelearnError, StoreError, explain
from tasks.settings import Settings, masked

T = TypeVar("T")
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 15.0
LOCK_TIMEOUT_S = 5.0
CHECKED_BYTES = 256 << 20
"""Larger sqlite files are not read whole before a run: a second for each gigabyte or two."""
PREFECT_DB = Path("prefect") / "prefect.db"
FULL_BYTES = 1 << 20
"""With less free than this a database error is put down to the disk."""

log = logging.getLogger(__name__)


class Fault(enum.Enum):
    """What is wrong. `passes`: whether waiting may help."""

    LOCKED = ("a database that another process keeps locked", True)
    SILENT = ("no answer", True)
    FAILING = ("a server that fails", True)
    RACED = ("a row that another process wrote at the same moment", True)
    FULL = ("a full disk", False)
    DAMAGED = ("a damaged database", False)
    BROKEN = ("a disk that does not read or write", False)

    def __init__(self, what: str, passes: bool) -> None:
        self.what, self.passes = what, passes


_TEXTS = (
    (Fault.FULL, r"no space left on device|disk is full|disk quota exceeded|failed writing file"),
    (Fault.DAMAGED, r"database disk image is malformed|file is not a database|malformed database"),
    (Fault.BROKEN, r"disk I/O error|unable to open database file|readonly database"),
    (Fault.LOCKED, r"database (table |schema )?is (locked|busy)"),
    # MLflow looks for a tag or an alias, then adds it; a second look finds it
    (Fault.RACED, r"(unique constraint failed: |violates unique constraint .)\w*(tag|alias)"),
    (Fault.FAILING, r"too many (408|429|5\d\d) error responses|Server error '5\d\d"),
    (
        Fault.SILENT,
        r"timed out|max retries exceeded|connection (refused|reset|aborted)"
        r"|server closed the connection|connection to server .* failed"
        r"|failed to reach API at|all connection attempts failed|server disconnected",
    ),
)
_CODES = {
    "TEMPORARILY_UNAVAILABLE": Fault.FAILING,
    "REQUEST_LIMIT_EXCEEDED": Fault.FAILING,
}
"""MLflow's words for what passes."""
FULL_ERRNO = (errno.ENOSPC, errno.EDQUOT)


def classify(error: BaseException, home: Path | None = None) -> Fault | None:
    """The fault behind `error` or behind what caused it, None when it is none of these.

    home: a server or database that fails while this folder's disk has no room left has a full disk.
    """
    if isinstance(error, RelearnError):
        return None
    chain = list(_chain(error))
    if any(isinstance(link, OSError) and link.errno in FULL_ERRNO for link in chain):
        return Fault.FULL
    text = "\n".join(str(link) for link in chain)
    found = next((f for f, pattern in _TEXTS if re.search(pattern, text, re.IGNORECASE)), None)
    if found is None:
        found = next((_CODES[c] for c in map(_code, chain) if c in _CODES), None)
    if found is None and any(isinstance(link, ConnectionError | TimeoutError) for link in chain):
        found = Fault.SILENT
    if found in (Fault.FAILING, Fault.BROKEN) and home is not None and _free(home) < FULL_BYTES:
        return Fault.FULL
    return found


def told(error: BaseException, current: Settings) -> StoreError | None:
    """`error` in the house form where a full disk or Prefect's server is behind it, else None.

    The tracking store's faults were told by `patiently` already.
    """
    fault = classify(error, current.home)
    if fault is Fault.FULL:
        return _say(fault, error, current, str(current.home), 0.0)
    if fault is not None and any(_of_prefect(link) for link in _chain(error)):
        where = current.prefect_api_url and masked(current.prefect_api_url)
        where = where or f"Prefect's server on {current.home / PREFECT_DB}"
        url = os.environ.get("PREFECT_API_URL")
        if fault is Fault.SILENT and url:
            where = f"Prefect's server at PREFECT_API_URL={masked(url)}"
        return _say(fault, error, current, where, 0.0)
    return None


def patiently(call: Callable[[], T], current: Settings, where: str | None = None) -> T:
    """What `call` returns; a fault that passes is waited out, `current.patience_s` from the first.

    Raises:
        StoreError: a fault that stays, or does not pass in time. Any other error as it is.
    """
    began_s: float | None = None
    for pause_s in _pauses():
        try:
            return call()
        except Exception as error:
            fault = classify(error, current.home)
            if fault is None:
                raise
            began_s = time.monotonic() if began_s is None else began_s
            waited_s = time.monotonic() - began_s
            trouble = _say(fault, error, current, where, waited_s)
        # outside the handler: the library's error may hold an address with a password
        if not fault.passes or waited_s + pause_s > current.patience_s:
            raise trouble
        log.warning(
            "%s (%s); trying again in %.0f s, for %.0f s more",
            where or place_of(current),
            fault.what,
            pause_s,
            current.patience_s - waited_s,
        )
        time.sleep(pause_s)
    raise AssertionError("unreachable: the pauses never end")


def databases_ready(current: Settings) -> None:
    """Return when the sqlite files of MLflow and of Prefect's own server can be written.

    On a file that is damaged or locked Prefect starts its server again and again, for ever.

    Raises:
        StoreError: a damaged file, or one that stays locked.
    """
    files = [sqlite_file(current.tracking_uri)]
    if not os.environ.get("PREFECT_API_URL"):
        files.append(current.home / PREFECT_DB)
    for file in files:
        if file is not None:
            patiently(functools.partial(probe, file), current, str(file))


def sqlite_file(uri: str) -> Path | None:
    """The file behind a database address, None where there is none."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None


def probe(file: Path) -> None:
    """Return when `file` is a whole sqlite file that can be written now, or not there yet.

    Raises:
        sqlite3.Error: it is locked, damaged, or cannot be written.
    """
    if not file.is_file() or not file.stat().st_size:
        return
    with closing(sqlite3.connect(file, timeout=LOCK_TIMEOUT_S)) as database:
        database.execute("BEGIN IMMEDIATE")
        if file.stat().st_size > CHECKED_BYTES:
            database.execute("SELECT count(*) FROM sqlite_master")
            return
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"malformed database: {found}")


class Patient:
    """An object whose methods are called `patiently`: the MLflow client, as everyone uses it."""

    def __init__(self, inner: Any, current: Settings) -> None:
        self._inner, self._current = inner, current

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            return patiently(lambda: found(*args, **kwargs), self._current)

        return call


def scrub(error: BaseException) -> None:
    """Mask the secrets in an error and in what caused it: whoever prints it, prints none."""
    for link in _chain(error):
        link.args = tuple(masked(arg) if isinstance(arg, str) else arg for arg in link.args)
        if isinstance(link, OSError) and isinstance(link.strerror, str):
            link.strerror = masked(link.strerror)


def if_absent(create: Callable[[], object]) -> None:
    """Call `create`; what is there already is fine: an answer was lost, or another was quicker."""
    _unless("RESOURCE_ALREADY_EXISTS", create)


def if_present(remove: Callable[[], object]) -> None:
    """The same of `remove` and what is gone already."""
    _unless("RESOURCE_DOES_NOT_EXIST", remove)


def _unless(code: str, call: Callable[[], object]) -> None:
    try:
        call()
    except Exception as error:
        if _code(error) != code:
            raise


def place_of(current: Settings) -> str:
    """The tracking store as a person finds it: a file, or an address without its password."""
    return str(sqlite_file(current.tracking_uri) or masked(current.tracking_uri))


def _say(
    fault: Fault, error: BaseException, current: Settings, where: str | None, waited_s: float
) -> StoreError:
    where = where or place_of(current)
    waited = f" after {waited_s:.0f} s" if fault.passes and waited_s >= 1 else ""
    again = "run it again and it goes on"
    if fault is Fault.FULL:
        got = f"a full disk: {_free(current.home) / 1e6:.1f} MB free under {current.home}"
        do = f"free space there, then {again}: finished stages and checkpoints are kept"
        return StoreError(explain(got, "room to write", do))
    if fault is Fault.DAMAGED:
        lost = "Prefect's pages of past runs" if where.endswith(str(PREFECT_DB)) else "its records"
        do = f"put a backup of it back, or save its rows with `sqlite3 {where} .recover`, or move "
        do += f"it away: {lost} are lost then, and `relearn run` makes what is missing"
        return StoreError(explain(f"a damaged database {where}", "a whole sqlite file", do))
    if fault is Fault.LOCKED:
        do = f"find who holds it (`fuser -v {where}`), end that process, then {again}"
        return StoreError(explain(f"{where}, locked by another process{waited}", "its turn", do))
    reason = masked(str(error).splitlines()[0] if str(error) else type(error).__name__)[:300]
    do = f"see that it runs and can be reached, then {again}"
    return StoreError(explain(f"{fault.what} from {where}{waited} ({reason})", "an answer", do))


def _pauses() -> Iterator[float]:
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what caused it, what caused that."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _of_prefect(error: BaseException) -> bool:
    words = ("Prefect", "Failed to reach API at")
    named = type(error).__module__.startswith("prefect") or any(w in str(error) for w in words)
    url = os.environ.get("PREFECT_API_URL")
    return named or bool(url and _asked(error).startswith(url))


def _asked(error: BaseException) -> str:
    """The address that an error of httpx is about, "" of any other error."""
    try:
        return str(error.request.url)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return ""


def _code(error: BaseException) -> str:
    """MLflow's error code, "" where there is none."""
    code = getattr(error, "error_code", "")
    return code if isinstance(code, str) else ""


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
