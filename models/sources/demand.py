"""Queries of the embedded store: what is asked, in words, and what it means, as constraints.

Consumes a `Catalogue` and a seed -> produces `Ask` values with distinct texts. Every ask is built
from an anchor product that satisfies it, so an excellent answer always exists. n product rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.errors import ConfigError, explain
from models.sources import vocabulary as words
from models.sources.catalogue import (
    BRAND_NAMES,
    BRAND_TIER,
    NUM_ASKABLE,
    TYPE_ID,
    TYPES,
    VALUE_ID,
    Catalogue,
    middle_price,
    pool,
)
from models.text import normalise
from models.types import SEGMENTS

_ATTEMPTS = 300
"""Draws for one query before the store counts as too small for it."""
_MISSPELLED = 0.08
"""Share of queries with a typing error."""
_SYNONYM = 0.65
"""How often a value that has a synonym is asked for by it."""


@dataclass(frozen=True)
class Constraint:
    """One thing asked for. name: the verdict's name, one or two words.

    attribute: a catalogue attribute, "brand" or "price". wanted: ids that satisfy it, or with
    `negated` ids that do not; `below`: the price a product must stay under, currency units.
    """

    name: str
    attribute: str
    wanted: tuple[int, ...] = ()
    negated: bool = False
    below: float = 0.0
    hard: bool = False

    def holds(self, catalogue: Catalogue, rows: np.ndarray) -> np.ndarray:
        """[n] bool over product rows."""
        if self.attribute == "price":
            cheap: np.ndarray = catalogue.price_N[rows] < self.below
            return cheap
        column = (
            catalogue.brand_N if self.attribute == "brand" else catalogue.value_N[self.attribute]
        )
        held: np.ndarray = np.isin(column[rows], self.wanted) ^ self.negated
        return held


@dataclass(frozen=True)
class Ask:
    """One query. types: any of them is what is meant. anchor: a product row that fits."""

    text: str
    segment: str
    types: tuple[int, ...]
    constraints: tuple[Constraint, ...]
    anchor: int
    frequency: float = 1.0


def draw(catalogue: Catalogue, num_queries: int, seed: int) -> list[Ask]:
    """Asks with distinct normalised texts, the segments in turn.

    Raises:
        ConfigError: the store is too small for so many distinct queries.
    """
    seen: set[str] = set()
    asks: list[Ask] = []
    for number in range(num_queries):
        rng = np.random.default_rng([seed, 3, number])
        segment = SEGMENTS[number % len(SEGMENTS)]
        asks.append(_distinct(catalogue, segment, number // len(SEGMENTS), rng, seen))
    return asks


def _distinct(
    catalogue: Catalogue, segment: str, rank: int, rng: np.random.Generator, seen: set[str]
) -> Ask:
    for _ in range(_ATTEMPTS):
        ask = _MAKERS[segment](catalogue, rng)
        if ask is None:
            continue
        if rng.random() < _MISSPELLED:
            ask = replace(ask, text=misspell(ask.text, rng))
        if normalise(ask.text) not in seen:
            seen.add(normalise(ask.text))
            return replace(ask, frequency=_frequency(segment, rank, rng))
    raise ConfigError(
        explain(
            f"only {len(seen)} distinct queries over {len(catalogue)} products",
            "more",
            "raise num_products or lower num_queries",
        )
    )


def _frequency(segment: str, rank: int, rng: np.random.Generator) -> float:
    """Searches a month: Zipf for head queries, a handful for all others."""
    if segment == "general":
        return float(np.ceil(5000.0 / (1 + rank)))
    return float(np.ceil(rng.lognormal(1.5, 0.8)))


def misspell(text: str, rng: np.random.Generator) -> str:
    """Swap, drop or double one inner letter of one longer word; unchanged if there is none."""
    parts = text.split(" ")
    long = [i for i, part in enumerate(parts) if len(part) >= 5 and part.isalpha()]
    if not long:
        return text
    i = int(rng.choice(long))
    word, at = parts[i], int(rng.integers(1, len(parts[i]) - 2))
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    dropped = word[:at] + word[at + 1 :]
    doubled = word[:at] + word[at] + word[at:]
    parts[i] = (swapped, dropped, doubled)[int(rng.integers(3))]
    return " ".join(parts)


# ---------------------------------------------------------------- parts of a query


def _one(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _say(value: str, rng: np.random.Generator) -> str:
    """A value in a searcher's words."""
    other = words.SYNONYMS.get(value, ())
    return _one(rng, other) if other and rng.random() < _SYNONYM else value


def _anchor(catalogue: Catalogue, rng: np.random.Generator) -> int:
    """A product row of a type that can be asked for."""
    while True:
        row = int(rng.integers(len(catalogue)))
        if catalogue.type_N[row] < NUM_ASKABLE:
            return row


def _wants(catalogue: Catalogue, row: int, attribute: str) -> Constraint:
    """The anchor's own value as a constraint."""
    column = catalogue.brand_N if attribute == "brand" else catalogue.value_N[attribute]
    return Constraint(attribute, attribute, (int(column[row]),), hard=attribute == "audience")


def _under(catalogue: Catalogue, row: int, rng: np.random.Generator) -> Constraint:
    """A round price limit a little above the anchor's price."""
    price = float(catalogue.price_N[row]) * float(rng.uniform(1.03, 1.35))
    step = 5.0 if price < 100 else 10.0 if price < 300 else 50.0
    return Constraint("price", "price", below=float(np.ceil(price / step) * step), hard=True)


def _has(catalogue: Catalogue, row: int) -> list[str]:
    leaf = TYPES[catalogue.type_N[row]]
    names = ("colour", "material", "size", "feature", "use", "audience")
    return [a for a in names if pool(leaf, a)]


_ORDER = {"brand": 0, "colour": 1, "material": 2, "feature": 3, "size": 5, "use": 6, "audience": 7}


def _phrase(
    catalogue: Catalogue, row: int, attributes: Sequence[str], rng: np.random.Generator
) -> str:
    """The anchor's type in a searcher's words with some of its attributes around it."""
    parts: dict[float, str] = {4: _one(rng, TYPES[catalogue.type_N[row]].asks)}
    for attribute in attributes:
        if attribute == "brand":
            said = BRAND_NAMES[catalogue.brand_N[row]].lower()
        else:
            said = _say(catalogue.value(row, attribute), rng)
        if attribute in ("use", "audience"):
            said = f"for {said}" if not said.startswith("for ") else said
        late = said.startswith(("for ", "that ", "with "))
        parts[_ORDER[attribute] + (4.5 if late and _ORDER[attribute] < 4 else 0)] = said
    return " ".join(parts[place] for place in sorted(parts))


# ---------------------------------------------------------------- the six segments


def _general(catalogue: Catalogue, rng: np.random.Generator) -> Ask | None:
    """Head queries: a type, or a type and its brand, colour, material, audience or use."""
    row = _anchor(catalogue, rng)
    extra: list[str] = []
    if rng.random() > 0.12:
        options = ["brand", "brand", *(a for a in _has(catalogue, row) if a != "size")]
        extra = [_one(rng, options)]
    return Ask(
        _phrase(catalogue, row, extra, rng),
        "general",
        (int(catalogue.type_N[row]),),
        tuple(_wants(catalogue, row, a) for a in extra),
        row,
    )


def _long_tail(catalogue: Catalogue, rng: np.random.Generator) -> Ask | None:
    """Three or four constraints, a price limit among them now and then."""
    row = _anchor(catalogue, rng)
    options = [*_has(catalogue, row), "brand"]
    count = min(int(rng.integers(2, 4)) + int(rng.random() < 0.5), len(options), 4)
    chosen = [options[i] for i in rng.permutation(len(options))[:count]]
    constraints = [_wants(catalogue, row, a) for a in chosen]
    text = _phrase(catalogue, row, chosen, rng)
    if count < 3:
        constraints.append(_under(catalogue, row, rng))
        text += f" {_one(rng, ('under', 'below', 'max'))} ${constraints[-1].below:g}"
    return Ask(text, "long_tail", (int(catalogue.type_N[row]),), tuple(constraints), row)


def _negation(catalogue: Catalogue, rng: np.random.Generator) -> Ask | None:
    """A type without some material, colour or feature, mostly with one thing wanted beside it."""
    row = _anchor(catalogue, rng)
    leaf = TYPES[catalogue.type_N[row]]
    attribute = _one(rng, ("material", "material", "colour", "feature"))
    own = catalogue.value(row, attribute)
    options = [v for v in pool(leaf, attribute) if v != own and " " not in v]
    if not options:
        return None
    value = _one(rng, options)
    template = {
        "material": ("{} not {}", "{} without {}", "{} but no {}", "non {1} {0}"),
        "colour": ("{} not {}", "{} any colour but {}", "{} not in {}"),
        "feature": ("{} not {}", "{} that is not {}", "non {1} {0}"),
    }[attribute]
    chosen = [a for a in _has(catalogue, row) if a not in (attribute, "size")]
    chosen = [_one(rng, chosen)] if rng.random() < 0.75 else []
    avoided = Constraint(
        f"not {value}", attribute, (VALUE_ID[attribute][value],), negated=True, hard=True
    )
    return Ask(
        _one(rng, template).format(_phrase(catalogue, row, chosen, rng), value),
        "negation",
        (int(catalogue.type_N[row]),),
        (*(_wants(catalogue, row, a) for a in chosen), avoided),
        row,
    )


def _alternative(catalogue: Catalogue, rng: np.random.Generator) -> Ask | None:
    """Something like a dearer brand's product: another brand, and cheaper."""
    row = _anchor(catalogue, rng)
    type_id, own = int(catalogue.type_N[row]), int(catalogue.brand_N[row])
    dearer = [
        i
        for i, (_, tier, where) in enumerate(words.BRANDS)
        if TYPES[type_id].department in where and tier > BRAND_TIER[own]
    ]
    if not dearer:
        return None
    brand = int(rng.choice(dearer))
    usual = middle_price(type_id) * words.TIER_FACTOR[int(BRAND_TIER[brand])]
    chosen = [a for a in _has(catalogue, row) if a != "size"]
    chosen = [_one(rng, chosen)] if rng.random() < 0.75 else []
    phrase = _phrase(catalogue, row, chosen, rng)
    name = BRAND_NAMES[brand].lower()
    if rng.random() < 0.4 and catalogue.price_N[row] < usual:
        limit = Constraint("price", "price", below=usual, hard=True)
        text = _one(
            rng,
            (
                "cheaper alternative to {} {}",
                "affordable version of {} {}",
                "{} {} dupe on a budget",
            ),
        ).format(name, phrase)
    else:
        limit = _under(catalogue, row, rng)
        text = _one(
            rng,
            (
                "{1} like {0} but under ${2:g}",
                "{0} {1} alternative below ${2:g}",
                "instead of {0} {1} max ${2:g}",
            ),
        ).format(name, phrase, limit.below)
    other = Constraint("other brand", "brand", (brand,), negated=True, hard=True)
    constraints = (*(_wants(catalogue, row, a) for a in chosen), other, limit)
    return Ask(text, "alternative", (type_id,), constraints, row)


def _need(
    needs: Sequence[words.Need], segment: str
) -> Callable[[Catalogue, np.random.Generator], Ask | None]:
    def make(catalogue: Catalogue, rng: np.random.Generator) -> Ask | None:
        need = needs[int(rng.integers(len(needs)))]
        types = tuple(TYPE_ID[key] for key in need.keys)
        rows = np.concatenate([catalogue.rows_T[t] for t in types])
        asked = [
            Constraint(a, a, (VALUE_ID[a][v],), hard=a == "audience")
            for a in ("feature", "use", "material", "audience")
            if (v := getattr(need, a))
        ]
        for constraint in asked:
            rows = rows[constraint.holds(catalogue, rows)]
        if not len(rows):
            return None
        row = int(rng.choice(rows))
        text = need.text.format(age=int(rng.integers(2, 9)))
        extra, constraints = _extra(catalogue, row, rng) if rng.random() < 0.6 else ("", [])
        return Ask(text + extra, segment, types, (*asked, *constraints), row)

    return make


def _extra(
    catalogue: Catalogue, row: int, rng: np.random.Generator
) -> tuple[str, list[Constraint]]:
    """One more wish behind a question: a colour, a price limit, or whom it is for."""
    audience = catalogue.value(row, "audience")
    choice = int(rng.integers(3 if audience else 2))
    if choice == 0:
        constraint = _wants(catalogue, row, "colour")
        return f" in {_say(catalogue.value(row, 'colour'), rng)}", [constraint]
    if choice == 1:
        limit = _under(catalogue, row, rng)
        return f" under ${limit.below:g}", [limit]
    return f" for {_say(audience, rng)}", [_wants(catalogue, row, "audience")]


_MAKERS: dict[str, Callable[[Catalogue, np.random.Generator], Ask | None]] = {
    "general": _general,
    "long_tail": _long_tail,
    "negation": _negation,
    "alternative": _alternative,
    "question": _need(words.QUESTIONS, "question"),
    "knowledge": _need(words.WISHES, "knowledge"),
}
