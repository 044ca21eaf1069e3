"""Faults: told apart by what the libraries really raise, waited out, said in one line."""

from __future__ import annotations

import errno
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.errors import ConfigError, StoreError, TransientError
from tasks import faults
from tasks.faults import (
    LOCK_TIMEOUT_S,
    PREFECT_DB,
    Fault,
    Patient,
    classify,
    databases_ready,
    if_absent,
    if_present,
    patiently,
    told,
)
from tasks.settings import Settings

URI = "postgresql://me:hunter2@db/mlflow"


class Coded(Exception):
    """As MLflow's: with an error code."""

    def __init__(self, text: str, error_code: str) -> None:
        super().__init__(text)
        self.error_code = error_code


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.fixture
def current(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, patience_s=20.0)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; the clock moves by them alone."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=lambda: sum(pauses))
    monkeypatch.setattr(faults, "time", clock)
    return pauses


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [times]

    def call() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "done"

    return call


LOCKED = sqlite3.OperationalError("database is locked")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (LOCKED, Fault.LOCKED),
        (caused(Coded("x", "TEMPORARILY_UNAVAILABLE"), LOCKED), Fault.LOCKED),
        (sqlite3.DatabaseError("database disk image is malformed"), Fault.DAMAGED),
        (sqlite3.DatabaseError("file is not a database"), Fault.DAMAGED),
        (sqlite3.OperationalError("database or disk is full"), Fault.FULL),
        (OSError(errno.ENOSPC, "No space left on device"), Fault.FULL),
        (caused(ValueError("cannot save"), OSError(errno.EDQUOT, "quota")), Fault.FULL),
        (RuntimeError("lance error: No space left on device (os error 28)"), Fault.FULL),
        (
            Coded("API request failed: too many 500 error responses", "INTERNAL_ERROR"),
            Fault.FAILING,
        ),
        (
            Coded("API request failed: too many 429 error responses", "INTERNAL_ERROR"),
            Fault.FAILING,
        ),
        (Coded("busy", "REQUEST_LIMIT_EXCEEDED"), Fault.FAILING),
        (Coded("HTTPConnectionPool: Read timed out.", "INTERNAL_ERROR"), Fault.SILENT),
        (
            Coded(
                "(sqlite3.IntegrityError) UNIQUE constraint failed: model_version_tags.key,"
                " model_version_tags.name",
                "BAD_REQUEST",
            ),
            Fault.RACED,
        ),
        (Coded('violates unique constraint "registered_model_alias_pk"', "BAD"), Fault.RACED),
        (sqlite3.IntegrityError("UNIQUE constraint failed: runs.run_uuid"), None),
        (ConnectionRefusedError(), Fault.SILENT),
        (TimeoutError(), Fault.SILENT),
        (Coded("no such run", "RESOURCE_DOES_NOT_EXIST"), None),
        (Coded("API request failed with error code 401", "UNAUTHENTICATED"), None),
        (sqlite3.OperationalError("no such table: runs"), None),
        (ConfigError("timed out"), None),
        (TransientError("the teacher timed out"), None),
        (ValueError("a grade of 5"), None),
    ],
)
def test_what_passes_is_told_from_what_stays(error: Exception, fault: Fault | None) -> None:
    assert classify(error) is fault


def test_four_faults_pass() -> None:
    passing = {Fault.LOCKED, Fault.SILENT, Fault.FAILING, Fault.RACED}
    assert {f for f in Fault if f.passes} == passing


def test_a_failing_server_on_a_full_disk_is_a_full_disk(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    assert classify(error, current.home) is Fault.BROKEN
    monkeypatch.setattr(faults, "_free", lambda folder: 0)
    assert classify(error, current.home) is Fault.FULL
    assert classify(LOCKED, current.home) is Fault.LOCKED


def test_a_fault_that_passes_is_waited_out_with_growing_pauses(
    current: Settings, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    assert patiently(failing(3, LOCKED), current) == "done"
    assert slept == [1.0, 2.0, 4.0]
    lines = [r.message for r in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith(f"{current.home}/mlflow.db (") and "again in 1 s" in lines[0]


def test_patience_ends_with_one_error(current: Settings, slept: list[float]) -> None:
    with pytest.raises(
        StoreError, match=r"mlflow\.db, locked by another process after 15 s.*fuser"
    ):
        patiently(failing(99, LOCKED), current)
    assert slept == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (sqlite3.DatabaseError("file is not a database"), StoreError),
        (OSError(errno.ENOSPC, "x"), StoreError),
        (ValueError("a grade of 5"), ValueError),
    ],
)
def test_what_stays_is_not_tried_again(
    current: Settings, slept: list[float], error: Exception, raised: type[Exception]
) -> None:
    with pytest.raises(raised):
        patiently(failing(1, error), current)
    assert slept == []


def test_no_password_is_in_what_is_said(tmp_path: Path, slept: list[float]) -> None:
    current = Settings(home=tmp_path, mlflow_uri=URI, patience_s=0)
    error = Coded(f"{URI} timed out", "INTERNAL_ERROR")
    with pytest.raises(StoreError, match=r"postgresql://\*\*\*@db/mlflow") as caught:
        patiently(failing(1, error), current)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_methods_of_a_patient_client_are_patient(current: Settings, slept: list[float]) -> None:
    inner = SimpleNamespace(get=failing(2, LOCKED), uri="x")
    client = Patient(inner, current)
    assert client.get() == "done" and client.uri == "x" and len(slept) == 2


def test_what_is_there_already_is_no_error() -> None:
    if_absent(failing(1, Coded("there", "RESOURCE_ALREADY_EXISTS")))
    with pytest.raises(Coded):
        if_absent(failing(1, Coded("no", "PERMISSION_DENIED")))


def test_what_is_gone_already_is_no_error() -> None:
    if_present(failing(1, Coded("gone", "RESOURCE_DOES_NOT_EXIST")))
    with pytest.raises(Coded):
        if_present(failing(1, Coded("no", "PERMISSION_DENIED")))


@pytest.mark.parametrize("name", ["mlflow.db", str(PREFECT_DB)])
@pytest.mark.parametrize("harm", ["header", "page"])
def test_a_damaged_database_is_named_with_what_to_do(
    current: Settings, monkeypatch: pytest.MonkeyPatch, name: str, harm: str
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    file = make_database(current.home / name)
    databases_ready(current)
    raw = bytearray(file.read_bytes())
    start, size = (0, 64) if harm == "header" else (len(raw) - 4096, 4096)
    raw[start : start + size] = b"\x5a" * size
    file.write_bytes(raw)
    with pytest.raises(StoreError, match=r"damaged database .*recover.*move it away") as caught:
        databases_ready(current)
    assert str(file) in str(caught.value)


def test_a_lock_that_is_let_go_is_waited_out(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_database(current.home / "mlflow.db")
    monkeypatch.setattr(faults, "LOCK_TIMEOUT_S", 0.0)
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        pauses = []

        def let_go(pause_s: float) -> None:
            pauses.append(pause_s)
            other.rollback()

        clock = SimpleNamespace(sleep=let_go, monotonic=time.monotonic)
        monkeypatch.setattr(faults, "time", clock)
        databases_ready(current)
    assert pauses == [1.0]
    assert LOCK_TIMEOUT_S > 0


def test_another_prefect_server_is_not_our_file(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    file = current.home / PREFECT_DB
    file.parent.mkdir()
    file.write_bytes(b"\x5a" * 4096)
    databases_ready(current)


def test_only_a_full_disk_and_prefect_are_told_of_a_run(current: Settings) -> None:
    assert told(ValueError("a grade of 5"), current) is None
    assert told(ConnectionRefusedError("a teacher"), current) is None
    full = told(OSError(errno.ENOSPC, "x"), current)
    assert full is not None and "free space there" in str(full)
    late = RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")
    assert "Prefect's server" in str(told(late, current))


@pytest.mark.parametrize("error", ["ConnectError", "RemoteProtocolError", "ReadTimeout"])
def test_an_unreachable_prefect_server_is_named(
    current: Settings, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    import httpx

    url = "http://127.0.0.1:9/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    texts = {
        "ConnectError": "All connection attempts failed",
        "RemoteProtocolError": "Server disconnected without sending a response.",
        "ReadTimeout": "",
    }

    def raised(address: str) -> Exception:
        made = getattr(httpx, error)(texts[error], request=httpx.Request("GET", address))
        return caused(made, TimeoutError()) if error == "ReadTimeout" else made

    said = rf"got no answer from .*PREFECT_API_URL={url} .*; expected an answer; do this: see that"
    at_start = caused(RuntimeError(f"Failed to reach API at {url}/"), raised(f"{url}/version"))
    for trouble in (at_start, raised(f"{url}/flow_runs")):
        assert re.match(said, str(told(trouble, current)))
    assert told(raised("http://127.0.0.1:8/v1/chat"), current) is None


def make_database(file: Path) -> Path:
    """A sqlite file of some pages."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE rows (text TEXT)")
        database.executemany("INSERT INTO rows VALUES (?)", [("x" * 500,)] * 60)
        database.commit()
    return file
