"""The judge's benchmark on a tiny model: every comparison runs, and its two sides agree."""

from __future__ import annotations

import pytest

from tests.benchmarks import bench_judge


def figures(text: str) -> dict[str, float]:
    """{name: value} of the lines `judge/name value unit`."""
    rows = [line.split() for line in text.splitlines() if line.startswith("judge/")]
    return {name.removeprefix("judge/"): float(value) for name, value, _ in rows}


def test_every_comparison_is_of_equal_things(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--threads", "1", "--turns", "1", "--minutes", "0"]
    bench_judge.main(arguments)
    got = figures(capsys.readouterr().out)
    assert got["scoring/probability_gap"] < 1e-4
    for stage in ("grpo", "dpo", "sft", "grpo/G2"):
        assert got[f"{stage}/loss_gap"] < 1e-4
        assert got[f"{stage}/gradient_gap"] < 1e-3
    assert got["scoring/K1/token_ratio"] == 1 < got["scoring/K4/token_ratio"] < 4
    assert 1 < got["grpo/G2/token_ratio"] < 2 < got["grpo/token_ratio"] < 8
    parts = ("scoring", "grpo", "dpo", "sft", "scoring/K1", "scoring/K4", "scoring/prefix20")
    assert all(got[f"{part}/speedup"] > 0 and got[f"{part}/turns"] == 1 for part in parts)


def test_turns_alternate_and_the_median_ratio_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    seconds = iter([1.0, 2.0, 30.0, 10.0, 1.0, 90.0])  # A B, B A, A B: 2, 3 and 90 times

    def timed(side: object) -> tuple[float, float]:
        calls.append(side())  # type: ignore[operator]
        spent = next(seconds)
        return spent, spent

    monkeypatch.setattr(bench_judge, "_seconds", timed)
    clock = bench_judge.Clock(minutes=5, turns=3)
    assert clock.compare("x", lambda: "a", lambda: "b") == 3.0
    assert "".join(calls) == "abbaab"
    assert figures(capsys.readouterr().out) == {"x/speedup": 3, "x/speedup_cpu": 3, "x/turns": 3}
