"""The embedded store: generated, seeded, with gold step verdicts behind every grade.

Consumes a `SyntheticSource` -> produces products, queries, judgments and interactions, and an
`Oracle` that grades any pair of the same store.

The rule table (`grade_of`):

| category | constraints                                                        | grade |
| -------- | ------------------------------------------------------------------ | ----- |
| mismatch | any                                                                | 1     |
| related  | any                                                                | 2     |
| match    | all hold                                                           | 4     |
| match    | exactly one fails, and it is soft                                  | 3     |
| match    | a hard one fails (negation, price, other brand, audience), or two  | 2     |
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from models.errors import DataContractError, explain
from models.schemas import EVENTS
from models.sources import SyntheticSource, catalogue, demand, vocabulary
from models.sources.catalogue import NUM_ASKABLE, TYPE_ID, TYPES, Catalogue, product_id
from models.sources.demand import Ask
from models.split import SplitConfig
from models.types import Category, Verdicts

WHERE = "nothing to fetch: the synthetic store is generated"
_CATEGORIES = (Category.MISMATCH, Category.RELATED, Category.MATCH)
_FAMILY = np.unique([leaf.family for leaf in TYPES], return_inverse=True)[1]
_TRAPS_OF = {
    TYPE_ID[key]: [TYPE_ID[leaf.key] for leaf, k in vocabulary.TRAPS if k == key]
    for _, key in vocabulary.TRAPS
}
_SHARES = (0.38, 0.2, 0.1, 0.12, 0.1, 0.06)
"""Aimed share of a query's judgments: grade 4, grade 3, grade 2 of the type, siblings, accessories,
other types with the asked attributes; the rest is drawn from the whole catalogue."""
_LOOKALIKES = 500
"""Rows of other types looked at for ones that have what is asked for, except the type."""
_CLICK = {4: 0.55, 3: 0.25, 2: 0.06, 1: 0.015}
"""Chance that an impression of a product of this grade is clicked, at mean quality (ours)."""
_CART, _PURCHASE = 0.3, 0.4
_IMPRESSIONS = 4
_NOW = np.datetime64("2026-01-01T00:00:00", "us")
_LOG_DAYS = 90


def grade_of(verdicts: Verdicts, hard: Collection[str]) -> int:
    """Grade 1..4 of a pair by the module's rule table.

    hard: names of the attribute verdicts that are hard constraints.

    >>> v = Verdicts(Category.MATCH, (("colour", False), ("price", True)))
    >>> grade_of(v, hard={"price"}), grade_of(v, hard={"colour"})
    (3, 2)
    """
    if verdicts.category is Category.MISMATCH:
        return 1
    if verdicts.category is Category.RELATED:
        return 2
    failed = [name for name, holds in verdicts.attributes if not holds]
    if not failed:
        return 4
    return 3 if len(failed) == 1 and failed[0] not in hard else 2


def files(source: SyntheticSource, folder: Path) -> list[Path]:
    """No file is read."""
    return []


def read(
    source: SyntheticSource, folder: Path, split: SplitConfig
) -> tuple[dict[str, pa.Table], dict[str, str]]:
    """The generated tables and the store's notes; `folder` and `split` are not looked at."""
    stock = catalogue.draw(source.num_products, source.seed)
    asks = demand.draw(stock, source.num_queries, source.seed)
    pairs = _Pairs(stock, asks)
    chosen = [_judged(pairs, q, source) for q in range(len(asks))]
    tables = {
        "products": catalogue.table(stock, source.seed),
        "queries": _queries(asks),
        "judgments": _judgments(pairs, chosen),
        "interactions": _interactions(pairs, chosen, source),
    }
    return tables, {"rules": "synthetic", "quality": "measured: sales and ratings"}


class Oracle:
    """The truth about every pair of one synthetic store, whether judged or not."""

    def __init__(self, source: SyntheticSource) -> None:
        stock = catalogue.draw(source.num_products, source.seed)
        self._pairs = _Pairs(stock, demand.draw(stock, source.num_queries, source.seed))

    def grade(self, query_id: str, product_id: str) -> tuple[int, Verdicts]:
        """Grade and step verdicts of one pair.

        Raises:
            DataContractError: an id that is not of this store.
        """
        query = self._row(query_id, "q", len(self._pairs.asks))
        row = self._row(product_id, "p", len(self._pairs.stock))
        verdicts = self._pairs.verdicts(query, row)
        return grade_of(verdicts, self.hard(query_id)), verdicts

    def hard(self, query_id: str) -> frozenset[str]:
        """Names of the query's hard constraints."""
        ask = self._pairs.asks[self._row(query_id, "q", len(self._pairs.asks))]
        return frozenset(c.name for c in ask.constraints if c.hard)

    @staticmethod
    def _row(name: str, letter: str, count: int) -> int:
        if name[:1] == letter and name[1:].isdigit() and int(name[1:]) < count:
            return int(name[1:])
        raise DataContractError(
            explain(f"id {name!r}", f"{letter}0000000 up to {count} rows", "use the same store")
        )


def _query_id(number: int) -> str:
    return f"q{number:06d}"


class _Pairs:
    """Verdicts and grades of (ask, product rows), column-wise. n rows, C constraints."""

    def __init__(self, stock: Catalogue, asks: list[Ask]) -> None:
        self.stock, self.asks = stock, asks

    def category(self, query: int, rows: np.ndarray) -> np.ndarray:
        """[n] 2 match, 1 related, 0 mismatch."""
        types = self.asks[query].types
        type_n = self.stock.type_N[rows]
        related = np.isin(_FAMILY[type_n], _FAMILY[list(types)]) & (type_n < NUM_ASKABLE)
        return np.where(np.isin(type_n, types), 2, related.astype(int))

    def holds(self, query: int, rows: np.ndarray) -> np.ndarray:
        """[n, C] bool."""
        constraints = self.asks[query].constraints
        columns = [c.holds(self.stock, rows) for c in constraints]
        return np.stack(columns, axis=1) if columns else np.ones((len(rows), 0), bool)

    def grades(self, query: int, rows: np.ndarray) -> np.ndarray:
        """[n] grades 1..4: `grade_of`, column-wise."""
        hard_C = np.array([c.hard for c in self.asks[query].constraints], bool)
        failed = ~self.holds(query, rows)
        matched = np.select([~failed.any(axis=1), failed[:, hard_C].any(axis=1)], [4, 2], 0)
        matched = np.where(matched == 0, np.where(failed.sum(axis=1) == 1, 3, 2), matched)
        category = self.category(query, rows)
        return np.where(category == 2, matched, category + 1)

    def verdicts(self, query: int, row: int) -> Verdicts:
        """Gold step verdicts of one pair."""
        rows = np.array([row])
        names = [c.name for c in self.asks[query].constraints]
        holds = self.holds(query, rows)[0]
        attributes = tuple((n, bool(h)) for n, h in zip(names, holds, strict=True))
        return Verdicts(_CATEGORIES[self.category(query, rows)[0]], attributes)


def _judged(pairs: _Pairs, query: int, source: SyntheticSource) -> np.ndarray:
    """Product rows to judge for one query: near-misses, siblings, traps and strangers."""
    rng = np.random.default_rng([source.seed, 4, query])
    ask, stock = pairs.asks[query], pairs.stock
    budget = min(source.judgments_per_query, len(stock))
    inside = np.concatenate([stock.rows_T[t] for t in ask.types])
    grades = pairs.grades(query, inside)
    strata = [
        *(rng.permutation(inside[grades == g]) for g in (4, 3, 2)),
        _alike(pairs, query, _rows(stock, _siblings(ask)), rng),
        _alike(pairs, query, _rows(stock, _traps(ask)), rng),
        _alike(pairs, query, _strangers(stock, ask, rng), rng),
    ]
    counts = [max(round(budget * share), int(i == 0)) for i, share in enumerate(_SHARES)]
    picked = [rows[:n] for rows, n in zip(strata, counts, strict=True)]
    # What the rarer strata could not give is shared between near-misses, siblings and lookalikes.
    short = sum(counts) - sum(len(rows) for rows in picked)
    picked += [strata[i][counts[i] :][: -(-short // 4)] for i in (1, 2, 3, 5)]
    picked.append(rng.choice(len(stock), min(len(stock), 3 * budget), replace=False))
    rows = np.concatenate(picked)
    rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    return np.sort(rows[:budget])  # the order must not tell the grade


def _siblings(ask: Ask) -> list[int]:
    """Askable types of the same families."""
    family = np.isin(_FAMILY, _FAMILY[list(ask.types)])
    return [int(t) for t in np.flatnonzero(family[:NUM_ASKABLE]) if t not in ask.types]


def _traps(ask: Ask) -> list[int]:
    """The asked types' accessories, or those of their departments."""
    own = [trap for t in ask.types for trap in _TRAPS_OF.get(t, [])]
    departments = {TYPES[t].department for t in ask.types}
    accessories = range(NUM_ASKABLE, len(TYPES))
    return own or [i for i in accessories if TYPES[i].department in departments]


def _strangers(stock: Catalogue, ask: Ask, rng: np.random.Generator) -> np.ndarray:
    """Random rows outside the asked types and their families."""
    rows = rng.integers(0, len(stock), _LOOKALIKES)
    type_n = stock.type_N[rows]
    return rows[~np.isin(type_n, [*ask.types, *_siblings(ask)])]


def _alike(pairs: _Pairs, query: int, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`rows` in random order, the ones that hold the most constraints first."""
    rows = rng.permutation(rows)[:_LOOKALIKES]
    return rows[np.argsort(-pairs.holds(query, rows).sum(axis=1), kind="stable")]


def _rows(stock: Catalogue, types: list[int]) -> np.ndarray:
    parts = [stock.rows_T[t] for t in types]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _queries(asks: list[Ask]) -> pa.Table:
    return pa.table(
        {
            "query_id": [_query_id(i) for i in range(len(asks))],
            "text": [ask.text for ask in asks],
            "segment": [ask.segment for ask in asks],
            "frequency": [ask.frequency for ask in asks],
        }
    )


def _judgments(pairs: _Pairs, chosen: list[np.ndarray]) -> pa.Table:
    columns: dict[str, list[object]] = {
        name: []
        for name in ("query_id", "product_id", "grade", "verdict_category", "verdict_attributes")
    }
    for query, rows in enumerate(chosen):
        names = [c.name for c in pairs.asks[query].constraints]
        holds = pairs.holds(query, rows).tolist()
        columns["query_id"] += [_query_id(query)] * len(rows)
        columns["product_id"] += [product_id(row) for row in rows]
        columns["grade"] += pairs.grades(query, rows).tolist()
        columns["verdict_category"] += [_CATEGORIES[c].value for c in pairs.category(query, rows)]
        columns["verdict_attributes"] += [
            [{"name": n, "holds": h} for n, h in zip(names, held, strict=True)] for held in holds
        ]
    kinds = {
        "verdict_attributes": pa.list_(pa.struct([("name", pa.string()), ("holds", pa.bool_())]))
    }
    return pa.table({k: pa.array(v, kinds.get(k)) for k, v in columns.items()})


def _interactions(pairs: _Pairs, chosen: list[np.ndarray], source: SyntheticSource) -> pa.Table:
    """Clicks, carts and purchases by grade and quality, over judged and unjudged products."""
    rng = np.random.default_rng([source.seed, 5])
    frames = []
    for query, rows in enumerate(chosen):
        rows = np.unique(np.concatenate([rows, _unjudged(pairs, query, rng)]))
        click = np.array([_CLICK[g] for g in pairs.grades(query, rows)])
        odds = np.exp(0.5 * pairs.stock.quality_N[rows])
        clicks = rng.binomial(_IMPRESSIONS, np.clip(click * odds, 0.0, 0.95))
        carts = rng.binomial(clicks, _CART)
        for event, counts in zip(
            EVENTS, (clicks, carts, rng.binomial(carts, _PURCHASE)), strict=True
        ):
            repeated = np.repeat(rows, counts)
            frames.append((np.full(len(repeated), query), repeated, [event] * len(repeated)))
    queries = np.concatenate([f[0] for f in frames])
    products = np.concatenate([f[1] for f in frames])
    seconds = rng.integers(0, _LOG_DAYS * 86_400, len(queries)).astype("timedelta64[s]")
    return pa.table(
        {
            "query_id": pa.array([_query_id(q) for q in queries]),
            "product_id": pa.array([product_id(p) for p in products]),
            "event": pa.array([e for f in frames for e in f[2]], pa.string()),
            "timestamp": pa.array(pd.DatetimeIndex(_NOW - seconds)).cast(pa.timestamp("us")),
        }
    )


def _unjudged(pairs: _Pairs, query: int, rng: np.random.Generator) -> np.ndarray:
    """Up to 12 rows of the asked types and 4 of any: what a results page would have shown."""
    inside = _rows(pairs.stock, list(pairs.asks[query].types))
    shown = rng.choice(inside, min(12, len(inside)), replace=False)
    return np.concatenate([shown, rng.integers(0, len(pairs.stock), 4)])
