"""Products of the embedded store, as columns of value ids and as the products table.

Consumes sizes and a seed -> produces a `Catalogue`. Everything is drawn and joined column-wise: a
million products take seconds. N products, T types, A attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.sources import vocabulary as words

ATTRIBUTES: tuple[str, ...] = ("colour", "material", "size", "audience", "feature", "use")
TYPES: tuple[words.Leaf, ...] = (*words.LEAVES, *(leaf for leaf, _ in words.TRAPS))
"""Askable types first, then the accessories."""
NUM_ASKABLE = len(words.LEAVES)
TYPE_ID: dict[str, int] = {leaf.key: i for i, leaf in enumerate(TYPES)}
BRAND_NAMES: tuple[str, ...] = tuple(name for name, _, _ in words.BRANDS)
BRAND_TIER = np.array([tier for _, tier, _ in words.BRANDS])

_TRAP_WEIGHT = 0.45
"""Share of an accessory type against a type one can ask for."""
_TITLE_SHARE = {
    "brand": 0.7,
    "code": 0.5,
    "colour": 0.45,
    "material": 0.4,
    "size": 0.45,
    "audience": 0.5,
    "feature": 0.4,
    "use": 0.2,
}
"""How often a title mentions a part; what it leaves out is always in the attributes."""
_LISTED_ANYWAY = 0.7
"""How often an attribute that the title mentions is also in the attributes map."""


def pool(leaf: words.Leaf, attribute: str) -> tuple[str, ...]:
    """Values products of this type may have; () where the type has no such attribute."""
    if attribute == "colour":
        return words.COLOURS
    if attribute == "audience":
        return words.AUDIENCES if leaf.audience else ()
    values: tuple[str, ...] = getattr(leaf, attribute)
    return values


VALUES: dict[str, tuple[str, ...]] = {
    a: tuple(dict.fromkeys(v for leaf in TYPES for v in pool(leaf, a))) for a in ATTRIBUTES
}
"""Every value of an attribute; ids are positions."""
VALUE_ID: dict[str, dict[str, int]] = {
    a: {v: i for i, v in enumerate(values)} for a, values in VALUES.items()
}


def middle_price(type_id: int) -> float:
    """Geometric mean of the type's price range, currency units."""
    low, high = TYPES[type_id].price
    return float(np.sqrt(low * high))


@dataclass(frozen=True)
class Catalogue:
    """Columns over N products.

    type_N, brand_N: ids in TYPES and BRAND_NAMES. value_N: attribute -> ids in VALUES, -1 for none.
    price_N: currency units. quality_N: latent, standard normal; drives rating, sales and clicks.
    rows_T: type -> its product rows.
    """

    type_N: np.ndarray
    brand_N: np.ndarray
    value_N: dict[str, np.ndarray]
    price_N: np.ndarray
    quality_N: np.ndarray
    rows_T: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.type_N)

    def value(self, row: int, attribute: str) -> str:
        """The value's words; "" where the product has no such attribute."""
        index = int(self.value_N[attribute][row])
        return "" if index < 0 else VALUES[attribute][index]


def product_id(row: int) -> str:
    """Id of a row: "p" and seven digits."""
    return f"p{row:07d}"


def draw(num_products: int, seed: int) -> Catalogue:
    """Draw a catalogue; equal arguments give an equal one."""
    rng = np.random.default_rng([seed, 1])
    weight_T = rng.lognormal(0.0, 0.25, len(TYPES))
    weight_T[NUM_ASKABLE:] *= _TRAP_WEIGHT
    type_N = rng.choice(len(TYPES), num_products, p=weight_T / weight_T.sum()).astype(np.int16)
    brand_N = _pick(rng, type_N, [_brands_of(leaf) for leaf in TYPES])
    value_N = {
        a: _pick(rng, type_N, [[VALUE_ID[a][v] for v in pool(leaf, a)] for leaf in TYPES])
        for a in ATTRIBUTES
    }
    low_T, high_T = np.array([leaf.price for leaf in TYPES]).T
    place_N = rng.beta(2.0, 2.0, num_products)
    price_N = low_T[type_N] * (high_T / low_T)[type_N] ** place_N
    factor_tier = np.array([words.TIER_FACTOR[tier] for tier in (1, 2, 3)])
    price_N = np.maximum(np.round(price_N * factor_tier[BRAND_TIER[brand_N] - 1]), 3.0) - 0.01
    order = np.argsort(type_N, kind="stable")
    rows_T = np.split(order, np.searchsorted(type_N[order], np.arange(1, len(TYPES))))
    return Catalogue(type_N, brand_N, value_N, price_N, rng.standard_normal(num_products), rows_T)


def _brands_of(leaf: words.Leaf) -> list[int]:
    return [i for i, (_, _, where) in enumerate(words.BRANDS) if leaf.department in where]


def _pick(rng: np.random.Generator, type_N: np.ndarray, pools: list[list[int]]) -> np.ndarray:
    """[N] int16: one value of its type's pool a product, -1 for an empty pool."""
    size_T = np.array([len(p) for p in pools])
    padded = np.full((len(pools), max(size_T.max(), 1)), -1, np.int16)
    for row, values in zip(padded, pools, strict=True):
        row[: len(values)] = values
    place_N = (rng.random(len(type_N)) * size_T[type_N]).astype(np.int64)
    picked_N: np.ndarray = padded[type_N, place_N]
    return picked_N


# ---------------------------------------------------------------- the products table


def table(catalogue: Catalogue, seed: int) -> pa.Table:
    """The products table (columns of `schemas.PRODUCTS`, without updated_at)."""
    rng = np.random.default_rng([seed, 2])
    shown = {part: rng.random(len(catalogue)) < share for part, share in _TITLE_SHARE.items()}
    rating, count, sales = _popularity(catalogue, rng)
    return pa.table(
        {
            "product_id": pa.array([product_id(i) for i in range(len(catalogue))]),
            "title": _titles(catalogue, shown, rng),
            "description": _descriptions(catalogue, rng),
            "brand": _take(BRAND_NAMES, catalogue.brand_N),
            "category": _take([leaf.path for leaf in TYPES], catalogue.type_N),
            "attributes": _attributes(catalogue, shown, rng),
            "price": pa.array(catalogue.price_N),
            "rating": pa.array(rating),
            "rating_count": pa.array(count),
            "sales": pa.array(sales),
        }
    )


def _popularity(
    catalogue: Catalogue, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rating 1..5 (one decimal), rating count, units sold: noisy views of quality, sales skewed."""
    quality_N = catalogue.quality_N
    noise = rng.standard_normal((3, len(catalogue)))
    rating = np.clip(np.round(3.9 + 0.45 * quality_N + 0.25 * noise[0], 1), 1.0, 5.0)
    sales = np.floor(np.exp(3.0 + 0.9 * quality_N + 1.2 * noise[1]))
    count = np.floor(sales * np.exp(-2.0 + 0.5 * noise[2])).astype(np.int64)
    return rating, count, sales


def _take(names: list[str] | tuple[str, ...], ids_N: np.ndarray, mask: np.ndarray | None = None
          ) -> pa.Array:  # fmt: skip
    """[N] strings; null where `mask` is false or the id is negative."""
    hidden = ids_N < 0 if mask is None else (ids_N < 0) | ~mask
    return pa.array(list(names)).take(pa.array(ids_N.astype(np.int32), mask=hidden))


def _join(parts: list[pa.Array], separator: str = " ") -> pa.Array:
    return pc.binary_join_element_wise(*parts, separator, null_handling="skip")


def _capitals(attribute: str) -> list[str]:
    values = VALUES[attribute]
    return list(values) if attribute == "size" else [v.title() for v in values]


def _names(type_N: np.ndarray, rng: np.random.Generator) -> pa.Array:
    flat = [name for leaf in TYPES for name in leaf.titles]
    size_T = np.array([len(leaf.titles) for leaf in TYPES])
    offset_T = np.concatenate([[0], np.cumsum(size_T)[:-1]])
    chosen = offset_T[type_N] + (rng.random(len(type_N)) * size_T[type_N]).astype(np.int64)
    return _take(flat, chosen)


def _titles(
    catalogue: Catalogue, shown: dict[str, np.ndarray], rng: np.random.Generator
) -> pa.Array:
    codes = [f"{letter}{number}" for letter in "ABDEGKLMRSTVXZ" for number in range(10, 100, 3)]

    def value(attribute: str) -> pa.Array:
        return _take(_capitals(attribute), catalogue.value_N[attribute], shown[attribute])

    def given(prefix: str, attribute: str) -> pa.Array:
        return pc.binary_join_element_wise(prefix, value(attribute), " ")

    code_N = rng.integers(0, len(codes), len(catalogue))
    return _join(
        [
            _take(BRAND_NAMES, catalogue.brand_N, shown["brand"]),
            _take(codes, code_N, shown["code"]),
            value("colour"),
            value("material"),
            _names(catalogue.type_N, rng),
            given("for", "audience"),
            value("feature"),
            value("size"),
            given("-", "use"),
        ]
    )


def _descriptions(catalogue: Catalogue, rng: np.random.Generator) -> pa.Array:
    """A sentence that names another type as well: prose that misleads a word matcher."""
    told = rng.random(len(catalogue)) < 0.6
    others = [ask for leaf in words.LEAVES for ask in leaf.asks]
    other_N = rng.integers(0, len(others), len(catalogue))
    text = _join(
        [
            _take([f"{leaf.key.capitalize()} made with" for leaf in TYPES], catalogue.type_N),
            _take(VALUES["material"], catalogue.value_N["material"]),
            _take([f"for {v}." for v in VALUES["use"]], catalogue.value_N["use"]),
            _take([f"Goes well with a {other}." for other in others], other_N),
        ]
    )
    return pc.if_else(pa.array(told), text, None)


def _attributes(
    catalogue: Catalogue, shown: dict[str, np.ndarray], rng: np.random.Generator
) -> pa.Array:
    """[N] map: every attribute that the title leaves out, and most of the others."""
    ids_NA = np.stack([catalogue.value_N[a] for a in ATTRIBUTES], axis=1).astype(np.int64)
    shown_NA = np.stack([shown[a] for a in ATTRIBUTES], axis=1)
    listed_NA = (ids_NA >= 0) & (~shown_NA | (rng.random(ids_NA.shape) < _LISTED_ANYWAY))
    base_A = np.cumsum([0] + [len(VALUES[a]) for a in ATTRIBUTES])[:-1]
    flat = pa.array([v for a in ATTRIBUTES for v in VALUES[a]])
    items = flat.take(pa.array((ids_NA + base_A)[listed_NA]))
    keys = pa.array(ATTRIBUTES).take(pa.array(np.nonzero(listed_NA)[1]))
    offsets = np.concatenate([[0], np.cumsum(listed_NA.sum(axis=1))]).astype(np.int32)
    return pa.MapArray.from_arrays(pa.array(offsets), keys, items)
