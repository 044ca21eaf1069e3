"""SIGTERM is a clean stop: said in a line, exit code 143, nothing half-made left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.artifacts import ArtifactStore
from tasks.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD = """
import threading
from flows.console import guarded
from tasks.stage import pipeline, stage

@stage(name="slow", kind="text")
def slow(ctx, config):
    (ctx.scratch / "checkpoint").write_text("1")
    (ctx.out / "half.txt").write_text("h")
    print("began", flush=True)
    threading.Event().wait(600)

def body():
    with pipeline("chain"):
        slow.make(config=1)

guarded(body)
"""
IN_A_FLOW = """
import threading
from prefect.utilities.engine import capture_sigterm
from flows.console import guarded

def body():
    with capture_sigterm(), capture_sigterm():  # as Prefect has it in a flow, and in one inside
        print("began", flush=True)
        threading.Event().wait(600)

guarded(body)
"""
IN_A_DESTRUCTOR = """
import sys, threading, time
from contextlib import nullcontext
from prefect.utilities.engine import capture_sigterm
from flows.console import guarded

class Slow:
    def __del__(self):
        print("began", flush=True)
        time.sleep(3)

def body():
    with capture_sigterm() if sys.argv[1] == "flow" else nullcontext():
        first, second = Slow(), Slow()
        del first
        del second  # SIGTERM was lost in one of them, and comes again in the other or after both
        threading.Event().wait(600)

guarded(body)
"""
FAILING = """
import errno, sys
from flows.console import guarded

def body():
    if sys.argv[1] == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    raise ValueError("a grade of 5")

guarded(body)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_closes_what_is_open(current: Settings) -> None:
    child = start(CHILD)
    assert child.stdout is not None
    assert child.stdout.readline() == "began\n"
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate()
    assert child.returncode == 143
    assert err.splitlines()[-1].endswith("run the same command again and it goes on")
    assert "Traceback" not in err
    store = ArtifactStore(current)
    runs = store.search("attributes.start_time > 0")
    assert {r.data.tags["mlflow.runName"] for r in runs} == {"chain", "slow"}
    assert {r.info.status for r in runs} == {"KILLED"}
    assert list((current.home / "work").iterdir()) == []
    (scratch,) = (current.home / "scratch").iterdir()
    assert (scratch / "checkpoint").exists()


def test_prefects_own_handler_ends_in_ours(home: Path) -> None:
    child = start(IN_A_FLOW)
    assert child.stdout is not None
    assert child.stdout.readline() == "began\n"
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate()
    assert child.returncode == 143
    assert err.splitlines()[-1].endswith("run the same command again and it goes on")


@pytest.mark.parametrize("where", ["flow", "outside"])
def test_a_signal_that_a_destructor_lost_comes_again(home: Path, where: str) -> None:
    child = start(IN_A_DESTRUCTOR, where)
    assert child.stdout is not None
    assert child.stdout.readline() == "began\n"
    child.send_signal(signal.SIGTERM)
    try:
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 143
    assert err.splitlines()[-1].endswith("run the same command again and it goes on")
    assert "Exception ignored" not in err


@pytest.mark.parametrize(("how", "code"), [("full", 2), ("unknown", 1)])
def test_a_fault_is_a_line_and_a_bug_a_traceback(home: Path, how: str, code: int) -> None:
    child = start(FAILING, how)
    _, err = child.communicate()
    assert child.returncode == code
    assert ("Traceback" in err) == (how == "unknown")
    assert err.startswith("StoreError: got a full disk") == (how == "full")
