"""The RL pool and its difficulty table [TaoSR1 s3.3].

Consumes labelled pairs and the judge's confidence in them -> produces a class-balanced pool, and
from it the next prompts, in an order that survives a restart. Per-prompt pass rates are kept.

Departures: confidence is the largest of the four grade probabilities from one prefill, which for
the post-CoT format is exact and needs no rollout; pairs under the bound are drawn at random, a pool
that they leave too small is filled with the least confident of the others, and the share is
reported. Confidence can be left out: the pool is then drawn at random.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from models.errors import DataContractError, explain
from models.judge.config import PoolConfig
from models.types import GRADES, Pair

log = logging.getLogger(__name__)


def choose_pool(
    pairs: Sequence[Pair], confidence: np.ndarray | None, config: PoolConfig, seed: int = 0
) -> tuple[list[Pair], dict[str, float]]:
    """The pool and what it looks like: size, label_cv over all four grades, share under the
    confidence bound.

    Args:
        confidence: [N] largest grade probability of each pair; None where
            `config.max_confidence` is None.
        seed: orders the pairs under the bound; all of them without one.

    Raises:
        DataContractError: no pairs.
    """
    if not pairs:
        raise DataContractError(explain("no pairs for the RL pool", "labelled pairs", "add labels"))
    bound = config.max_confidence
    order = np.random.default_rng(seed).permutation(len(pairs))
    if confidence is not None and bound is not None:
        unsure = confidence[order] < bound
        sure = order[~unsure]
        order = np.append(order[unsure], sure[np.argsort(confidence[sure], kind="stable")])
    by_grade: dict[int, list[int]] = {g: [] for g in GRADES}
    for i in order:
        by_grade[pairs[i].grade].append(int(i))
    present = [g for g in GRADES if by_grade[g]]
    if config.balanced:
        quota = min([config.size // len(present), *(len(by_grade[g]) for g in present)])
        chosen = [i for g in present for i in by_grade[g][: max(quota, 1)]]
    else:
        chosen = [int(i) for i in order[: config.size]]
    drawn = Counter(pairs[i].grade for i in chosen)
    counts = np.array([drawn[g] for g in GRADES], dtype=float)
    _warn(drawn, len(pairs), config.size)
    facts = {"pool/size": len(chosen), "pool/label_cv": float(counts.std() / counts.mean())}
    if confidence is not None and bound is not None:
        facts["pool/unsure_share"] = float(np.mean(confidence[chosen] < bound))
    return [pairs[i] for i in chosen], facts


def _warn(drawn: Counter[int], candidates: int, size: int) -> None:
    """Say which grades the pool lacks, or that a rare one has made it small."""
    absent = [g for g in GRADES if not drawn[g]]
    if absent:
        log.warning("rl pool: no pair of grade %s among %d candidates", absent, candidates)
    elif drawn.total() < size / 2:
        rarest = min(GRADES, key=lambda g: drawn[g])
        log.warning(
            "rl pool: %d pairs where %d were asked for, as grade %d has no more; raise "
            "judge.grpo.pool.candidates",
            drawn.total(),
            size,
            rarest,
        )


class PromptPool:
    """Hands out pool indices, each once an epoch, and keeps the pass rates seen."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._rng = random.Random(seed)
        self._queue: list[int] = []
        self.epochs = 0
        self.passes: dict[int, list[float]] = {}

    def take(self, count: int, avoid: Collection[int] = ()) -> list[int]:
        """The next `count` indices that are not in `avoid`, fewer where the pool has no others.

        A new shuffled epoch begins when the last one is used up. What has to wait comes next time.
        """
        out: list[int] = []
        waiting: list[int] = []
        while len(out) < min(count, self.size - len(set(avoid))):
            if not self._queue:
                self._queue = self._rng.sample(range(self.size), self.size)
                self.epochs += 1
            index = self._queue.pop()
            (waiting if index in avoid or index in out else out).append(index)
        self._queue += reversed(waiting)
        return out

    def record(self, index: int, pass_rate: float) -> None:
        """Note a prompt's share of correct rollouts."""
        self.passes.setdefault(index, []).append(pass_rate)

    def state(self) -> dict[str, Any]:
        """JSON values that `restore` reads."""
        version, internal, gauss = self._rng.getstate()
        return {
            "rng": [version, list(internal), gauss],
            "queue": self._queue,
            "epochs": self.epochs,
            "passes": {str(k): v for k, v in self.passes.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        version, internal, gauss = state["rng"]
        self._rng.setstate((version, tuple(internal), gauss))
        self._queue = list(state["queue"])
        self.epochs = state["epochs"]
        self.passes = {int(k): v for k, v in state["passes"].items()}
