"""A refreshed index equals a rebuilt one, and only changed texts were embedded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lancedb.db import LanceDBConnection
from lancedb.merge import LanceMergeInsertBuilder
from lancedb.query import LanceEmptyQueryBuilder, LanceVectorQueryBuilder
from lancedb.table import LanceTable

from models.errors import ArtifactError, ConfigError
from models.index import refresh as module
from models.index.build import build_index
from models.index.config import IndexConfig, Kind, RefreshConfig
from models.index.exact import exact_top
from models.index.filters import Filters
from models.index.lance import LanceIndex, vector_index_stats
from models.index.nearest import NearestProducts
from models.index.published import Origin, PublishedIndex
from models.index.refresh import RefreshCounts, refresh
from models.metrics import ListSink, NullSink
from models.schemas import QUARANTINE
from models.sources.delta import Delta
from models.text import product_text
from models.types import Product

DIM = 12


class Encoder:
    """A cheap encoder that remembers what it was asked: clustered vectors by the text alone."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        centres = np.random.default_rng(0).normal(size=(20, DIM))
        seeds = [sum(t.encode()) * 31 + len(t) * 7 + hash_of(t) for t in texts]
        own = np.stack([np.random.default_rng(s).normal(size=DIM) for s in seeds])
        rows = centres[[s % 20 for s in seeds]] + 0.5 * own
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def hash_of(text: str) -> int:
    """A number that does not change between processes."""
    return int.from_bytes(text.encode()[-6:], "little")


def catalogue(count: int) -> list[Product]:
    return [
        Product(
            f"p{i:05d}",
            f"thing{i} model{i % 97}",
            brand=f"brand{i % 7}",
            category=f"A > B{i % 5}",
            price=float(1 + i % 50),
        )
        for i in range(count)
    ]


def delta_of(products: Sequence[Product], deleted: Sequence[str] = (), name: str = "d") -> Delta:
    return Delta(tuple(products), tuple(deleted), name, QUARANTINE.empty_table())


def published(folder: Path, products: Sequence[Product], config: IndexConfig) -> PublishedIndex:
    """A published index of `products`."""
    build_index(Encoder(), products, config, folder / "built", NullSink())
    table = PublishedIndex(folder / "published")
    table.publish(folder / "built", Origin(fingerprint="built"), NullSink())
    return table


def rows_of(index: LanceIndex) -> dict[str, dict[str, object]]:
    """Every stored column of every row, by id."""
    rows = index.table.search().limit(None).to_list()
    return {row["product_id"]: row for row in rows}


@pytest.mark.parametrize("kind", ["exact", "ivf_sq"])
def test_a_refreshed_index_equals_a_rebuilt_one(tmp_path: Path, kind: str) -> None:
    before, config = catalogue(2500), IndexConfig(kind=kind, sample=15)
    table = published(tmp_path, before, config)
    renamed = [replace(p, title=f"new {p.title}") for p in before[100:130]]
    described = [replace(p, description="other words") for p in before[500:540]]
    dearer = [replace(p, price=99.0) for p in before[900:910]]
    same = before[1000:1025]
    added = [Product(f"n{i}", f"fresh{i}", price=1.0) for i in range(20)]
    gone = [p.product_id for p in before[2000:2015]]
    changed = [*renamed, *described, *dearer, *same, *added]
    encoder, sink = Encoder(), ListSink()
    made, counts = refresh(
        table,
        delta_of(changed, [*gone, "nobody"]),
        lambda _: encoder,
        RefreshConfig(batch_size=50),
        sink,
    )

    by_id = {p.product_id: p for p in before} | {p.product_id: p for p in changed}
    after = [p for p in by_id.values() if p.product_id not in gone]
    rebuilt_facts = build_index(Encoder(), after, config, tmp_path / "again", NullSink())
    rebuilt = LanceIndex.open(tmp_path / "again")
    assert rows_of(table.open()) == rows_of(rebuilt)

    # the price is a part of the text, the description is not
    texts = [product_text(p) for p in (*renamed, *dearer, *added)]
    assert sorted(encoder.texts) == sorted(texts) and counts.encoded == 30 + 10 + 20
    assert (counts.inserted, counts.updated, counts.unchanged) == (20, 30 + 40 + 10, 25)
    assert (counts.deleted, counts.absent) == (15, 1)
    assert made.facts.rows == len(table.open()) == rebuilt_facts.rows == 2500 + 20 - 15
    assert made.facts.unindexed_rows == (made.facts.rows if kind == "exact" else 0)
    assert made.facts.recall_at_10 >= 0.97
    assert made.facts.rows_since == (0 if kind == "exact" else counts.written)
    assert sink.series("refresh/encoded") == [60.0]
    for index in (table.open(), rebuilt):
        assert index.search_text("fresh7", 1)[0][0] == "n7"
        assert index.search_text(before[2003].title.split()[0], 5) == []
        assert len(index.search(encoder(["x"]), 40, Filters(min_price=99).sql())[0][0]) == 10


def test_many_small_batches_are_compacted(tmp_path: Path) -> None:
    before = catalogue(400)
    table = published(tmp_path, before, IndexConfig(sample=5))
    changed = [replace(p, title=f"new {p.title}") for p in before[:300]]
    made, _ = refresh(
        table, delta_of(changed), lambda _: Encoder(), RefreshConfig(batch_size=20), NullSink()
    )
    facts = {v["version"]: v["metadata"] for v in table.open().table.list_versions()}
    assert int(facts[made.version]["total_fragments"]) <= 2, "of sixteen"


def test_a_delta_that_changes_nothing_makes_no_version(tmp_path: Path) -> None:
    before, encoder = catalogue(50), Encoder()
    table = published(tmp_path, before, IndexConfig(sample=5))
    now = table.current()
    made, counts = refresh(
        table, delta_of(before, ["x"]), lambda _: encoder, RefreshConfig(), NullSink()
    )
    assert made == now == table.current() and encoder.texts == []
    assert counts == RefreshCounts(unchanged=50, absent=1)


def test_a_rolled_back_refresh_can_be_followed_by_another(tmp_path: Path) -> None:
    before = catalogue(60)
    table = published(tmp_path, before, IndexConfig(sample=5))
    wrong = delta_of([replace(before[0], title="wrong")], name="wrong")
    refresh(table, wrong, lambda _: Encoder(), RefreshConfig(), NullSink())
    table.rollback()
    right = delta_of([replace(before[1], title="right")], name="right")
    made, _ = refresh(table, right, lambda _: Encoder(), RefreshConfig(), NullSink())
    titles = [p.title for p in table.open().products(["p00000", "p00001"]).values()]
    assert sorted(titles) == ["right", before[0].title]
    assert made.deltas == ("right",)


@pytest.mark.parametrize(
    "changed",
    [50, 350],
    ids=["joins the partitions", "is trained anew"],
)
def test_the_vector_index_is_trained_anew_when_much_was_written(
    tmp_path: Path, changed: int
) -> None:
    before = catalogue(1000)
    table = published(tmp_path, before, IndexConfig(kind="ivf_flat", sample=10))
    delta = delta_of([replace(p, title=f"new {p.title}") for p in before[:changed]])
    made, _ = refresh(
        table, delta, lambda _: Encoder(), RefreshConfig(rebuild_share=0.2), NullSink()
    )
    parts = vector_index_stats(table.open().table).num_indices
    assert (made.facts.trained_rows, made.facts.unindexed_rows) == (1000, 0)
    worn = changed > 0.2 * 1000
    assert made.facts.rows_since == (0 if worn else changed)
    assert parts == (1 if worn else 2)


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_recall_lost_by_a_refresh_is_won_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """First at the setting that is served, with few probes; with all; at any; then by training."""
    before, measured = catalogue(1000), []
    table = published(tmp_path, before, IndexConfig(kind="ivf_flat", sample=10))
    served = table.current().facts  # type: ignore[union-attr]
    real = module.measured_facts

    def at_first_bad(*args: object, **kw: object) -> object:
        facts, nearest = real(*args, **kw)  # type: ignore[arg-type]
        measured.append(facts)
        worse = facts.model_copy(update={"recall_at_10": 0.5})
        return (worse if len(measured) <= bad else facts), nearest

    monkeypatch.setattr(module, "measured_facts", at_first_bad)
    delta = delta_of([replace(before[0], title="new")])
    made, _ = refresh(table, delta, lambda _: Encoder(), RefreshConfig(probes=4), NullSink())
    assert [(f.probes, bool(f.trials)) for f in measured] == [
        (4, False),
        (10, False),
        (10, True),
        (10, True),
    ][: bad + 1]
    for facts in measured[:2]:
        assert (facts.nprobes, facts.refine) == (served.nprobes, served.refine)
    assert [f.recall_at_100 is None for f in measured] == [True, True, False, False][: bad + 1]
    assert made.facts.rows_since == (0 if bad == 3 else 1)
    parts = vector_index_stats(table.open().table).num_indices
    assert parts == (1 if bad == 3 else 2)
    assert len(table.probes(made.version)) == 10, "the next refresh has all of them"


def test_a_small_delta_costs_a_small_part_of_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: texts embedded, rows read and written, searches, indexes trained."""
    before, work = catalogue(2000), Counter[str]()
    config = IndexConfig(kind="ivf_flat", sample=40, batch_size=100)
    table = published(tmp_path, before, config)

    def count(owner: type, name: str, size: Callable[..., int]) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kw: Any) -> Any:
            out = real(*args, **kw)
            work[name] += size(out, *args)
            return out

        monkeypatch.setattr(owner, name, counted)

    count(LanceTable, "create_index", lambda out, *args: 1)
    count(LanceDBConnection, "create_table", lambda out, *args: out.count_rows())
    count(LanceMergeInsertBuilder, "execute", lambda out, builder, data: len(data))
    count(LanceVectorQueryBuilder, "to_arrow", lambda out, *args: 1)
    count(LanceEmptyQueryBuilder, "to_arrow", lambda out, *args: len(out))
    count(LanceIndex, "vector_batches", lambda out, *args: 1)
    encoder = Encoder()
    changed = [replace(p, title=f"new {p.title}") for p in before[:10]]
    delta = delta_of([*changed, *before[10:20]])
    made, counts = refresh(table, delta, lambda _: encoder, RefreshConfig(probes=8), NullSink())
    assert (counts.updated, counts.unchanged, len(encoder.texts)) == (10, 10, 10)
    assert work["execute"] == 10 and work["create_table"] == 0, "rows written"
    assert work["to_arrow"] == 20 + 8, "rows read to be compared, and searches"
    assert work["create_index"] == 0 and made.facts.unindexed_rows == 0
    assert work["vector_batches"] == 0, "scans of the whole table"
    assert made.facts.rows_since == 10


@pytest.mark.parametrize("kind", ["exact", "ivf_flat"])
def test_the_neighbours_a_gate_measures_against_follow_the_refreshes(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = catalogue(1000)
    table = published(tmp_path, before, IndexConfig(kind=kind, sample=10))
    scans: list[object] = []
    scan = NearestProducts.scan.__func__  # type: ignore[attr-defined]

    def counted(*args: object) -> object:
        scans.append(args)
        return scan(*args)

    monkeypatch.setattr(NearestProducts, "scan", classmethod(counted))
    for turn, removed in enumerate([2, 2, 100]):
        known = table.nearest(table.current().version)  # type: ignore[union-attr]
        near = known.ids[0][:removed]
        fresh = catalogue(1000 + 200 * (turn + 1))[1000 + 200 * turn :]
        rows = [replace(p, title=f"{p.title} {turn}") for p in before[:20]] + fresh[: 40 - turn]
        written = {p.product_id for p in rows}
        delta = delta_of(rows, [i for i in near if i not in written], name=f"turn {turn}")
        made, _ = refresh(table, delta, lambda _: Encoder(), RefreshConfig(), NullSink())
        assert len(scans) == (1 if removed == 100 else 0), "only once too little is known"
        found, truth = table.nearest(made.version), table.open()
        exact = exact_top(truth.vector_batches(), found.probes_PD, 100)[0]
        assert [row[:10] for row in found.ids] == [row[:10] for row in exact[: len(found.ids)]]
        assert made.facts.recall_at_10 == 1.0


def test_an_interrupted_refresh_is_measured_against_a_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote before is not among the neighbours of the version it began with."""
    before = catalogue(60)
    table = published(tmp_path, before, IndexConfig(sample=5))
    delta = delta_of([replace(p, title=f"new {p.title}") for p in before[:40]])

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_delete", crash)
        refresh(table, delta, lambda _: Encoder(), RefreshConfig(), NullSink())
    made, _ = refresh(table, delta, lambda _: Encoder(), RefreshConfig(), NullSink())
    found = table.nearest(made.version)
    assert found.ids == exact_top(table.open().vector_batches(), found.probes_PD, 100)[0]


def test_a_catalogue_that_grows_gets_the_index_of_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.index.config.EXACT_BELOW", 500)
    before = catalogue(450)
    table = published(tmp_path, before, IndexConfig(sample=10))
    assert table.current().facts.kind == "exact"  # type: ignore[union-attr]
    grown = delta_of(catalogue(600)[450:], name="grown")
    made, _ = refresh(table, grown, lambda _: Encoder(), RefreshConfig(), NullSink())
    assert (made.facts.kind, made.facts.unindexed_rows) == ("ivf_sq", 0)
    shrunk = delta_of([], [f"p{i:05d}" for i in range(200)], name="shrunk")
    made, _ = refresh(table, shrunk, lambda _: Encoder(), RefreshConfig(), NullSink())
    assert (made.facts.kind, made.facts.nprobes) == ("exact", None)
    assert vector_index_stats(table.open().table) is None


def test_what_cannot_be_refreshed_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    nothing = PublishedIndex(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="nothing published"):
        refresh(nothing, delta_of(catalogue(1)), lambda _: Encoder(), RefreshConfig(), NullSink())
    before = catalogue(30)
    table = published(tmp_path, before, IndexConfig(sample=5))
    every = delta_of([], [p.product_id for p in before])
    with pytest.raises(ConfigError, match="deletes every product"):
        refresh(table, every, lambda _: Encoder(), RefreshConfig(), NullSink())
    other = delta_of([replace(before[0], title="new")], name="other")
    with pytest.raises(ConfigError, match="5 dimensions; expected 12"):
        refresh(table, other, lambda _: lambda t: np.eye(len(t), 5), RefreshConfig(), NullSink())
    assert len(table.open()) == 30
    made, _ = refresh(table, other, lambda _: Encoder(), RefreshConfig(), NullSink())
    assert made.facts.rows == 30
