"""Publishing artifacts: from a stage's ref to what is served, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ArtifactError, ConfigError, DataContractError
from models.index.build import build_index
from models.index.config import IndexConfig, RefreshConfig
from models.index.published import PublishedIndex
from models.metrics import ListSink
from models.schemas import PRODUCTS
from models.sources import TablesSource, digest
from models.split import SplitConfig
from models.types import Product
from tasks import publish as module
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.ingest import ingest
from tasks.publish import (
    history,
    open_published,
    publish,
    published,
    refresh,
    refresh_to,
    serve,
    staleness,
)
from tasks.settings import Settings
from tasks.stage import StageContext, stage


def encode(texts: Sequence[str]) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=6) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@stage(name="fake_encoder", kind="embedder")
def fake_encoder(ctx: StageContext, mark: str) -> None:
    (ctx.out / "weights.txt").write_text(mark)


@stage(name="fake_index", kind="index")
def fake_index(ctx: StageContext, mark: str, encoder: ArtifactRef) -> None:
    rows = [Product(f"p{i}", f"{mark} thing{i}") for i in range(12)]
    build_index(encode, rows, IndexConfig(sample=2), ctx.out, ctx.sink)


@stage(name="fake_catalogue", kind="data")
def fake_catalogue(ctx: StageContext, mark: str, count: int) -> None:
    """The products of a store, titled as `fake_index` titles them."""
    rows = [{"product_id": f"p{i}", "title": f"{mark} thing{i}"} for i in range(count)]
    (ctx.out / "store").mkdir()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=PRODUCTS), ctx.out / "store" / "products.parquet"
    )


def made(mark: str) -> ArtifactRef:
    """An index artifact and the encoder below it."""
    return fake_index.make(mark=mark, encoder=fake_encoder.make(mark=mark))


def test_the_served_index_brings_its_own_encoder(home: Path, current: Settings) -> None:
    assert published("shop") is None
    first, second = made("a"), made("b")
    assert publish("shop", first).origin.fingerprint == first.fingerprint
    publish("shop", second)
    index, weights = open_published("shop")
    assert (Path(weights) / "weights.txt").read_text() == "b"
    assert next(iter(index.products(["p3"]).values())).title == "b thing3"
    serve("shop", first, artifacts=ArtifactStore(current))
    index, weights = open_published("shop")
    assert (Path(weights) / "weights.txt").read_text() == "a"
    assert next(iter(index.products(["p3"]).values())).title == "a thing3"
    assert [p.origin.label for p in history("shop")] == [second.label, first.label]
    assert (home / "published" / "shop" / "products.lance").is_dir()
    assert published("other") is None, "stores do not share a table"


def test_a_delta_folder_refreshes_what_is_served(
    current: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("shop", made("a"))
    delta = tmp_path / "delta"
    delta.mkdir()
    rows = {"product_id": ["p1", "p2"], "title": ["new", None], "deleted": [False, True]}
    pq.write_table(pa.table(rows), delta / "products.parquet")
    asked = []
    monkeypatch.setattr(
        module, "_lazy_encoder", lambda artifacts, label: asked.append(label) or encode
    )
    sink = ListSink()
    now, counts = refresh("shop", delta, RefreshConfig(), sink=sink)
    assert (counts.encoded, counts.updated, counts.deleted) == (1, 1, 1)
    assert asked == [fake_encoder.make(mark="a").label]
    assert published("shop") == now and now.facts.rows == 11 and len(now.deltas) == 1
    assert now.origin == history("shop")[-1].origin
    assert sink.series("refresh/updated") == [1.0]


def encoder_named(label: str) -> Callable[[Sequence[str]], np.ndarray]:
    """Vectors that tell which encoder wrote them."""
    return lambda texts: encode([f"{label} {text}" for text in texts])


def overtaken(monkeypatch: pytest.MonkeyPatch, move: Callable[[], object]) -> None:
    """The next writer gets its lock only after another one, which carries out `move`."""
    real = PublishedIndex.writing

    def writing(table: PublishedIndex) -> object:
        monkeypatch.setattr(PublishedIndex, "writing", real)
        move()
        return real(table)

    monkeypatch.setattr(PublishedIndex, "writing", writing)


@pytest.mark.parametrize("back", [False, True], ids=["promotion", "rollback"])
def test_a_refresh_that_waited_behind_a_move_embeds_with_what_is_served_then(
    current: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    first, second = made("a"), made("b")
    publish("shop", first)
    if back:
        publish("shop", second)
    (tmp_path / "products.csv").write_text("product_id,title\np1,new\n")
    monkeypatch.setattr(module, "_lazy_encoder", lambda artifacts, label: encoder_named(label))
    served = first if back else second
    overtaken(monkeypatch, lambda: serve("shop", served, artifacts=ArtifactStore(current)))
    now, _ = refresh("shop", tmp_path, RefreshConfig())
    assert now.origin.fingerprint == served.fingerprint
    ids, vectors_ND = open_published("shop")[0].vectors()
    wanted_ND = encoder_named(now.origin.encoder)(["new"])
    assert np.array_equal(vectors_ND[[ids.index("p1")]], wanted_ND)


def test_a_whole_catalogue_mends_what_is_served_when_it_gets_its_turn(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    today, second = fake_catalogue.make(mark="a", count=11), made("b")
    publish("shop", made("a"))
    monkeypatch.setattr(module, "_lazy_encoder", lambda artifacts, label: encode)
    overtaken(monkeypatch, lambda: publish("shop", second))
    now, counts = refresh_to("shop", today, RefreshConfig())
    assert now.origin.fingerprint == second.fingerprint
    assert (counts.updated, counts.deleted) == (11, 1)
    assert staleness("shop", today)[1].stale == 0


def test_a_catalogue_cut_short_leaves_the_served_index_alone(
    current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("shop", made("a"))
    monkeypatch.setattr(module, "_lazy_encoder", lambda artifacts, label: encode)
    short = fake_catalogue.make(mark="a", count=9)
    before = published("shop")
    with pytest.raises(ConfigError, match=r"3 of 12 served .*at most 20%.*refresh\.max_deleted"):
        refresh_to("shop", short, RefreshConfig())
    assert published("shop") == before
    now, counts = refresh_to("shop", short, RefreshConfig(max_deleted=1))
    assert (counts.deleted, now.facts.rows) == (3, 9)


def test_a_product_that_todays_data_holds_with_a_fault_stays(
    current: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("shop", made("a"))
    rows = "".join(f"p{i},a thing{i},{'free' if i in (3, 4) else ''}\n" for i in range(11))
    (tmp_path / "products.csv").write_text(f"product_id,title,price\n{rows}")
    (tmp_path / "queries.csv").write_text("query_id,text\nq1,one\nq2,two\nq3,three\n")
    graded = "q1,p1,4\nq2,p1,3\nq3,p1,2\n"
    (tmp_path / "judgments.csv").write_text(f"query_id,product_id,grade\n{graded}")
    monkeypatch.setenv("RELEARN_DATA_DIR", str(tmp_path))
    content = digest(TablesSource(), tmp_path)
    today = ingest.make(source=TablesSource(), split=SplitConfig(), content=content)
    _, counts = refresh_to("shop", today, RefreshConfig())
    assert (counts.deleted, counts.refused) == (1, 2)
    index, _ = open_published("shop")
    assert index.products(["p3", "p11"])["p3"].title == "a thing3" and len(index) == 11
    assert staleness("shop", today)[1].stale == 0


def test_promotions_keep_as_many_versions_as_refreshes_are_configured_to(
    current: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_lazy_encoder", lambda artifacts, label: encode)
    publish("shop", made("a"))
    (tmp_path / "products.csv").write_text("product_id,title\np1,new\n")
    refresh("shop", tmp_path, RefreshConfig(keep=5))
    (tmp_path / "products.csv").write_text("product_id,title\np1,newer\n")
    # asks for no number; a recipe with its changes comes with every field given
    other = RefreshConfig.model_validate(RefreshConfig(probes=9).model_dump())
    refresh("shop", tmp_path, other)
    for mark in "bc":
        serve("shop", made(mark), artifacts=ArtifactStore(current))
    assert len(history("shop")) == 5
    serve("shop", made("d"), artifacts=ArtifactStore(current))
    assert len(history("shop")) == 5


def test_a_delta_is_read_in_the_encoding_of_its_store(
    current: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_lazy_encoder", lambda artifacts, label: encode)
    publish("shop", made("a"))
    (tmp_path / "products.csv").write_bytes("product_id,title\np1,Küche\n".encode("latin-1"))
    with pytest.raises(DataContractError, match=r"data\.source\.encoding=latin-1"):
        refresh("shop", tmp_path, RefreshConfig())
    refresh("shop", tmp_path, RefreshConfig(), encoding="latin-1")
    index, _ = open_published("shop")
    assert index.products(["p1"])["p1"].title == "Küche"


def test_what_cannot_be_served_is_refused(current: Settings, tmp_path: Path) -> None:
    encoder = fake_encoder.make(mark="a")
    with pytest.raises(ArtifactError, match="an index"):
        publish("shop", encoder)
    with pytest.raises(ConfigError, match="the store name"):
        published("../shop")
    with pytest.raises(ArtifactError, match="no published index of shop"):
        open_published("shop")
    with pytest.raises(ArtifactError, match="no published index of shop"):
        refresh("shop", tmp_path, RefreshConfig())
    ref = made("b")
    publish("shop", ref)
    artifacts = ArtifactStore(current)
    for run in artifacts.search("tags.`relearn.stage` = 'fake_encoder'"):
        artifacts.client.delete_run(run.info.run_id)
    with pytest.raises(ArtifactError, match="no run that made fake_encoder"):
        open_published("shop")
