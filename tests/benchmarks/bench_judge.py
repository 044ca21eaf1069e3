"""The judge's shared-prefix engine against the plain forward and TRL's trainers.

    python tests/benchmarks/bench_judge.py [--tiny] [--full] [--weights DIR] [--minutes 6]
                                           [--only scoring grpo dpo sft growth]

Prints one figure a line, `name value unit`; progress and the machine go to stderr. Every speed is
a ratio inside one run: the two sides take turns (A B, B A, ...) on one model in one process, the
ratio is taken within each turn, and the median turn counts: what else the machine does hits both.
`speedup` compares wall clock, `speedup_cpu` CPU seconds: on a busy machine believe the latter.
`token_ratio` is what sharing saves in tokens, on any machine. `loss_gap` and `gradient_gap` show
that both sides computed the same thing. Warm-up is not counted.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.benchmarks.judge_sides import Bench, Shape
from tests.builders import make_pairs, make_tiny_judge

PARTS = ("scoring", "grpo", "dpo", "sft", "growth")
FOLDER = Path(os.environ.get("RELEARN_WEIGHTS", "~/.cache/relearn/weights"))
WEIGHTS = FOLDER / "smollm2-135m-instruct"
SIZES = {"queries": 2, "prefix": 300, "products": 16, "group": 8, "response": 32}
TINY = Shape(queries=2, products=4, prefix=60, group=4, response=6)


def show(name: str, value: float, unit: str) -> None:
    print(f"judge/{name} {value:.4g} {unit}", flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Clock:
    """Takes turns until the benchmark's time is up; each comparison gets one turn at least."""

    def __init__(self, minutes: float, turns: int) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.turns = turns

    def compare(self, name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
        """Print speedup and speedup_cpu of `ours` over `theirs`; returns the wall-clock one."""
        ratios: list[tuple[float, float]] = []
        while len(ratios) < self.turns and (not ratios or time.monotonic() < self.end):
            sides = [ours, theirs] if len(ratios) % 2 == 0 else [theirs, ours]
            spent = {side: _seconds(side) for side in sides}
            wall, cpu = (b / a for a, b in zip(spent[ours], spent[theirs], strict=True))
            ratios.append((wall, cpu))
            say(f"{name}: {spent[ours][0]:.2f} s, {spent[theirs][0]:.2f} s, {wall:.2f} times")
        wall, cpu = (statistics.median(r) for r in zip(*ratios, strict=True))
        show(f"{name}/speedup", wall, "ratio")
        show(f"{name}/speedup_cpu", cpu, "ratio")
        show(f"{name}/turns", len(ratios), "turns")
        return wall


def _seconds(side: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call."""
    started, cpu = time.perf_counter(), time.process_time()
    side()
    return time.perf_counter() - started, time.process_time() - cpu


def clean(bench: Bench, step: Callable[[], Any]) -> Callable[[], Any]:
    """`step` with the gradients of the one before it dropped."""

    def run() -> Any:
        bench.lm.zero_grad()
        return step()

    return run


def scoring(make: Callable[[Shape], Bench], shape: Shape, clock: Clock, name: str) -> None:
    warm = make(replace(shape, queries=1, products=2))
    gap = (warm.score_ours() - warm.score_plain()).abs().max().item()
    show(f"{name}/probability_gap", gap, "probability")
    del warm
    bench = make(shape)
    show(f"{name}/prompt", bench.prompt_tokens, "tokens")
    show(f"{name}/token_ratio", bench.token_ratio(0), "ratio")
    clock.compare(name, bench.score_ours, bench.score_plain)


def grpo(make: Callable[[Shape], Bench], shape: Shape, clock: Clock, name: str) -> None:
    warm = make(replace(shape, queries=1, products=1, group=2, response=2))
    warm.grpo_ours()
    theirs, trainer = warm.grpo_trl()
    theirs()
    _gaps(name, warm.grpo_gaps(trainer))
    del warm, theirs, trainer
    bench = make(replace(shape, products=1))
    theirs, _ = bench.grpo_trl()
    show(f"{name}/prompt", bench.prompt_tokens, "tokens")
    show(f"{name}/token_ratio", bench.token_ratio(shape.group), "ratio")
    clock.compare(name, clean(bench, bench.grpo_ours), clean(bench, theirs))


def dpo(make: Callable[[Shape], Bench], shape: Shape, clock: Clock, name: str) -> None:
    warm = make(replace(shape, queries=1, products=1, response=4))
    _gaps(name, warm.gap(warm.dpo_ours, warm.dpo_trl()))
    del warm
    bench = make(replace(shape, products=2))
    theirs = bench.dpo_trl()
    show(f"{name}/prompt", bench.prompt_tokens, "tokens")
    show(f"{name}/token_ratio", bench.token_ratio(2), "ratio")
    clock.compare(name, clean(bench, bench.dpo_ours), clean(bench, theirs))


def sft(make: Callable[[Shape], Bench], shape: Shape, clock: Clock, name: str) -> None:
    warm = make(replace(shape, queries=1, products=2, response=4))
    _gaps(name, warm.gap(warm.sft_ours, warm.sft_trl()))
    del warm
    bench = make(replace(shape, products=4))
    theirs = bench.sft_trl()
    show(f"{name}/prompt", bench.prompt_tokens, "tokens")
    show(f"{name}/token_ratio", bench.token_ratio(1), "ratio")
    clock.compare(name, clean(bench, bench.sft_ours), clean(bench, theirs))


def growth(make: Callable[[Shape], Bench], shape: Shape, clock: Clock, full: bool) -> None:
    """How the ratios grow with K, G and the prefix; one query or prompt, so that it stays short."""
    one = replace(shape, queries=1)
    largest_k, largest_g = shape.products, shape.group
    for products in (largest_k // 4, largest_k, *([4 * largest_k] if full else [])):
        scoring(make, replace(one, products=products), clock, f"scoring/K{products}")
    for prefix in (shape.prefix // 3, *([3 * shape.prefix] if full else [])):
        scoring(make, replace(one, prefix=prefix), clock, f"scoring/prefix{prefix}")
        if full:
            grpo(make, replace(one, prefix=prefix), clock, f"grpo/prefix{prefix}")
    for group in (largest_g // 2, *([2 * largest_g] if full else [])):
        grpo(make, replace(one, group=group), clock, f"grpo/G{group}")


def _gaps(name: str, gaps: tuple[float, float]) -> None:
    show(f"{name}/loss_gap", gaps[0], "nats")
    show(f"{name}/gradient_gap", gaps[1], "ratio")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and short prompts")
    parser.add_argument("--full", action="store_true", help="larger grids of K, G and prefix")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--minutes", type=float, default=6.0, help="no new turn after these")
    parser.add_argument("--turns", type=int, default=3, help="turns a comparison, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    say(f"{platform.machine()}, {chosen.threads} threads, torch {torch.__version__}")
    shape = Shape(**{name: getattr(chosen, name) for name in SIZES})
    with tempfile.TemporaryDirectory() as folder:
        weights = str(chosen.weights.expanduser())
        if chosen.tiny:
            weights, shape = make_tiny_judge(Path(folder) / "tiny", make_pairs(24)), TINY

        def make(wanted: Shape) -> Bench:
            gc.collect()  # a trainer and its model hold each other
            return Bench(weights, wanted, Path(folder) / "trl")

        clock = Clock(chosen.minutes, chosen.turns)
        for name, part in (("scoring", scoring), ("grpo", grpo), ("dpo", dpo), ("sft", sft)):
            if name in chosen.only:
                part(make, shape, clock, name)
        if "growth" in chosen.only:
            growth(make, shape, clock, chosen.full)


if __name__ == "__main__":
    main()
