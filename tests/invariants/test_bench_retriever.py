"""The retriever's benchmark on a small catalogue: its parts run, print what they measure, and
leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.bench_retriever import run

REPOSITORY = Path(__file__).resolve().parents[2]


def bench(arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "tests" / "benchmarks" / "bench_retriever.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments.split()],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_its_parts_print_one_figure_a_line() -> None:
    done = bench("1000 --parts refresh kinds --kinds exact ivf_flat --dim 16 --budget 120")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert all(len(row) == 3 and row[0].startswith("retriever/") for row in rows)
    got = {name.removeprefix("retriever/"): float(value) for name, value, _ in rows}
    assert got["1000/exact/recall_at_10"] == 1.0
    assert 0.9 < got["1000/ivf_flat/recall_at_10"] <= 1.0
    for part in ("1000/exact/query_p50", "1000/ivf_flat/build", "1000/ivf_flat/peak_memory"):
        assert got[part] > 0, part
    assert got["1000/refresh/one_percent_share"] > 0, "a refresh against a rebuild"


def test_what_the_budget_leaves_out_is_named_and_fails() -> None:
    done = bench("1000 --parts kinds --kinds exact --dim 16 --budget 0.01")
    assert done.returncode == 1, done.stderr[-2000:]
    scan, kind = done.stdout.splitlines()
    assert scan == "left out, over budget: kinds numpy_scan 1000 16; raise --budget"
    assert kind == "left out, over budget: kinds one_kind exact 1000 16; raise --budget"


def hang(at: Path) -> None:
    """A part that writes its folder's name to `at`, and never ends."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows").write_text("many")
        at.with_suffix(".part").write_text(folder)
        at.with_suffix(".part").replace(at)
        time.sleep(600)


def test_the_files_of_a_part_that_is_ended_go_with_it(tmp_path: Path) -> None:
    at = tmp_path / "at"
    for budget_s in (3, 10, 60):  # until it got so far
        left_out = run(
            [("hang", hang, (at,)), ("after", hang, (at,))], time.perf_counter() + budget_s
        )
        if at.is_file():
            break
    assert left_out == [f"hang hang {at}", f"after hang {at}"]
    assert not Path(at.read_text()).exists()
