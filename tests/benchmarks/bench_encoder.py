"""What the encoder and a step of Retrieval-GRPO cost; parts of bench_retriever.py.

`encode/...`: our `encode` against sentence-transformers' own on the same texts, all-MiniLM-L6-v2
where `make setup` fetched it. `rgrpo/...`: seconds a step by number of candidates and by reward,
with a tiny judge; `cold`: its scores are computed, `warm`: all of them are in the cache. Repeats
alternate and medians are shown, so that other work on the machine weighs on both sides alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from models.embedder.config import RetrievalGRPOConfig
from models.embedder.encoder import encode, load_encoder
from models.embedder.retrieval_grpo import train_retrieval_grpo
from models.embedder.tiny import build_tiny_encoder
from models.rewards.exclusivity import Exclusivity
from models.rewards.quality import Quality
from models.rewards.relevance import JudgeRelevance, ScoreCache
from models.schemas import TABLES
from models.store import Store
from tasks.settings import settings

REPEATS, ROUNDS = 5, 3
TEXTS = 256
STEPS = 8
CANDIDATES = (8, 16, 32)
WORDS = "red blue sofa couch leather lamp desk oak shoe trail steel cup rug mug hat chair".split()

Show = Callable[[str, float, str], None]


def texts(count: int) -> list[str]:
    """Product texts of 4 to 40 words: what bucketing by length is for."""
    return [
        " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(4 + i * 13 % 37))
        for i in range(count)
    ]


def packaged() -> str | None:
    """all-MiniLM-L6-v2, if it was fetched."""
    folder = settings().weights_dir / "all-minilm-l6-v2"
    return str(folder) if (folder / "config.json").is_file() else None


def encode_throughput(show: Show) -> None:
    """Texts a second of ours and of `SentenceTransformer.encode`, float32."""
    asked, name = texts(TEXTS), packaged()
    with tempfile.TemporaryDirectory() as folder:
        model = load_encoder(name or str(build_tiny_encoder(Path(folder), asked)))
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: encode(model, asked),
            "theirs": lambda: model.encode(asked, batch_size=64, normalize_embeddings=True),
        }
        seconds = alternate(ways)
    part = "encode/minilm" if name else "encode/tiny"
    for way, took_s in seconds.items():
        show(f"{part}/{way}", TEXTS / took_s, "texts/s")
    show(f"{part}/ours_to_theirs", seconds["theirs"] / seconds["ours"], "ratio")


def alternate(ways: Mapping[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, float]:
    """Median seconds of each, taken in turn after one round that does not count."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, call in ways.items():
            started = time.perf_counter()
            call()
            if turn:
                took[name].append(time.perf_counter() - started)
    return {name: median(seconds) for name, seconds in took.items()}


class StepTimes:
    """A sink that takes the time between two steps; those with a refresh fall out of the median."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One step logs its loss once."""
        if "embedder/rgrpo/loss" in metrics:
            now = time.perf_counter()
            if self._last is not None:
                self.seconds.append(now - self._last)
            self._last = now


def small_store() -> Store:
    """48 queries over 200 products, every query with 4 judged ones."""
    titles = texts(200)
    products = [
        {"product_id": f"p{i}", "title": f"{t} {i}", "sales": float(i)}
        for i, t in enumerate(titles)
    ]
    queries = [
        {
            "query_id": f"q{i}",
            "text": f"{WORDS[i % len(WORDS)]} {WORDS[i * 5 % len(WORDS)]} {i}",
            "split": ("train", "validation", "train", "test")[i % 4],
        }
        for i in range(48)
    ]
    judgments = [
        {"query_id": f"q{i}", "product_id": f"p{(i * 4 + g) % 200}", "grade": g}
        for i in range(48)
        for g in (1, 2, 3, 4)
    ]
    rows = {"products": products, "queries": queries, "judgments": judgments, "interactions": []}
    tables = {n: pa.Table.from_pylist(r, schema=TABLES[n]) for n, r in rows.items()}
    return Store(**tables)


def rgrpo_steps(show: Show) -> None:
    """Median seconds of a step by K (all three rewards, warm), and by reward at K = 16."""
    from models.judge.config import PromptConfig
    from models.judge.scoring import ScoringJudge
    from models.judge.spec import JudgeSpec
    from tests.builders import make_tiny_judge

    store = small_store()
    pairs = store.pairs()
    corpus = [*store.products["title"].to_pylist(), *store.queries["text"].to_pylist()]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        encoder = str(build_tiny_encoder(root / "encoder", corpus))
        judge_folder = make_tiny_judge(root / "judge", pairs)
        judge = ScoringJudge.open(
            judge_folder,
            JudgeSpec.fit(PromptConfig(), pairs, [p.product for p in pairs]),
            bf16=False,
        )
        levels = {p: i / 200 for i, p in enumerate(store.product_by_id)}
        exclusivity, quality = Exclusivity(), Quality(levels)
        count = iter(range(10_000))

        def step_s(k: int, rewards: Sequence[Any]) -> float:
            times, place = StepTimes(), root / str(next(count))
            config = RetrievalGRPOConfig(
                steps=STEPS, k=k, refresh_every=STEPS, bf16=False, pool_size=None
            )
            train_retrieval_grpo(
                encoder, store, rewards, config, place / "out", place / "scratch", times
            )
            return median(times.seconds)

        def relevance(cache: ScoreCache) -> JudgeRelevance:
            return JudgeRelevance(judge, cache)

        def fresh() -> ScoreCache:
            return ScoreCache(root / f"{next(count)}.sqlite", "tiny", judge.rules_version)

        kept = fresh()
        measured_of: dict[str, Callable[[], float]] = {
            f"k{k}/all_warm": lambda k=k: step_s(k, [relevance(kept), quality, exclusivity])
            for k in CANDIDATES
        }
        measured_of |= {
            "k16/quality": lambda: step_s(16, [quality]),
            "k16/exclusivity": lambda: step_s(16, [exclusivity]),
            "k16/relevance_warm": lambda: step_s(16, [relevance(kept)]),
            "k16/relevance_cold": lambda: step_s(16, [relevance(fresh())]),
        }
        took: dict[str, list[float]] = {name: [] for name in measured_of}
        for turn in range(ROUNDS + 1):  # the first one fills the cache
            for name, measured in measured_of.items():
                step = measured()
                if turn:
                    took[name].append(step)
    for name, seconds in took.items():
        show(f"rgrpo/{name}", median(seconds), "s/step")
    cold, warm = median(took["k16/relevance_cold"]), median(took["k16/relevance_warm"])
    show("rgrpo/k16/judge_cache_saves", 1 - warm / cold, "share")
