"""What an index lacks of a catalogue, and that the delta mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.index.build import build_index
from models.index.config import IndexConfig, RefreshConfig
from models.index.difference import difference
from models.index.published import Origin, PublishedIndex
from models.index.refresh import refresh
from models.metrics import ListSink
from models.types import Product

CHARS = 40
CATALOGUE = [Product(f"p{i}", f"thing number {i}", price=float(i + 1)) for i in range(12)]


def encode(texts: Sequence[str]) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=6) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_difference_names_each_product_and_its_delta_leaves_none(tmp_path: Path) -> None:
    config = IndexConfig(sample=2, max_text_chars=CHARS)
    (tmp_path / "built").mkdir()
    build_index(encode, CATALOGUE, config, tmp_path / "built", ListSink())
    published = PublishedIndex(tmp_path / "published")
    published.publish(tmp_path / "built", Origin(fingerprint="f"), ListSink())

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
