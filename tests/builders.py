"""Small values for tests: what a test does not say is left at its default."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.types import Category, Pair, Product, Query, Verdicts

WORDS = "red blue sofa couch leather lamp desk oak shoe trail steel cup".split()


def make_pair(
    query: str = "red sofa",
    title: str = "Red leather sofa",
    grade: int = 4,
    verdicts: Verdicts | None = None,
    **product: Any,
) -> Pair:
    """A labelled pair whose ids follow from its texts."""
    return Pair(
        Query(f"q:{query}", query), Product(f"p:{title}", title, **product), grade, verdicts
    )


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Random pairs, grades in turn 1, 2, 3, 4; about three pairs share a query."""
    rng = random.Random(seed)
    queries = [" ".join(rng.sample(WORDS, 2)) for _ in range(max(1, count // 3))]
    return [
        make_pair(rng.choice(queries), f"{' '.join(rng.sample(WORDS, 3))} {i}", grade=1 + i % 4)
        for i in range(count)
    ]


def make_verdicts(category: str = "match", **attributes: bool) -> Verdicts:
    """Verdicts from keywords, in the order given."""
    return Verdicts(Category(category), tuple(attributes.items()))


def make_tiny_judge(folder: Path, pairs: Sequence[Pair], seed: int = 0) -> str:
    """A tiny random language model whose tokenizer knows the pairs' words; returns its folder."""
    from models.lm.tiny import build_tiny_lm
    from models.teacher.template import write

    corpus = [write(p, "respond_then_think") for p in pairs]
    corpus += [f"{p.query.text} {p.product.title}" for p in pairs]
    build_tiny_lm(folder, corpus, seed=seed)
    return str(folder)
