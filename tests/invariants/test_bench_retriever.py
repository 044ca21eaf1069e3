"""The retriever's benchmark on a small catalogue: its parts run and print what they measure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_its_parts_print_one_figure_a_line() -> None:
    script = REPOSITORY / "tests" / "benchmarks" / "bench_retriever.py"
    arguments = "1000 --parts refresh kinds --kinds exact ivf_flat --dim 16 --budget 120".split()
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "over budget" not in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert all(len(row) == 3 and row[0].startswith("retriever/") for row in rows)
    got = {name.removeprefix("retriever/"): float(value) for name, value, _ in rows}
    assert got["1000/exact/recall_at_10"] == 1.0
    assert 0.9 < got["1000/ivf_flat/recall_at_10"] <= 1.0
    for part in ("1000/exact/query_p50", "1000/ivf_flat/build", "1000/ivf_flat/peak_memory"):
        assert got[part] > 0, part
    assert got["1000/refresh/one_percent_share"] > 0, "a refresh against a rebuild"
