"""f(q, d): the judge's live score, cached on disk [TaoSearchEmb s3.2].

Consumes a `Judge` -> produces a reward in [0, 1]; every P(grade) is asked for once per judge
version, rules version, query text and product content, also across runs and after a kill.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from models.errors import ConfigError, explain
from models.text import normalise
from models.types import GRADES, Judge, Product, Query

Readout = Literal["good", "expected"]
Pairs = Sequence[tuple[Query, Product]]
CountTokens = Callable[[Pairs, Collection[str]], int]
"""(pairs, ids of the queries read before) -> tokens the judge reads for them on top."""
KEY_BYTES = 32
_ROW = struct.Struct(f"<{len(GRADES)}d")


def product_digest(product: Product) -> str:
    """Hash of everything a judge may read of a product: not its id, and not its sales."""
    content = [
        product.title,
        product.description,
        product.brand,
        product.category,
        list(product.attributes.items()),  # in the order that a judge reads them
        product.price,
        product.rating,
        product.rating_count,
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


class ScoreCache:
    """P(grade) by key in one sqlite file; each `put` is durable, so a killed run loses nothing.

    Args:
        path: the file (made if missing), or ":memory:".
        judge_version: changes whenever the judge's weights, prompt or decoding do.
        rules_version: changes whenever the rules in the prompt do.

    Attributes:
        hits, misses: look-ups since it was opened.
    """

    def __init__(self, path: Path | str, judge_version: str, rules_version: str = "") -> None:
        if not judge_version:
            raise ConfigError(
                explain("no judge version", "a version or fingerprint", "pass the judge artifact's")
            )
        if str(path) != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._versions = (judge_version, rules_version)
        self._db = sqlite3.connect(str(path), timeout=60.0)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, p BLOB) WITHOUT ROWID"
        )
        self._db.commit()
        self.hits = 0
        self.misses = 0

    def key(self, query: Query, product: Product) -> bytes:
        """32 bytes: sha256 over both versions, the normalised query text and the product."""
        parts = [*self._versions, normalise(query.text), product_digest(product)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, tuple[float, ...]]:
        """P(grade) of the keys that are there; counts hits and misses."""
        found: dict[bytes, tuple[float, ...]] = {}
        for start in range(0, len(keys), 500):
            chunk = keys[start : start + 500]
            marks = ",".join("?" * len(chunk))
            rows = self._db.execute(f"SELECT key, p FROM scores WHERE key IN ({marks})", chunk)
            found.update((key, _ROW.unpack(p)) for key, p in rows)
        self.hits += sum(k in found for k in keys)
        self.misses += sum(k not in found for k in keys)
        return found

    def put(self, scores: Mapping[bytes, Sequence[float]]) -> None:
        """Store P(grade) by key, in one transaction."""
        rows = [(key, _ROW.pack(*map(float, p))) for key, p in scores.items()]
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)

    @property
    def hit_rate(self) -> float:
        """Share of look-ups answered from the cache, 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM scores").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def read_out(p_N4: np.ndarray, readout: Readout = "good") -> np.ndarray:
    """One number in [0, 1] from P(grade): P3 + P4, or (E[grade] - 1)/3 (ours) [TaoSearchEmb s3.2].

    >>> read_out(np.array([[0.1, 0.2, 0.3, 0.4]])).round(2).tolist()
    [0.7]
    >>> read_out(np.array([[0.0, 0.0, 1.0, 0.0]]), "expected").round(4).tolist()
    [0.6667]
    """
    if readout == "good":
        return np.clip(p_N4[:, 2] + p_N4[:, 3], 0.0, 1.0)
    return np.clip((p_N4 @ np.array(GRADES, dtype=np.float64) - 1.0) / 3.0, 0.0, 1.0)


class JudgeRelevance:
    """f(q, d) in [0, 1] from a judge's P(grade), through a cache [TaoSearchEmb s3.2].

    Args:
        count_tokens: counts a pair when it is first asked for; None: `num_tokens` stays 0.

    Attributes:
        num_pairs: distinct pairs asked for, cached or not.
        num_tokens: what the judge reads for those with an empty cache, shared tokens once.
        computed: pairs that the judge itself had to read; those it read between a checkpoint and
            a kill are the cache's afterwards.
    """

    name = "relevance"

    def __init__(
        self,
        judge: Judge,
        cache: ScoreCache,
        readout: Readout = "good",
        weight: float = 1.0,
        count_tokens: CountTokens | None = None,
    ) -> None:
        self.judge = judge
        self.cache = cache
        self.readout: Readout = readout
        self.weight = weight
        self.count_tokens = count_tokens
        self.num_tokens = 0
        self.computed = 0
        self._keys: set[bytes] = set()
        self._query_ids: set[str] = set()

    @property
    def num_pairs(self) -> int:
        """Distinct pairs asked for."""
        return len(self._keys)

    def state(self) -> dict[str, np.ndarray]:
        """The counts and what was counted, for a checkpoint."""
        keys = np.frombuffer(b"".join(sorted(self._keys)), dtype=np.uint8)
        counts = (self.num_tokens, self.computed, self.cache.hits, self.cache.misses)
        return {
            "counts": np.array(counts, dtype=np.int64),
            "keys": keys.reshape(-1, KEY_BYTES),
            "query_ids": np.array(sorted(self._query_ids), dtype=np.str_),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on counting from `state`."""
        counts = map(int, state["counts"])
        self.num_tokens, self.computed, self.cache.hits, self.cache.misses = counts
        self._keys = {row.tobytes() for row in state["keys"]}
        self._query_ids = set(state["query_ids"].tolist())

    def _count(self, pairs: Mapping[bytes, tuple[Query, Product]]) -> None:
        fresh = [pair for key, pair in pairs.items() if key not in self._keys]
        if self.count_tokens is not None:
            self.num_tokens += self.count_tokens(fresh, self._query_ids)
        self._keys |= pairs.keys()
        self._query_ids |= {query.query_id for query, _ in fresh}

    def probabilities(self, pairs: Sequence[tuple[Query, Product]]) -> np.ndarray:
        """P(grade) [N, 4] float64; the judge is asked, once, only for what the cache lacks.

        Raises:
            ConfigError: the judge answers with another number of rows, or not with numbers.
        """
        keys = [self.cache.key(query, product) for query, product in pairs]
        self._count(dict(zip(keys, pairs, strict=True)))
        known = self.cache.get(keys)
        missing = {k: pair for k, pair in zip(keys, pairs, strict=True) if k not in known}
        if missing:
            rows = self.judge.score(list(missing.values()))
            fresh = dict(zip(missing, _checked(rows, len(missing)), strict=True))
            self.cache.put(fresh)
            self.computed += len(fresh)
            known |= fresh
        return np.array([known[k] for k in keys], dtype=np.float64).reshape(-1, len(GRADES))

    def __call__(
        self, queries: Sequence[Query], candidates: Sequence[Sequence[Product]]
    ) -> np.ndarray:
        """[Q, K] in [0, 1], float32."""
        pairs = [(q, p) for q, row in zip(queries, candidates, strict=True) for p in row]
        scores = read_out(self.probabilities(pairs), self.readout)
        return scores.astype(np.float32).reshape(len(queries), -1)

    def is_good(self, pairs: Sequence[tuple[Query, Product]]) -> list[bool]:
        """Whether each pair is of grade 4 or 3 (P3 + P4 >= .5), as Goodrate asks."""
        return (read_out(self.probabilities(pairs)) >= 0.5).tolist()


def _checked(rows: Iterable[Sequence[float]], expected: int) -> list[tuple[float, ...]]:
    p = np.array([tuple(map(float, row)) for row in rows], dtype=np.float64)
    if p.shape != (expected, len(GRADES)) or not np.isfinite(p).all():
        raise ConfigError(
            explain(
                f"a judge's answer of shape {p.shape}, finite: {bool(np.isfinite(p).all())}",
                f"{expected} rows of four finite probabilities",
                "check the judge's weights; a diverged judge must not teach the retriever",
            )
        )
    return [tuple(row) for row in p.tolist()]
