"""The LanceDB index against the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models.errors import ArtifactError, ConfigError
from models.index.exact import ExactIndex
from models.index.lance import IndexConfig, LanceIndex, build_index
from models.metrics import ListSink
from models.types import Product


def catalogue(count: int) -> list[Product]:
    return [
        Product(f"p{i:05d}", f"widget number{i}", brand="acme" if i % 2 else "zed", price=float(i))
        for i in range(count)
    ]


def encode(texts: Sequence[str], dim: int = 24) -> np.ndarray:
    """A vector that depends on the text alone."""
    seeds = [int(t.split("number")[1].split(" ")[0]) for t in texts]
    rows = np.stack([np.random.default_rng(s).normal(size=dim) for s in seeds])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", ["auto", "ivf_flat", "ivf_sq"])
def test_equals_the_exact_index(tmp_path: Path, kind: str) -> None:
    products, sink = catalogue(1500), ListSink()
    config = IndexConfig(kind=kind, batch_size=400, sample=40, min_recall=0.0)
    report = build_index(encode, products, config, tmp_path, sink)
    index = LanceIndex.open(tmp_path)
    ids, vectors = index.vectors()
    assert ids == [p.product_id for p in products]
    assert np.allclose(vectors, encode([p.title for p in products]), atol=1e-6)
    exact_ids, exact_scores = ExactIndex(ids, vectors).search(vectors[:20], 5)
    got_ids, got_scores = index.search(vectors[:20], 5)
    hits = [len(set(g) & set(e)) for g, e in zip(got_ids, exact_ids, strict=True)]
    assert sum(hits) >= 0.9 * 5 * 20
    assert [row[0] for row in got_ids] == ids[:20]
    assert [row[0] for row in got_scores] == pytest.approx([r[0] for r in exact_scores], abs=1e-5)
    assert report["rows"] == 1500 and report["dim"] == 24
    assert report["unindexed_rows"] == (1500 if kind == "auto" else 0)
    assert sink.series("index/recall_at_10") == [report["recall_at_10"]]


def test_small_catalogues_are_scanned_and_exact(tmp_path: Path) -> None:
    report = build_index(encode, catalogue(200), IndexConfig(sample=30), tmp_path, ListSink())
    assert report["kind"] == "exact"
    assert report["recall_at_10"] == 1.0


def test_filters_come_first_and_return_enough_rows(tmp_path: Path) -> None:
    config = IndexConfig(kind="ivf_flat", sample=5, min_recall=0.0)
    build_index(encode, catalogue(6000), config, tmp_path, ListSink())
    ids, _ = LanceIndex.open(tmp_path).search(
        encode(["number7"]), 20, where="price < 20 AND brand = 'zed'"
    )
    assert len(ids[0]) == 10, "all that the filter leaves, wherever they are"
    assert all(int(p[1:]) < 20 and int(p[1:]) % 2 == 0 for p in ids[0])


def test_text_and_hybrid_search(tmp_path: Path) -> None:
    build_index(encode, catalogue(120), IndexConfig(sample=5), tmp_path, ListSink())
    index = LanceIndex.open(tmp_path)
    assert index.search_text("number42!?", 1)[0][0] == "p00042"
    assert index.search_text("the of", 3) == []
    hybrid = [p for p, _ in index.search_hybrid("number42", encode(["number9"])[0], 4)]
    assert set(hybrid[:2]) == {"p00042", "p00009"}
    assert index.search_hybrid("??", encode(["number9"])[0], 1)[0][0] == "p00009"


def test_the_gate_stops_an_index_that_loses_neighbours(tmp_path: Path) -> None:
    def blurred(texts: Sequence[str]) -> np.ndarray:
        return encode(texts, dim=64)

    config = IndexConfig(kind="ivf_pq", refine=1, sample=40, min_recall=0.97)
    with pytest.raises(ConfigError, match=r"recall@10 0\.\d+ .*at least 0\.97"):
        build_index(blurred, catalogue(1500), config, tmp_path, ListSink())


def test_building_again_replaces_the_table(tmp_path: Path) -> None:
    for count in (60, 40):
        build_index(encode, catalogue(count), IndexConfig(sample=5), tmp_path, ListSink())
    assert len(LanceIndex.open(tmp_path)) == 40


def test_errors_name_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="build the index"):
        LanceIndex.open(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="ingest"):
        build_index(encode, [], IndexConfig(), tmp_path / "x", ListSink())
