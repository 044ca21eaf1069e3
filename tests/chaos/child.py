"""A command in a session of its own, read line by line while it runs, and ended with its group."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = ("flows.cli", "run", "--recipe", "smoke")
"""Arguments of python -m."""
_BEGUN = re.compile(
    r"\bcached: (?P<cached>\w+)@[0-9a-f]{12} made|"
    r"\b(?P<made>\w+): (?:first time|config changed|code changed|parent |files (?:missing|altered))"
)
"""What tasks/stage.py logs of a stage, found or begun."""
STAGES = frozenset(
    "ingest validate base_model judge_prompt judge_teacher judge_cot_sft judge_probe "
    "judge_pass_at_n judge_dpo judge_grpo judge judge_answers evaluate_judge embedder_sft "
    "embedder_rgrpo index evaluate_retrieval".split()
)


@dataclass(frozen=True)
class Event:
    """The nth call of a stage begins, or is found cached."""

    stage: str
    nth: int


class Child:
    """`python -m ARGUMENTS` at a home."""

    def __init__(self, home: Path, arguments: Sequence[str], env: Mapping[str, str] = {}) -> None:
        own = ("RELEARN_", "PREFECT_", "MLFLOW_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
        if weights := os.environ.get("RELEARN_WEIGHTS"):
            clean["RELEARN_WEIGHTS"] = weights
        fixed = {
            "RELEARN_HOME": str(home),
            "RELEARN_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1",
            "NO_COLOR": "1",
            "COLUMNS": "4000",
        }
        self.began_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env={**clean, **fixed, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines: list[str] = []
        self.events: list[tuple[Event, float]] = []
        """Each with the seconds since the start."""
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._counts: Counter[str] = Counter()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, text: str | Event, timeout_s: float) -> bool:
        """Whether a line with `text` (or that event) came before the end, and in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return False
            if line is None:
                self._queue.put(None)
                return False
            self.lines.append(line)
            event = self._event(line)
            if event is not None:
                self.events.append((event, time.monotonic() - self.began_s))
            if event == text or (isinstance(text, str) and text in line):
                return True

    def watch(self, seconds: float) -> None:
        """Read on until it ends, for at most so long."""
        self.wait_for("\0", seconds)

    def _event(self, line: str) -> Event | None:
        found = _BEGUN.search(line)
        name = (found["cached"] or found["made"]) if found else None
        if name not in STAGES:
            return None
        self._counts[name] += 1
        return Event(name, self._counts[name])

    def end(self, timeout_s: float) -> int | None:
        """The exit code; None where it did not end in time, and it is killed."""
        self.watch(timeout_s)
        try:
            code: int | None = self.process.wait(
                max(0.1, timeout_s - (time.monotonic() - self.began_s))
            )
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        return code

    def kill(self) -> None:
        """SIGKILL to the whole group, and wait until none of it is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while self.left():
            time.sleep(0.02)

    def left(self) -> list[int]:
        """Processes of its session that still run."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid and process.status() != "zombie":
                    found.append(process.pid)
        return found

    @property
    def text(self) -> str:
        """All it said so far."""
        return "\n".join(self.lines)

    def tail(self, lines: int = 12) -> str:
        """Its last lines, for a person."""
        return "\n".join(f"      | {line[:300]}" for line in self.lines[-lines:])
