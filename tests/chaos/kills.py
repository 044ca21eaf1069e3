"""SIGKILL at random moments of a run, each time continued from the same home.

The moments are drawn uniformly over the length of an undisturbed run and put in order. Each is kept
as "so long after the nth call of that stage began", because a continued run passes the finished
stages in milliseconds: so the kills are spread over the work, and every long stage is hit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.child import RUN, Child, Event
from tests.chaos.report import Report
from tests.chaos.state import State, read

START = Event("start", 0)


@dataclass(frozen=True)
class Moment:
    """When to kill."""

    event: Event
    after_s: float

    def __str__(self) -> str:
        return f"{self.after_s:.1f} s into {self.event.stage} {self.event.nth}"


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    command: Sequence[str]
    state: State
    events: list[tuple[Event, float]]
    seconds: float


def undisturbed(home: Path, limit_s: float, command: Sequence[str] = RUN) -> Reference:
    """Run once, to the end, and read what it made.

    Raises:
        SystemExit: it did not end well: then there is nothing to compare with.
    """
    child = Child(home, command)
    code = child.end(limit_s)
    seconds = time.monotonic() - child.began_s
    state, wrong = read(home, at_rest=True)
    if code != 0 or wrong:
        raise SystemExit(f"the undisturbed run: exit code {code}, {wrong}\n{child.tail(40)}")
    return Reference(command, state, [(START, 0.0), *child.events], seconds)


def moments(reference: Reference, kills: int, seed: int) -> list[Moment]:
    """`kills` moments in order, drawn uniformly over the reference's length."""
    rng = random.Random(seed)
    drawn = sorted(rng.uniform(0.0, reference.seconds) for _ in range(kills))
    out = []
    for moment_s in drawn:
        event, began_s = [e for e in reference.events if e[1] <= moment_s][-1]
        out.append(Moment(event, moment_s - began_s))
    return out


def campaign(
    report: Report, home: Path, reference: Reference, kills: int, seed: int, limit_s: float
) -> None:
    """`kills` cases, and one that the finished home equals the undisturbed one."""
    for number, moment in enumerate(moments(reference, kills, seed), 1):
        report.case(
            f"SIGKILL {number}, {moment}", lambda m=moment: _kill(home, reference, m, limit_s)
        )
    report.case("state after all kills", lambda: _finish(home, reference, limit_s))


def _kill(home: Path, reference: Reference, moment: Moment, limit_s: float) -> list[str]:
    """Continue, kill at the moment, and look that nothing half-made can be read."""
    after_s = moment.after_s
    while True:
        child = Child(home, reference.command)
        came = moment.event == START or child.wait_for(moment.event, limit_s)
        # the stage may have got further in an earlier attempt: then the rest is shorter
        if came:
            child.watch(after_s)
            if child.process.poll() is None:
                child.kill()
                return read(home, at_rest=False)[1]
        code = child.end(limit_s)
        if code != 0:
            return [f"the continued run ended by itself with exit code {code}", child.tail()]
        if not came:
            return [f"the continued run never came to {moment.event}", child.tail()]
        after_s /= 2  # it was finished already: kill it earlier


def _finish(home: Path, reference: Reference, limit_s: float) -> list[str]:
    child = Child(home, reference.command)
    code = child.end(limit_s)
    if code != 0:
        return [f"exit code {code}", child.tail()]
    state, wrong = read(home, at_rest=True)
    return wrong + state.differences(reference.state)
