"""The nouns every layer shares. Plain frozen values: no tensors, no tables, no I/O."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

GRADES: tuple[int, int, int, int] = (1, 2, 3, 4)
"""1 Irrelevant, 2 Mismatch, 3 Related, 4 Excellent [TaoSR1 s1]."""

GRADE_NAMES: Mapping[int, str] = {1: "irrelevant", 2: "mismatch", 3: "related", 4: "excellent"}
RELEVANT_GRADE = 3
"""A product counts as relevant from this grade on (Goodrate, Recall, Hitrate)."""

SEGMENTS: tuple[str, ...] = (
    "general",
    "long_tail",
    "negation",
    "alternative",
    "question",
    "knowledge",
)
"""Query segments of the papers; the last four are the hard kinds [TaoSR1 s1]."""


class Category(enum.StrEnum):
    """Verdict of the category-match step."""

    MATCH = "match"
    RELATED = "related"
    MISMATCH = "mismatch"


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the two matching steps of the reasoning conclude about one pair.

    attributes: (name, holds) per attribute the query asks for, in query order; may be empty.
    """

    category: Category
    attributes: tuple[tuple[str, bool], ...] = ()

    @property
    def share_holding(self) -> float | None:
        """Share of attribute verdicts that hold, in [0, 1]; None when there is no attribute."""
        if not self.attributes:
            return None
        return sum(holds for _, holds in self.attributes) / len(self.attributes)


@dataclass(frozen=True, slots=True)
class Query:
    """One query. `segment` is one of SEGMENTS; `frequency` is a count over the log's window."""

    query_id: str
    text: str
    segment: str = "general"
    frequency: float = 1.0


@dataclass(frozen=True, slots=True)
class Product:
    """One catalogue item. Money is in the store's currency unit, `rating` in 0..5."""

    product_id: str
    title: str
    description: str = ""
    brand: str = ""
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    price: float | None = None
    rating: float | None = None
    rating_count: int | None = None
    sales: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A labelled (query, product): what the judge learns from.

    grade: 1..4. verdicts: gold step verdicts where the store knows them, else None.
    reasoning: the judgment's own words, "" where it has none. raters: mean of the single raters'
    grades, in [1, 4]; None where the store keeps none.
    """

    query: Query
    product: Product
    grade: int
    verdicts: Verdicts | None = None
    weight: float = 1.0
    reasoning: str = ""
    raters: float | None = None

    @property
    def rating(self) -> float:
        """The finest grade there is: the raters' mean, else the grade."""
        return float(self.grade) if self.raters is None else self.raters

    @property
    def key(self) -> tuple[str, str]:
        """(query_id, product_id): a store has one judgment for it."""
        return self.query.query_id, self.product.product_id


class Judge(Protocol):
    """Anything that grades pairs."""

    def score(self, pairs: Sequence[tuple[Query, Product]]) -> Sequence[Sequence[float]]:
        """P(grade) of every pair, [N][4] in the order of GRADES, each row summing to 1."""
        ...


@runtime_checkable
class MetricSink(Protocol):
    """Where numbers go: MLflow in a stage, a list in a test."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record `metrics` at `step` (None: a final value)."""
        ...
