"""What an index lacks of a catalogue, and that the delta mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.errors import ConfigError
from models.index.build import build_index
from models.index.config import IndexConfig, RefreshConfig
from models.index.difference import difference
from models.index.published import Origin, PublishedIndex
from models.index.refresh import refresh
from models.metrics import ListSink
from models.schemas import QUARANTINE
from models.types import Product

CHARS = 40
CATALOGUE = [Product(f"p{i}", f"thing number {i}", price=float(i + 1)) for i in range(12)]


def encode(texts: Sequence[str]) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=6) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def published(tmp_path: Path) -> PublishedIndex:
    """The catalogue as it is served."""
    config = IndexConfig(sample=2, max_text_chars=CHARS)
    (tmp_path / "built").mkdir()
    build_index(encode, CATALOGUE, config, tmp_path / "built", ListSink())
    table = PublishedIndex(tmp_path / "published")
    table.publish(tmp_path / "built", Origin(fingerprint="f"), ListSink())
    return table


def test_a_difference_names_each_product_and_its_delta_leaves_none(
    published: PublishedIndex,
) -> None:
    same = difference(published.open(), CATALOGUE, CHARS)
    assert (same.stale, same.share, same.products) == (0, 0.0, 12)

    today = [replace(CATALOGUE[0], price=99.0), replace(CATALOGUE[1], title="other")]
    today += [*CATALOGUE[2:9], Product("new", "brand new")]
    found = difference(published.open(), today, CHARS)
    assert [p.product_id for p in found.changed] == ["p0", "p1"]
    assert [p.product_id for p in found.missing] == ["new"]
    assert found.gone == ("p10", "p11", "p9")
    assert (found.stale, found.share) == (6, 6 / 10)

    made, counts = refresh(published, found.delta(), lambda _: encode, RefreshConfig(), ListSink())
    assert (counts.inserted, counts.updated, counts.deleted, counts.encoded) == (1, 2, 3, 2 + 1)
    assert difference(published.open(), today, CHARS).stale == 0
    assert made.deltas == (found.delta().digest,) and made.facts.rows == 10


def test_a_catalogue_that_lacks_much_of_what_is_served_is_refused(
    published: PublishedIndex,
) -> None:
    found = difference(published.open(), CATALOGUE[:9], CHARS)
    assert len(found.gone) == 3 and found.rows == 12
    with pytest.raises(ConfigError, match=r"3 of 12 .*at most 20%.*refresh\.max_deleted=0\.25"):
        found.delta(max_deleted=0.2)
    assert found.delta(max_deleted=0.25).deleted == found.gone
    assert difference(published.open(), [], CHARS).delta(max_deleted=1).deleted


def test_a_product_whose_row_was_refused_stays_as_it_was(published: PublishedIndex) -> None:
    rows = [
        {"table": "products", "reason": "bad_price", "row": '{"product_id": "p11", "price": -1}'},
        {"table": "products", "reason": "bad_price", "row": '{"product_id": "new", "price": -1}'},
        {"table": "queries", "reason": "empty_text", "row": '{"query_id": "p10", "text": ""}'},
    ]
    quarantine = pa.Table.from_pylist(rows, schema=QUARANTINE)
    found = difference(published.open(), CATALOGUE[:10], CHARS, quarantine)
    assert (found.kept, found.gone, found.stale) == (("p11",), ("p10",), 1)
    made, counts = refresh(published, found.delta(), lambda _: encode, RefreshConfig(), ListSink())
    assert (counts.deleted, counts.refused, made.facts.rows) == (1, 2, 11)
    assert published.open().products(["p10", "p11"]) == {"p11": CATALOGUE[11]}
