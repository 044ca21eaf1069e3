"""Full disks, damaged databases, failing servers, SIGTERM, five runs at once, a dead worker."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from tasks.processes import StateFile
from tests.chaos.child import Child, Event
from tests.chaos.report import NotTried, Report
from tests.chaos.server import Proxy, mlflow_server
from tests.chaos.state import State, read
from tests.flows.conftest import SMALLER
from tests.live import free_port, ours, prefect_at, relearn, wait_for

CHAIN = ("tests.chaos.chain", "chaos")
SMALL_RUN = ("flows.cli", "run", "--recipe", "smoke", *(w for c in SMALLER for w in ("--set", c)))
AT_ONCE = 5
HOME_MB = 16
"""Size of the small disk: the chain writes about a third of it."""
SLACK_S = 20.0
"""A request under way, and the way out, on a busy machine; without the start of Python."""


class Troubles:
    """The cases; `limit_s` is how long one command may take at most."""

    def __init__(self, report: Report, folder: Path, limit_s: float) -> None:
        self.report, self.folder, self.limit_s = report, folder, limit_s

    def run(self) -> None:
        """All of them."""
        plain = self.folder / "plain"
        if not self.report.case("the data chain, undisturbed", lambda: self._goes_on(plain)):
            return
        self.wanted = read(plain, at_rest=True)[0]
        case = self.report.case
        for free_kb in (64, 640):
            case(f"disk full but for {free_kb} kB", lambda kb=free_kb: self._full_disk(kb))
        case("database locked, then let go", lambda: self._locked(for_ever=False))
        case("database locked for ever", lambda: self._locked(for_ever=True))
        case("damaged mlflow.db", lambda: self._damaged("mlflow.db", CHAIN, plain))
        case("damaged prefect.db", lambda: self._damaged("prefect/prefect.db", SMALL_RUN, plain))
        with mlflow_server(self.folder / "server") as proxy:
            case("MLflow server: 500 three times", lambda: self._fails(proxy, 3))
            case("MLflow server: 500 for ever", lambda: self._never(proxy, "failing", seed=1))
            case("MLflow server: no answer", lambda: self._never(proxy, "hanging", seed=2))
        shared = self.folder / "shared"
        if case(f"{AT_ONCE} runs at once on an empty home", lambda: self._at_once(shared)):
            case("SIGTERM", lambda: self._sigterm(shared))
        case("a worker that dies with its run", lambda: self._dead_worker(self.folder / "served"))

    # ---------------------------------------------------------------- one command

    def _goes_on(self, home: Path, wanted: State | None = None, **env: str) -> list[str]:
        """The chain ends well, and with the wanted artifacts."""
        child = Child(home, CHAIN, env)
        code = child.end(self.limit_s)
        if code != 0:
            return [f"exit code {code}, not 0", child.tail()]
        if wanted is None:
            return read(home, at_rest=True)[1]
        return self._same(home)

    def _same(self, home: Path) -> list[str]:
        state, wrong = read(home, at_rest=True)
        return wrong + state.differences(self.wanted)

    def _complains(self, child: Child, *words: str) -> list[str]:
        """It ends with exit code 2 and one error that holds `words`."""
        code = child.end(self.limit_s)
        said = [line for line in child.lines if line.startswith("StoreError: got ")]
        wrong = [] if code == 2 else [f"exit code {code}, not 2"]
        if len(said) != 1 or child.lines[-1] != said[0]:
            wrong.append("it does not end with one StoreError")
        wrong += [f"the error does not say {w!r}" for w in words if not said or w not in said[0]]
        return [*wrong, child.tail()] if wrong else []

    # ---------------------------------------------------------------- disks and databases

    def _full_disk(self, free_kb: int) -> list[str]:
        with small_disk(self.folder / f"disk-{free_kb}") as home:
            ballast = home / "ballast"
            with ballast.open("wb") as out:
                out.write(b"\0" * (shutil.disk_usage(home).free - 1024 * free_kb))
            wrong = self._complains(Child(home, CHAIN), "full disk", str(home), "free space")
            wrong += read(home, at_rest=False)[1]
            ballast.unlink()
            return wrong + self._goes_on(home, self.wanted)

    def _locked(self, for_ever: bool) -> list[str]:
        home = self.folder / f"locked-{for_ever}"
        wrong = self._prepared(home)
        with closing(sqlite3.connect(home / "mlflow.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            if for_ever:
                child = Child(home, CHAIN, {"RELEARN_PATIENCE_S": "4"})
                wrong += self._complains(
                    child, "locked by another process", str(home / "mlflow.db")
                )
                other.rollback()
                return wrong + self._goes_on(home, self.wanted)
            child = Child(home, CHAIN)
            waits = child.wait_for("trying again", self.limit_s)
            other.rollback()
        code = child.end(self.limit_s)
        wrong += [] if waits else ["nothing was logged while it waited"]
        return wrong + ([f"exit code {code}", child.tail()] if code else self._same(home))

    def _prepared(self, home: Path) -> list[str]:
        """An MLflow database with tables and no artifact."""
        child = Child(home, CHAIN)
        child.wait_for(Event("ingest", 1), self.limit_s)
        child.kill()
        return read(home, at_rest=False)[1]

    def _damaged(self, name: str, command: tuple[str, ...], whole: Path) -> list[str]:
        home = self.folder / f"damaged-{Path(name).stem}"
        file = home / name
        file.parent.mkdir(parents=True)
        shutil.copy(whole / "mlflow.db", file)
        good = file.read_bytes()
        wrong = []
        for start, size in ((0, 100), (len(good) // 2, 8192)):
            file.write_bytes(good[:start] + b"\x5a" * size + good[start + size :])
            wrong += self._complains(Child(home, command), "damaged", str(file), "move it away")
        file.unlink()
        return wrong + self._goes_on(home, self.wanted)

    # ---------------------------------------------------------------- servers

    def _fails(self, proxy: Proxy, times: int) -> list[str]:
        proxy.trouble(after=20, failing=times)
        home = self.folder / "fails"
        child = Child(home, CHAIN, self._server(proxy))
        code = child.end(self.limit_s)
        wrong = [] if code == 0 else [f"exit code {code}", child.tail()]
        tried = sum("trying again" in line for line in child.lines)
        return wrong + ([] if tried == times else [f"{tried} lines of trying again, not {times}"])

    def _never(self, proxy: Proxy, how: str, seed: int) -> list[str]:
        """The server has the artifacts of the cases before: another `seed` makes its own."""
        home, command = self.folder / how, ("tests.chaos.chain", how, "--seed", str(seed))
        env = self._server(proxy) | {"RELEARN_PATIENCE_S": "4", "RELEARN_MLFLOW_TIMEOUT_S": "2"}
        proxy.trouble(after=20, **{how: 10**6})
        child = Child(home, command, env)
        child.wait_for("trying again", self.limit_s)
        began_s = time.monotonic()
        wrong = self._complains(child, proxy.url)
        took_s = time.monotonic() - began_s
        if took_s > 4 + 2 + SLACK_S:
            wrong.append(f"it took {took_s:.0f} s to give up")
        proxy.trouble()
        child = Child(home, command, self._server(proxy))
        code = child.end(self.limit_s)
        return wrong + ([f"exit code {code} afterwards", child.tail()] if code else [])

    def _server(self, proxy: Proxy) -> dict[str, str]:
        return {"RELEARN_MLFLOW_URI": proxy.url}

    # ---------------------------------------------------------------- whole runs

    def _at_once(self, home: Path) -> list[str]:
        children = [Child(home, SMALL_RUN) for _ in range(AT_ONCE)]
        wrong = []
        for child in children:
            code = child.end(AT_ONCE * self.limit_s)
            wrong += [f"exit code {code}", child.tail()] if code else []
        state, found = read(home, at_rest=True)
        return wrong + _one_of_each(state) + found

    def _sigterm(self, home: Path) -> list[str]:
        """In the middle of a stage; the changed setting makes stages that were not made yet."""
        command = (*SMALL_RUN, "--set", "judge.dpo.beta=0.2")
        child = Child(home, command)
        if not child.wait_for("judge_dpo: config changed", self.limit_s):
            return ["judge_dpo never began", child.tail()]
        child.process.send_signal(signal.SIGTERM)
        child.watch(self.limit_s)
        code = child.process.wait()
        wrong = [] if code == 143 else [f"exit code {code}, not 143"]
        wrong += (
            [] if "run the same command again" in child.text else ["it does not say what to do"]
        )
        time.sleep(1.0)
        wrong += [f"processes {left} are left"] if (left := child.left()) else []
        child.kill()
        _, found = read(home, at_rest=False)
        wrong += [*found, child.tail()] if wrong or found else []
        with closing(sqlite3.connect(home / "mlflow.db", timeout=60)) as db:
            left = db.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()[0]
        wrong += [f"{left} runs are left RUNNING"] if left else []
        wrong += ["work/ is not empty"] if list((home / "work").glob("*")) else []
        again = Child(home, command)
        code = again.end(self.limit_s)
        wrong += [f"exit code {code} afterwards", again.tail()] if code else []
        return wrong + read(home, at_rest=True)[1]

    def _dead_worker(self, home: Path) -> list[str]:
        """`relearn up`, a run through the worker, SIGKILL to both in the middle of a stage; then
        `relearn status` names the worker, `relearn up` starts it, and the next run goes on."""
        ports = ("--port-prefect", str(free_port()), "--port-mlflow", str(free_port()))
        chain = {"chain": {"recipe": "smoke", "store": "synthetic", "changes": list(SMALLER)}}
        wrong = []
        try:
            up = relearn(home, "up", *ports, limit_s=self.limit_s)
            if up.returncode:
                return ["relearn up failed", up.stdout + up.stderr]
            with prefect_at(int(ports[1])) as client:
                deployment = client.read_deployment_by_name("retrain/retrain")
                run = client.create_flow_run_from_deployment(deployment.id, parameters=chain)
                wait_for(lambda: _begun(home, "judge_cot_sft"), bool, self.limit_s)
                worker = psutil.Process(StateFile(home / "services.json").read()["worker"].pid)
                for process in (*worker.children(recursive=True), worker):
                    process.kill()
                shown = relearn(home, "status")
                told = any("Worker" in s and "ended" in s for s in shown.stdout.splitlines())
                if shown.returncode != 1 or not told:
                    wrong += ["relearn status does not say that the worker is gone", shown.stdout]
                up = relearn(home, "up", limit_s=self.limit_s)
                wrong += ["the second relearn up failed", up.stderr] if up.returncode else []
                state = client.read_flow_run(run.id).state
                wrong += [] if state.is_crashed() else [f"the dead run is {state.name}"]
                run = client.create_flow_run_from_deployment(deployment.id, parameters=chain)
                state = wait_for(
                    lambda: client.read_flow_run(run.id).state, lambda s: s.is_final(), self.limit_s
                )
                wrong += [] if state.is_completed() else [f"the next run is {state}"]
        finally:
            down = relearn(home, "down")
            wrong += ["relearn down failed", down.stderr] if down.returncode else []
            wrong += [f"processes {left} are left"] if (left := ours(home)) else []
        state, found = read(home, at_rest=True)
        return wrong + _one_of_each(state) + found


def _one_of_each(state: State) -> list[str]:
    """Nothing, or what is wrong: judge, encoder and index have one version each."""
    kinds = {name: len(versions) for name, versions in state.versions.items()}
    good = sorted(kinds.values()) == [1, 1, 1]
    return [] if good else [f"model versions {kinds}, not one of each of three"]


def _begun(home: Path, stage: str) -> bool:
    """Whether MLflow has a run of the stage."""
    with closing(sqlite3.connect(home / "mlflow.db", timeout=60)) as db:
        found = db.execute("SELECT count(*) FROM runs WHERE name = ?", (stage,)).fetchone()
    return bool(found[0])


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of HOME_MB, mounted.

    Raises:
        NotTried: not root, or no mounts are allowed here.
    """
    if os.geteuid() != 0:
        raise NotTried("mounting a small disk needs root")
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={HOME_MB}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotTried(f"no small disk can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
