"""The retriever: encoder, steps of Retrieval-GRPO, and indexes by kind and size against the scan.

    python tests/benchmarks/bench_retriever.py [SIZES] [--kinds exact ivf_sq ...] [--dim 384]
        [--parts encode rgrpo refresh kinds] [--budget 360]

Prints one figure a line, `name value unit`; the machine goes to stderr. Vectors are synthetic and
clustered (one centre a hundred rows, noise .7 of the centre's length): quantisation sees structure,
neighbours within a cluster are close calls. Each part has a process of its own, so that its peak
memory is its own, and a folder that is removed with all files of the part. Its encoder is free, so
build times are LanceDB's; `one_percent_share` is what a refresh takes of a rebuild, as measured, in
CPU seconds, and with an encoder of ENCODE_RATE texts a second added. On a busy machine look at the
CPU seconds. What the budget leaves out is named, a line a part, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.errors import ConfigError
from models.index.build import build_index
from models.index.config import IndexConfig, Kind, RefreshConfig
from models.index.exact import ExactIndex
from models.index.facts import IndexFacts
from models.index.published import Origin, PublishedIndex
from models.index.refresh import refresh
from models.metrics import NullSink
from models.schemas import QUARANTINE
from models.sources.delta import Delta
from models.types import Product

PARTS = ("encode", "rgrpo", "refresh", "kinds")
KINDS: tuple[Kind, ...] = ("exact", "ivf_flat", "ivf_sq", "ivf_rq", "ivf_hnsw_sq", "ivf_pq")
SIZES = (10_000, 100_000)
NOISE = 0.7
QUERIES = 200
DELTA_SHARE = 0.01
ENCODE_RATE = 110.0
"""all-MiniLM-L6-v2 in fp32 on two cores (measured, ours)."""
Part = tuple[str, Callable[..., None], tuple[object, ...]]
"""Its name, and what is called with what."""


class Vectors:
    """Row number -> vector, the same at every call; a text is "row <number>"."""

    def __init__(self, rows: int, dim: int) -> None:
        self.dim = dim
        centres_CD = np.random.default_rng(0).normal(size=(max(1, rows // 100), dim))
        self.centres_CD = centres_CD / np.linalg.norm(centres_CD, axis=1, keepdims=True)

    def of(self, rows_N: np.ndarray, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        noise_ND = rng.normal(0, NOISE / np.sqrt(self.dim), (len(rows_N), self.dim))
        out_ND = self.centres_CD[rows_N % len(self.centres_CD)] + noise_ND
        return (out_ND / np.linalg.norm(out_ND, axis=1, keepdims=True)).astype(np.float32)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        rows_N = np.array([int(text.split()[1]) for text in texts])
        return self.of(rows_N, int(rows_N[0]))

    def queries(self) -> np.ndarray:
        rng = np.random.default_rng(1)
        return self.of(rng.integers(0, len(self.centres_CD), QUERIES), 10**9)


def catalogue(rows: range) -> Iterator[Product]:
    return (Product(f"p{i:08d}", f"row {i}", brand=f"b{i % 50}", price=1.0 + i % 90) for i in rows)


def show(name: str, value: float, unit: str) -> None:
    print(f"retriever/{name} {value:.6g} {unit}", flush=True)


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_kind(kind: Kind, rows: int, dim: int) -> None:
    """Build, measure and print one kind at one size."""
    vectors, name = Vectors(rows, dim), f"{rows}/{kind}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        config = IndexConfig(kind=kind, sample=QUERIES, full_text=False, batch_size=4096)
        started, cpu = time.perf_counter(), time.process_time()
        with contextlib.suppress(ConfigError):  # below the gate: its figures say so
            build_index(vectors, catalogue(range(rows)), config, out, NullSink(), vectors.queries())
        total_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        facts, _ = IndexFacts.read(out)
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    show(f"{name}/build", total_s - facts.measure_s - facts.encode_s, "s")
    show(f"{name}/build_and_measure_cpu", cpu_s, "s")
    show(f"{name}/measure", facts.measure_s, "s")
    show(f"{name}/query_p50", facts.latency_p50_ms, "ms")
    show(f"{name}/query_p95", facts.latency_p95_ms, "ms")
    show(f"{name}/recall_at_10", facts.recall_at_10, "ratio")
    assert facts.recall_at_100 is not None, "a build measures it"
    show(f"{name}/recall_at_100", facts.recall_at_100, "ratio")
    show(f"{name}/nprobes", facts.nprobes or 0, "partitions")
    show(f"{name}/refine", facts.refine or 0, "factor")
    show(f"{name}/on_disk", size / 2**20, "MiB")
    show(f"{name}/peak_memory", peak_mb(), "MiB")


def numpy_scan(rows: int, dim: int) -> None:
    """The oracle itself, all vectors in memory."""
    vectors, name = Vectors(rows, dim), f"{rows}/numpy_scan"
    ids = [str(i) for i in range(rows)]
    parts = [vectors.of(np.arange(a, min(a + 4096, rows)), a) for a in range(0, rows, 4096)]
    index = ExactIndex(ids, np.concatenate(parts))
    times_ms = []
    for query_1D in np.split(vectors.queries()[:50], 50):
        started = time.perf_counter()
        index.search(query_1D, 10)
        times_ms.append(1000 * (time.perf_counter() - started))
    show(f"{name}/query_p50", float(np.percentile(times_ms, 50)), "ms")
    show(f"{name}/peak_memory", peak_mb(), "MiB")


def one_percent(rows: int) -> tuple[Product, ...]:
    """Half of the delta are new products, half are old ones under a new title."""
    half = int(DELTA_SHARE * rows / 2)
    old = (replace(p, title=f"{p.title} new") for p in catalogue(range(0, half * 100, 100)))
    return (*old, *catalogue(range(rows, rows + half)))


def refreshed(rows: int, dim: int) -> None:
    """A delta of one row in a hundred against building everything again."""
    vectors, name = Vectors(rows, dim), f"{rows}/refresh"
    config = IndexConfig(sample=QUERIES, batch_size=4096)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        queries_QD, sink = vectors.queries(), NullSink()
        started, cpu = time.perf_counter(), time.process_time()
        build_index(vectors, catalogue(range(rows)), config, out / "built", sink, queries_QD)
        rebuild_s, rebuild_cpu_s = time.perf_counter() - started, time.process_time() - cpu
        table = PublishedIndex(out / "published")
        started = time.perf_counter()
        table.publish(out / "built", Origin(fingerprint="built"), sink)
        show(f"{name}/publish", time.perf_counter() - started, "s")
        delta = Delta(one_percent(rows), (), "one", QUARANTINE.empty_table())
        started, cpu = time.perf_counter(), time.process_time()
        made, _ = refresh(table, delta, lambda _: vectors, RefreshConfig(), sink)
        refresh_s, refresh_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    encode_s = rows / ENCODE_RATE
    with_encoder = (refresh_s + DELTA_SHARE * encode_s) / (rebuild_s + encode_s)
    show(f"{name}/rebuild", rebuild_s, "s")
    show(f"{name}/one_percent", refresh_s, "s")
    show(f"{name}/rebuild_cpu", rebuild_cpu_s, "s")
    show(f"{name}/one_percent_cpu", refresh_cpu_s, "s")
    show(f"{name}/one_percent_share", refresh_s / rebuild_s, "ratio")
    show(f"{name}/one_percent_share_cpu", refresh_cpu_s / rebuild_cpu_s, "ratio")
    show(f"{name}/one_percent_share_with_encoder", with_encoder, "ratio")
    show(f"{name}/one_percent_measuring", made.facts.measure_s, "s")
    show(f"{name}/recall_at_10", made.facts.recall_at_10, "ratio")


def encoder() -> None:
    from tests.benchmarks.bench_encoder import encode_throughput  # torch is no index's memory

    encode_throughput(show)


def steps() -> None:
    from tests.benchmarks.bench_encoder import rgrpo_steps

    rgrpo_steps(show)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument(
        "--budget", type=float, default=360.0, help="seconds; then parts are left out"
    )
    chosen = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    print(f"{platform.machine()}, {cores} cores, OMP_NUM_THREADS {threads}", file=sys.stderr)
    work: list[Part] = [
        ("encode", encoder, ()),
        ("rgrpo", steps, ()),
        *[("refresh", refreshed, (rows, chosen.dim)) for rows in chosen.sizes],
    ]
    for rows in chosen.sizes:
        work.append(("kinds", numpy_scan, (rows, chosen.dim)))
        work += [("kinds", one_kind, (kind, rows, chosen.dim)) for kind in chosen.kinds]
    left_out = run([w for w in work if w[0] in chosen.parts], time.perf_counter() + chosen.budget)
    for part in left_out:
        print(f"left out, over budget: {part}; raise --budget", flush=True)
    sys.exit(1 if left_out else 0)


def run(work: Sequence[Part], deadline: float) -> list[str]:
    """Each part in a process of its own; at the deadline the one that runs is ended.

    Returns:
        the parts whose figures are not all measured.
    """
    spawn = multiprocessing.get_context("spawn")
    for number, (part, function, arguments) in enumerate(work):
        with tempfile.TemporaryDirectory() as folder:
            process = spawn.Process(target=files_in, args=(folder, function, arguments))
            process.start()
            try:
                process.join(max(0.0, deadline - time.perf_counter()))
                late = process.is_alive()
            finally:  # a killed process removes nothing, and an interrupted one may still write
                process.kill()
                process.join()
        if late:
            return [" ".join(map(str, (part, f.__name__, *a))) for part, f, a in work[number:]]
        if process.exitcode:
            sys.exit(f"{part} {arguments} ended with {process.exitcode}")
    return []


def files_in(folder: str, function: Callable[..., None], arguments: Sequence[object]) -> None:
    """Call a part; all its temporary files go to `folder`."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    function(*arguments)


if __name__ == "__main__":
    main()
