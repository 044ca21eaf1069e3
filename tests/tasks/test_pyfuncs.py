"""Registered versions load as standard MLflow models, and answer as the models behind them do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from models.embedder.encoder import document_encoder, encode, load_encoder
from models.embedder.tiny import build_tiny_encoder
from models.errors import ArtifactError, ConfigError, DataContractError
from models.evaluation.tiers import CumPT
from models.index.build import build_index
from models.index.config import IndexConfig
from models.index.lance import LanceIndex
from models.judge.config import PromptConfig
from models.judge.graded import pair_of
from models.judge.scoring import ScoringJudge
from models.judge.spec import JudgeSpec
from models.types import Product, Query
from tasks import pyfuncs, registry
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.settings import Settings
from tasks.stage import StageContext, stage
from tests.builders import make_pairs, make_tiny_judge

PAIRS = make_pairs(24)
PRODUCTS = [Product(f"p{i}", pair.product.title) for i, pair in enumerate(PAIRS)]


@stage(name="judge_calibrated", kind="judge")
def tiny_judge(ctx: StageContext, beta: float | None = 0.5) -> None:
    make_tiny_judge(ctx.out, PAIRS)
    spec = JudgeSpec.fit(PromptConfig(), PAIRS, [p.product for p in PAIRS])
    (spec if beta is None else spec.calibrated(CumPT(beta))).write(ctx.out)


@stage(name="embedder_rgrpo", kind="embedder")
def tiny_encoder(ctx: StageContext) -> None:
    build_tiny_encoder(ctx.out, [p.title for p in PRODUCTS])


@stage(name="index", kind="index")
def tiny_index(ctx: StageContext, encoder: ArtifactRef) -> None:
    model = load_encoder(str(ctx.open(encoder)))
    build_index(document_encoder(model), PRODUCTS, IndexConfig(sample=4), ctx.out, ctx.sink)


@pytest.fixture
def tracking(current: Settings, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", current.tracking_uri)
    monkeypatch.setenv("RELEARN_DEVICE", "cpu")
    return ArtifactStore(current)


def champion(name: str, ref: ArtifactRef) -> Any:
    registry.set_alias(name, "champion", registry.register(name, ref))
    return mlflow.pyfunc.load_model(f"models:/{name}@champion")


@pytest.mark.parametrize("attributes", [["red", "blue"], [["a", "b"]], "red"])
def test_attributes_that_are_no_pairs_are_refused_with_their_row(attributes: Any) -> None:
    row = {"query": "sofa", "title": "Sofa", "attributes": attributes}
    with pytest.raises(DataContractError, match=r"attributes .* in row 3 of pairs\.parquet"):
        pair_of(3, row, "pairs.parquet")


def test_nan_in_an_optional_column_is_nothing() -> None:
    nan = float("nan")
    row: dict[str, Any] = {"query": "sofa", "title": "Sofa", "vector": np.ones(3)}
    row |= {"description": nan, "attributes": nan, "price": nan, "category": "Home>Sofas"}
    product = pair_of(0, row, "pairs")[1]
    assert (product.description, product.attributes, product.price) == ("", {}, None)
    assert product.category == "Home > Sofas", "as a store holds it"
    pairs = pair_of(0, row | {"attributes": [("size", "L")]}, "pairs")
    assert pairs[1].attributes == {"size": "L"}


def test_a_price_that_is_no_number_is_none_and_an_infinite_one_is_refused() -> None:
    row = {"query": "sofa", "title": "Red sofa"}
    prices = [pair_of(0, row | {"price": v}, "the request")[1].price for v in (float("nan"), 9.5)]
    assert prices == [None, 9.5]
    for price in (float("inf"), -float("inf")):
        with pytest.raises(DataContractError, match=r"price -?inf in row 3 of the request"):
            pair_of(3, row | {"price": price}, "the request")


def test_a_judge_answers_as_it_scores(tracking: ArtifactStore) -> None:
    ref = tiny_judge.make()
    model = champion("shop-judge", ref)
    rows = pd.DataFrame(
        {
            "query": [p.query.text for p in PAIRS],
            "title": [p.product.title for p in PAIRS],
            "price": [9.5, None] * 12,
        }
    )
    got = model.predict(rows)
    judge = ScoringJudge.load(tracking.path(ref))
    pairs = [  # other ids: to a model that is served no query is a training query
        (Query("new", p.query.text), Product("x", p.product.title, price=v))
        for p, v in zip(PAIRS, rows["price"], strict=True)
    ]
    pairs = [
        (q, Product("x", p.title, price=None if p.price != p.price else p.price)) for q, p in pairs
    ]
    p_NL = judge.score(pairs)
    assert np.allclose(got[["p1", "p2", "p3", "p4"]], p_NL, atol=1e-5)
    assert got["grade"].tolist() == CumPT(0.5).grades(p_NL).tolist()
    assert set(got["tier"]) <= {"Good", "Mid", "Bad"} and list(got.columns)[-1] == "tier"


def test_an_index_finds_what_its_own_encoder_is_near(tracking: ArtifactStore) -> None:
    encoder = tiny_encoder.make()
    ref = tiny_index.make(encoder=encoder)
    model = champion("shop-index", ref)
    got = model.predict(pd.DataFrame({"query": ["red sofa", "oak desk"]}), params={"k": 3})
    vectors = encode(
        load_encoder(str(tracking.path(encoder))), ["red sofa", "oak desk"], prompt="query"
    )
    ids, _ = LanceIndex.open(tracking.path(ref)).search(vectors, 3)
    assert got["query"].tolist() == ["red sofa"] * 3 + ["oak desk"] * 3
    assert got["rank"].tolist() == [1, 2, 3] * 2
    assert got["product_id"].tolist() == ids[0] + ids[1]
    titles = {p.product_id: p.title for p in PRODUCTS}
    assert got["title"].tolist() == [titles[i] for i in got["product_id"]]
    words = model.predict(pd.DataFrame({"query": ["sofa"]}), params={"k": 2, "mode": "lexical"})
    assert len(words) == 2 and all("sofa" in title for title in words["title"])
    with pytest.raises(ConfigError, match="got mode 'magic'; expected one of vector"):
        model.predict(pd.DataFrame({"query": ["sofa"]}), params={"mode": "magic"})
    with pytest.raises(ConfigError, match="got k 0; expected 1 to 1000"):
        model.predict(pd.DataFrame({"query": ["sofa"]}), params={"k": 0})


def test_an_embedder_gives_unit_vectors(tracking: ArtifactStore) -> None:
    ref = tiny_encoder.make()
    got = champion("shop-embedder", ref).predict(pd.DataFrame({"text": ["red sofa", "lamp"]}))
    expected = encode(load_encoder(str(tracking.path(ref))), ["red sofa", "lamp"], prompt="query")
    assert np.allclose(got, expected, atol=1e-6) and got.dtype == np.float32


@pytest.mark.parametrize("kind", sorted(pyfuncs.EXAMPLES))
def test_a_version_has_signature_example_and_no_pickle(tracking: ArtifactStore, kind: str) -> None:
    encoder = tiny_encoder.make()
    ref = {"judge": tiny_judge.make, "embedder": tiny_encoder.make}.get(
        kind, lambda: tiny_index.make(encoder=encoder)
    )()
    version = registry.register("shop", ref)
    info = mlflow.models.get_model_info(f"models:/shop/{version}")
    assert info.signature == pyfuncs.signature_of(kind)
    found = registry.get("shop", version)
    assert found is not None and found.ref == ref
    root = tracking.path(ref).parent
    example = mlflow.models.Model.load(str(root)).load_input_example(str(root))
    assert {name: example[name].tolist() for name in example} == pyfuncs.EXAMPLES[kind]
    assert not [p for p in root.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert tracking.damage(tracking.client.get_run(ref.run_id)) == ""
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file())
    assert registry.register("shop", ref) == version
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()) == before


def test_what_a_model_cannot_read_is_refused(tracking: ArtifactStore) -> None:
    model = champion("shop-judge", tiny_judge.make())
    with pytest.raises(DataContractError, match="got query ' ' in row 1 of the request"):
        model.predict(pd.DataFrame({"query": ["sofa", " "], "title": ["a", "b"]}))
    with pytest.raises(MlflowException, match="missing inputs"):
        model.predict(pd.DataFrame({"query": ["sofa"]}))


def test_a_judge_without_calibration_is_refused(tracking: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match="expected a calibrated judge"):
        champion("shop-judge", tiny_judge.make(beta=None))


def test_a_version_from_before_keeps_its_number(tracking: ArtifactStore, home: Path) -> None:
    ref = tiny_encoder.make()
    version = registry.register("shop", ref)
    tracking.client.delete_model_version("shop", version)
    tags = {f"relearn.{k}": v for k, v in (("fingerprint", ref.fingerprint), ("kind", ref.kind))}
    old = tracking.client.create_model_version(
        "shop", ref.uri, ref.run_id, tags=tags | {"relearn.stage": ref.name}
    )
    assert registry.register("shop", ref) == str(old.version)
    (only,) = registry.versions("shop")
    assert only.ref == ref
