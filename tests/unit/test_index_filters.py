"""Filters as SQL: what they keep, and that a value stays a value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.errors import ConfigError
from models.index.build import build_index
from models.index.config import IndexConfig
from models.index.filters import Filters
from models.index.lance import LanceIndex
from models.metrics import ListSink
from models.types import Product

HOSTILE = "x' OR '1'='1"
SHOP = [
    Product("a", "one", brand="O'Neil", category="Sport > Shoes", price=10.0),
    Product("b", "two", brand="Neil", category="Sport > Shoes > Trail", price=20.0),
    Product("c", "three", brand='He said "hi"', category="Sport > Shoestrings", price=30.0),
    Product("d", "four", brand=HOSTILE, category="Sport", price=None),
    Product("e", "five", brand="a\\'b; DROP TABLE products --", category="100% > _x", price=0.5),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> LanceIndex:
    """The five products."""
    folder = tmp_path_factory.mktemp("filters")
    build_index(lambda t: np.eye(len(t), 8), SHOP, IndexConfig(sample=1), folder, ListSink())
    return LanceIndex.open(folder)


def kept(index: LanceIndex, filters: Filters) -> str:
    """The ids that pass, in order."""
    return "".join(sorted(index.search(np.ones((1, 8)), 9, filters.sql())[0][0]))


@pytest.mark.parametrize("product", SHOP, ids=lambda p: p.product_id)
def test_a_brand_with_quotes_finds_itself_and_nothing_else(
    index: LanceIndex, product: Product
) -> None:
    assert kept(index, Filters(brand=product.brand)) == product.product_id


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (Filters(), "abcde"),
        (Filters(category="Sport > Shoes"), "ab"),
        (Filters(category=" Sport>Shoes "), "ab"),
        (Filters(category="Sport > > Shoes >"), "ab"),
        (Filters(category="Sport"), "abcd"),
        (Filters(category="Spor"), ""),
        (Filters(category="%"), ""),
        (Filters(category="100%"), "e"),
        (Filters(category=HOSTILE), ""),
        (Filters(min_price=10), "abc"),
        (Filters(max_price=20), "abe"),
        (Filters(min_price=10, max_price=10), "a"),
        (Filters(brand="Neil", category="Sport", max_price=20.0), "b"),
        (Filters(brand="Neil", max_price=19.99), ""),
    ],
)
def test_what_filters_keep(index: LanceIndex, filters: Filters, ids: str) -> None:
    assert kept(index, filters) == ids


@pytest.mark.parametrize("empty", [">", " > > ", "  "])
def test_a_category_without_a_name_is_refused(empty: str) -> None:
    """It is not the products that have none."""
    with pytest.raises(ConfigError, match=r"the category '.*a name in it.*do this"):
        Filters(category=empty).sql()


@pytest.mark.parametrize("bad", [Filters(min_price=2, max_price=1), Filters(min_price=math.nan)])
def test_ranges_that_mean_nothing_are_refused(bad: Filters) -> None:
    with pytest.raises(ConfigError, match="do this"):
        bad.sql()
