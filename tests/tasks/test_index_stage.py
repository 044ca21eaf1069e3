"""The index stage embeds nothing that an index of the same encoder holds already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.index.config import IndexConfig
from models.index.lance import LanceIndex
from models.schemas import TABLES
from models.store import Store
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.embedder import index_catalogue
from tasks.settings import Settings
from tasks.stage import StageContext, pipeline, stage

CONFIG = IndexConfig(batch_size=8, sample=3)
TITLES = [f"thing{i}" for i in range(20)]


@stage(name="fake_store", kind="data")
def fake_store(ctx: StageContext, titles: list[str]) -> None:
    rows = {name: [] for name in TABLES}
    rows["products"] = [{"product_id": f"p{i}", "title": t} for i, t in enumerate(titles)]
    rows["queries"] = [{"query_id": f"q{i}", "text": f"query{i}"} for i in range(3)]
    tables = {name: pa.Table.from_pylist(rows[name], schema=TABLES[name]) for name in TABLES}
    Store(**tables).write(ctx.out / "store")


@stage(name="fake_encoder", kind="embedder")
def fake_encoder(ctx: StageContext, weights: str, run: int = 0) -> None:
    """`run` is a setting that left the weights as they were."""
    (ctx.out / "config.json").write_text("{}")
    (ctx.out / "model.safetensors").write_text(weights)


def vectors(weights: str, texts: Sequence[str]) -> np.ndarray:
    """A vector that depends on weights and text alone."""
    seeds = [list(f"{weights} {text}".encode()) for text in texts]
    rows = np.stack([np.random.default_rng(seed).normal(size=6) for seed in seeds])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def embedded(current: Settings, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Product texts that an encoder was asked for. A model is its weight file's text."""
    asked: list[str] = []

    def load(path: str, device: str) -> str:
        return (Path(path) / "model.safetensors").read_text()

    def documents(model: str, bf16: bool) -> Callable[[Sequence[str]], np.ndarray]:
        def encode(texts: Sequence[str]) -> np.ndarray:
            asked.extend(texts)
            return vectors(model, texts)

        return encode

    def queries(model: str, texts: Sequence[str], **_: object) -> np.ndarray:
        return vectors(model, texts)

    monkeypatch.setattr("models.embedder.encoder.load_encoder", load)
    monkeypatch.setattr("models.embedder.encoder.document_encoder", documents)
    monkeypatch.setattr("models.embedder.encoder.encode", queries)
    return asked


def index(weights: str, run: int = 0, titles: Sequence[str] = TITLES) -> ArtifactRef:
    encoder = fake_encoder.make(weights=weights, run=run)
    return index_catalogue.make(
        config=CONFIG, encoder=encoder, store=fake_store.make(titles=[*titles])
    )


def rows(ref: ArtifactRef, current: Settings) -> tuple[list[str], np.ndarray]:
    return LanceIndex.open(ArtifactStore(current).path(ref)).vectors()


def test_an_encoder_that_training_left_alone_embeds_nothing_again(
    embedded: list[str], current: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tasks.stage")
    first = index("sft")
    assert embedded == TITLES
    embedded.clear()
    second = index("sft", run=1)
    assert second.fingerprint != first.fingerprint and embedded == []
    assert f"the encoder is that of {first.label}: 20 vectors taken from it, 0 texts" in caplog.text
    (ids, before_ND), (same_ids, after_ND) = rows(first, current), rows(second, current)
    assert ids == same_ids and np.array_equal(before_ND, after_ND)
    assert index("sft", run=2).fingerprint != second.fingerprint and embedded == []


def test_another_catalogue_embeds_what_is_new_in_it(embedded: list[str], current: Settings) -> None:
    index("base")
    embedded.clear()
    titles = ["other", *TITLES[1:10], "another", *TITLES[11:], "added"]
    ref = index("base", titles=titles)
    assert embedded == ["other", "another", "added"]
    ids, got_ND = rows(ref, current)
    assert np.array_equal(got_ND, vectors("base", [titles[int(i[1:])] for i in ids]))


def test_vectors_of_other_weights_are_not_taken(embedded: list[str], current: Settings) -> None:
    index("sft")
    embedded.clear()
    ref = index("sft and rgrpo")
    assert embedded == TITLES
    ids, got_ND = rows(ref, current)
    assert np.array_equal(got_ND, vectors("sft and rgrpo", [TITLES[int(i[1:])] for i in ids]))


def test_vectors_of_a_harmed_index_or_another_store_are_not_taken(
    embedded: list[str], current: Settings
) -> None:
    with pipeline("other", experiment="other-shop"):
        index("sft")
    embedded.clear()
    first = index("sft", run=1)
    assert embedded == TITLES
    embedded.clear()
    (ArtifactStore(current).path(first) / "probes.npy").write_bytes(b"")
    index("sft", run=2)
    assert embedded == TITLES


def test_an_interrupted_build_goes_on_where_it_stopped(
    embedded: list[str], current: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying_at_second(texts: Sequence[str]) -> np.ndarray:
        if len(embedded) > 8:
            raise KeyboardInterrupt
        embedded.extend(texts)
        return vectors("sft", texts)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        patch.setattr("models.embedder.encoder.document_encoder", lambda m, bf16: dying_at_second)
        index("sft")
    assert embedded == TITLES[:16], "two batches of eight"
    embedded.clear()
    ref = index("sft")
    assert embedded == TITLES[16:]
    ids, got_ND = rows(ref, current)
    assert np.array_equal(got_ND, vectors("sft", [TITLES[int(i[1:])] for i in ids]))
    assert not list((current.home / "scratch").glob("*/vectors-*"))
