"""The LanceDB index against the exact one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.errors import ArtifactError, ConfigError
from models.fusion import reciprocal_rank_fusion
from models.index.build import build_index, measured_facts
from models.index.config import IndexConfig
from models.index.exact import ExactIndex
from models.index.facts import IndexFacts
from models.index.filters import Filters
from models.index.lance import LanceIndex
from models.index.recall import check
from models.index.rows import columns, record_batch
from models.index.search import search
from models.metrics import ListSink
from models.text import product_text
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


def test_a_kind_that_cannot_be_trained_is_a_scan_or_named(tmp_path: Path) -> None:
    few = [Product(f"p{i}", f"thing{i}") for i in range(100)]
    facts = build_index(
        unit_rows, few, IndexConfig(kind="ivf_pq", sample=8), tmp_path / "pq", ListSink()
    )
    assert facts.kind == "exact" and facts.recall_at_10 == 1.0
    config = IndexConfig(kind="ivf_rq", sample=8, dim=12)
    with pytest.raises(ConfigError, match=r"ivf_rq and 12 dimensions.*multiple of 8"):
        build_index(unit_rows, few, config, tmp_path / "rq", ListSink())


def unit_rows(texts: Sequence[str]) -> np.ndarray:
    """16 dimensions that depend on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=16) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", ["auto", "ivf_flat", "ivf_sq", "ivf_rq", "ivf_hnsw_sq"])
def test_equals_the_exact_index(tmp_path: Path, kind: str) -> None:
    products, sink = catalogue(1500), ListSink()
    config = IndexConfig(kind=kind, batch_size=400, sample=40, min_recall=1.0, refine=(10, 150))
    facts = build_index(encode, products, config, tmp_path, sink)
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
    assert (facts.rows, facts.dim) == (1500, 24)
    assert facts.unindexed_rows == (1500 if kind == "auto" else 0)
    assert sink.series("index/recall_at_10") == [facts.recall_at_10]
    assert IndexFacts.read(tmp_path)[0] == facts


def test_small_catalogues_are_scanned_and_exact(tmp_path: Path) -> None:
    facts = build_index(encode, catalogue(200), IndexConfig(sample=30), tmp_path, ListSink())
    assert (facts.kind, facts.nprobes, facts.refine) == ("exact", None, None)
    assert (facts.recall_at_10, facts.recall_at_100, facts.trials) == (1.0, 1.0, ())


def test_a_shorter_index_is_searched_with_whole_query_vectors(tmp_path: Path) -> None:
    products = catalogue(120)
    facts = build_index(encode, products, IndexConfig(dim=8, sample=20), tmp_path, ListSink())
    assert facts.dim == 8
    index, whole = LanceIndex.open(tmp_path), encode([p.title for p in products])
    short = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    ids, vectors = index.vectors()
    assert np.allclose(vectors, short, atol=1e-6)
    got_ids, got_scores = index.search(whole[:5], 4)
    wanted_ids, wanted_scores = ExactIndex(ids, short).search(short[:5], 4)
    assert got_ids == wanted_ids
    assert np.allclose(got_scores, wanted_scores, atol=1e-5)
    with pytest.raises(ConfigError, match=r"index\.dim"):
        build_index(encode, products, IndexConfig(dim=25), tmp_path / "wide", ListSink())


def test_products_are_embedded_and_written_in_batches(tmp_path: Path) -> None:
    sizes: list[int] = []

    def counted(texts: Sequence[str]) -> np.ndarray:
        sizes.append(len(texts))
        return encode(texts)

    config = IndexConfig(batch_size=64, sample=5)
    build_index(counted, iter(catalogue(150)), config, tmp_path, ListSink())
    assert sizes == [64, 64, 150 - 2 * 64]


def test_few_batches_are_in_memory_at_once(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def watched(texts: Sequence[str]) -> np.ndarray:
        alive.append(sum(ref() is not None for ref in made))
        vectors = encode(texts)
        made.append(weakref.ref(vectors))
        return vectors

    config = IndexConfig(batch_size=20, sample=5, full_text=False)
    build_index(watched, iter(catalogue(2000)), config, tmp_path, ListSink())
    assert len(made) == 100 and max(alive) <= 8


def test_many_queries_at_once_find_what_each_finds_alone(tmp_path: Path) -> None:
    config = IndexConfig(kind="ivf_sq", sample=5, min_recall=0.0)
    build_index(encode, catalogue(1000), config, tmp_path, ListSink())
    index = LanceIndex.open(tmp_path)
    queries = encode([f"number{i}" for i in range(0, 1000, 25)])
    assert len(queries) > 32, "more than one block"
    ids, scores = index.search(queries, 7)
    assert ids == [index.search(q[None], 7)[0][0] for q in queries]
    assert all(row == sorted(row, reverse=True) for row in scores)


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
def test_words_are_not_asked_of_an_index_without_full_text(tmp_path: Path, mode: str) -> None:
    config = IndexConfig(sample=5, full_text=False)
    build_index(encode, catalogue(40), config, tmp_path, ListSink())
    index = LanceIndex.open(tmp_path)
    assert search(index, "number7", encode(["number7"])[0], 1, "vector")[0][0] == "p00007"
    with pytest.raises(ConfigError, match=r"an index without full text.*full_text=true"):
        search(index, "number7", encode(["number7"])[0], 1, mode)


@pytest.mark.parametrize("k", [0, -1])
def test_no_results_cannot_be_asked_for(tmp_path: Path, k: int) -> None:
    build_index(encode, catalogue(40), IndexConfig(sample=5), tmp_path, ListSink())
    index, query_1D = LanceIndex.open(tmp_path), encode(["number7"])
    refused = pytest.raises(ConfigError, match=f"got k = {k}; expected at least 1; do this: ask")
    with refused:
        index.search(query_1D, k)
    for words in ("widget", ""):
        with refused:
            index.search_text(words, k)
        with refused:
            index.search_hybrid(words, query_1D[0], k)


@pytest.mark.parametrize(
    ("number", "length"),
    [(0.0, "0"), (np.nan, "nan"), (np.inf, "inf"), (1e30, "inf"), (1e-30, "0")],
)
@pytest.mark.parametrize("dim", [None, 8])
def test_a_query_vector_without_a_direction_is_refused(
    tmp_path: Path, number: float, length: str, dim: int | None
) -> None:
    """LanceDB gives an empty list for zeros and NaN, and any products for what overflows."""
    build_index(encode, catalogue(40), IndexConfig(sample=5, dim=dim), tmp_path, ListSink())
    queries_QD = encode(["number7", "number8", "number9"])
    index = LanceIndex.open(tmp_path)
    assert index.search(queries_QD, 1)[0] == [["p00007"], ["p00008"], ["p00009"]]
    queries_QD[1] = number
    expected = rf"got query vector 1 .*length {length}; expected a finite length above 0; do this:"
    with pytest.raises(ConfigError, match=expected):
        index.search(queries_QD, 1)
    with pytest.raises(ConfigError, match=expected.replace("vector 1", "vector 0")):
        index.search_hybrid("widget", queries_QD[1], 1)


def test_filters_come_first_and_return_enough_rows(tmp_path: Path) -> None:
    """With many partitions, of which LanceDB by itself searches at most twenty."""
    from lancedb.index import IvfFlat

    build_index(encode, catalogue(2000), IndexConfig(sample=5), tmp_path, ListSink())
    table = LanceIndex.open(tmp_path).table
    table.create_index("vector", config=IvfFlat(distance_type="cosine", num_partitions=100))
    index = LanceIndex(table, nprobes=1, refine=1)
    where = Filters(brand="zed", max_price=99).sql()
    ids, _ = index.search(encode(["number7"]), 50, where)
    assert len(ids[0]) == 50, "all that the filter leaves, wherever they are"
    assert all(int(p[1:]) < 100 and int(p[1:]) % 2 == 0 for p in ids[0])


def test_every_mode_keeps_to_the_filters(tmp_path: Path) -> None:
    build_index(encode, catalogue(120), IndexConfig(sample=5), tmp_path, ListSink())
    index, where = LanceIndex.open(tmp_path), Filters(brand="zed", min_price=50).sql()
    wanted = {f"p{i:05d}" for i in range(50, 120, 2)}
    query = encode(["number9"])
    assert set(index.search(query, 120, where)[0][0]) == wanted
    assert {p for p, _ in index.search_text("widget", 120, where)} == wanted
    assert {p for p, _ in index.search_hybrid("widget", query[0], 120, where)} == wanted


def test_stored_products_come_back_whole(tmp_path: Path) -> None:
    product = Product(
        "it's", "Lamp number1", "long", "O'Neil", "A > B", {"colour": "rot", "b": "ü"}, 3.5
    )
    build_index(encode, [product], IndexConfig(sample=1), tmp_path, ListSink())
    found = LanceIndex.open(tmp_path).products(["it's", "x"])
    assert found == {"it's": product}
    read = product_text(found["it's"])
    assert read == product_text(product), "attributes in the order that models were trained on"


def test_text_and_hybrid_search(tmp_path: Path) -> None:
    build_index(encode, catalogue(120), IndexConfig(sample=5), tmp_path, ListSink())
    index = LanceIndex.open(tmp_path)
    assert index.search_text("number42!?", 1)[0][0] == "p00042"
    assert index.search_text("the of", 3) == []
    hybrid = index.search_hybrid("number42", encode(["number9"])[0], 120)
    assert hybrid[0][0] == "p00042", "the one product that both channels found"
    assert dict(hybrid)["p00009"] == pytest.approx(1 / 61)
    assert index.search_hybrid("??", encode(["number9"])[0], 1)[0][0] == "p00009"


def test_rank_fusion_adds_reciprocal_ranks() -> None:
    fused = dict(reciprocal_rank_fusion([["a", "b"], ["b", "c"]], 3))
    assert fused == {"b": 1 / 62 + 1 / 61, "a": 1 / 61, "c": 1 / 62}


def blurred(texts: Sequence[str]) -> np.ndarray:
    """Vectors without clusters: what quantisation loses most on."""
    return encode(texts, dim=64)


def test_the_gate_stops_an_index_that_loses_neighbours(tmp_path: Path) -> None:
    config = IndexConfig(kind="ivf_pq", refine=(1,), sample=40)
    expected = r"got recall@10 0\.\d+ of the ivf_pq .*expected at least 0\.97; do this: use kind"
    with pytest.raises(ConfigError, match=expected):
        build_index(blurred, catalogue(1500), config, tmp_path, ListSink())


def test_the_smallest_setting_that_passes_is_kept(tmp_path: Path) -> None:
    """The same bad quantisation passes once enough candidates are re-ranked."""
    config = IndexConfig(kind="ivf_pq", refine=(1, 5, 40, 150), sample=40)
    facts = build_index(blurred, catalogue(1500), config, tmp_path, ListSink())
    tried = {(t.nprobes, t.refine): t.recall_at_10 for t in facts.trials}
    assert tried[1, 150] >= 0.97 > tried[1, 5] > tried[1, 1]
    assert facts.nprobes == 1
    assert facts.refine == min(r for (_, r), recall in tried.items() if recall >= 0.97)
    assert LanceIndex.open(tmp_path).refine == facts.refine


def test_copies_of_a_product_do_not_look_like_lost_recall(tmp_path: Path) -> None:
    def alike(texts: Sequence[str]) -> np.ndarray:
        return encode([f"number{int(t.split('number')[1].split(' ')[0]) % 9}" for t in texts])

    config = IndexConfig(kind="ivf_sq", sample=20)
    assert build_index(alike, catalogue(900), config, tmp_path, ListSink()).recall_at_10 == 1.0


def test_lost_rows_are_refused(tmp_path: Path) -> None:
    facts = build_index(encode, catalogue(20), IndexConfig(sample=5), tmp_path, ListSink())
    check(facts, 20)
    with pytest.raises(ConfigError, match=r"20 rows .*expected 21, one a product"):
        check(facts, 21)


def test_rows_outside_the_index_are_counted_and_gated(tmp_path: Path) -> None:
    config = IndexConfig(kind="ivf_flat", sample=10, min_recall=0.0)
    build_index(encode, catalogue(600), config, tmp_path, ListSink())
    index, probes = LanceIndex.open(tmp_path), IndexFacts.read(tmp_path)[1]
    late = [Product(f"late{i}", f"late number{9000 + i}") for i in range(30)]
    rows = [columns(p, 400) for p in late]
    late_vectors = encode([row["text"] for row in rows])
    index.table.add(pa.Table.from_batches([record_batch(rows, late_vectors)]))
    facts, _ = measured_facts(index.table, "ivf_flat", config, probes)
    assert (facts.rows, facts.unindexed_rows) == (630, 30)
    with pytest.raises(ConfigError, match="30 of 630 rows outside"):
        check(facts)
    check(facts.model_copy(update={"config": config.model_copy(update={"max_unindexed": 0.05})}))


def test_vectors_of_an_earlier_index_serve_again_where_the_text_is_the_same(
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    def counted(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return encode(texts)

    config = IndexConfig(batch_size=16, sample=5)
    before = catalogue(60)
    build_index(counted, before, config, tmp_path / "a", ListSink())
    asked.clear()
    after = [*before[40:60], Product("p00007", "renamed number99", brand="acme"), *before[8:40]]
    facts = build_index(counted, after, config, tmp_path / "b", ListSink(), earlier=tmp_path / "a")
    build_index(encode, after, config, tmp_path / "c", ListSink())
    assert len(asked) == 1 and asked[0].startswith("renamed number99")
    assert facts.encoded_rows == 1
    reused, plain = (LanceIndex.open(tmp_path / n).vectors() for n in "bc")
    assert reused[0] == plain[0] and np.array_equal(reused[1], plain[1])


def test_building_again_replaces_the_table(tmp_path: Path) -> None:
    for count in (60, 40):
        build_index(encode, catalogue(count), IndexConfig(sample=5), tmp_path, ListSink())
    assert len(LanceIndex.open(tmp_path)) == 40


def test_errors_name_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="build the index"):
        LanceIndex.open(tmp_path / "nothing")
    build_index(encode, catalogue(20), IndexConfig(sample=5), tmp_path / "old", ListSink())
    (tmp_path / "old" / "index.json").unlink()
    with pytest.raises(ArtifactError, match="build the index again"):
        LanceIndex.open(tmp_path / "old")
    with pytest.raises(ConfigError, match="ingest"):
        build_index(encode, [], IndexConfig(), tmp_path / "x", ListSink())
