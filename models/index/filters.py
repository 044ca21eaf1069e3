"""Filters a shopper sets, as SQL over the index's columns.

Consumes brand, price range and category -> produces one WHERE clause. Values are data: quotes are
doubled, nothing else of them is ever read as SQL. The scalar indexes answer every clause.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from models.errors import ConfigError, explain
from models.text import CATEGORY_SEPARATOR, category_path, composed


def quoted(value: str) -> str:
    """A SQL string literal.

    >>> print(quoted("O'Neil"))
    'O''Neil'
    """
    return "'" + value.replace("'", "''") + "'"


def one_of(column: str, values: Iterable[str]) -> str:
    """`column IN (...)`; values must not be empty.

    >>> print(one_of("product_id", ["a", "b"]))
    product_id IN ('a', 'b')
    """
    return f"{column} IN ({', '.join(map(quoted, values))})"


@dataclass(frozen=True, slots=True)
class Filters:
    """What every result must satisfy; None and "" ask for nothing.

    brand: exact, case included. min_price, max_price: inclusive; a product without a price
    satisfies neither. category: a path or the beginning of one, by whole parts ("A > B" holds
    "A > B > C"), case included.
    """

    brand: str = ""
    category: str = ""
    min_price: float | None = None
    max_price: float | None = None

    def sql(self) -> str | None:
        """The WHERE clause, None when nothing is asked for.

        >>> print(Filters(brand="Acme", max_price=20).sql())
        brand = 'Acme' AND price <= 20.0

        Raises:
            ConfigError: a category without a name, a price that is no number, or a range that holds
                nothing.
        """
        clauses = []
        if self.brand:
            clauses.append(f"brand = {quoted(composed(self.brand))}")
        if self.category:
            clauses.append(_under(self.category))
        low, high = _price(self.min_price), _price(self.max_price)
        if low is not None and high is not None and low > high:
            got = f"prices from {low:g} to {high:g}"
            raise ConfigError(explain(got, "a lower bound below the upper one", "swap them"))
        clauses += [f"price >= {low!r}"] if low is not None else []
        clauses += [f"price <= {high!r}"] if high is not None else []
        return " AND ".join(clauses) or None


def _price(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ConfigError(explain(f"the price {value}", "a finite number", "pass one"))
    return None if value is None else float(value)


def _under(category: str) -> str:
    """The category itself, or any path below it: all that sorts between "A > " and "A >!"."""
    path = category_path(category)
    if not path:
        expected = "a path with a name in it, e.g. 'Home > Sofas'"
        do = "name the category, or leave the filter out"
        raise ConfigError(explain(f"the category {category!r}", expected, do))
    below = path + CATEGORY_SEPARATOR
    after = below[:-1] + chr(ord(below[-1]) + 1)
    return (
        f"(category = {quoted(path)} OR "
        f"(category >= {quoted(below)} AND category < {quoted(after)}))"
    )
