"""The drift stage and the served index's staleness, with untrained champions of a tiny store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from models.evaluation.monitor import SampleConfig
from models.index.config import IndexConfig, RefreshConfig
from models.sources import SyntheticSource
from models.split import SplitConfig
from models.store import Store
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.base import base_model
from tasks.embedder import index_catalogue
from tasks.ingest import ingest
from tasks.monitor import drift, index_age, read_drift, trained_on
from tasks.publish import publish, refresh_to, staleness
from tasks.settings import settings
from tasks.stage import StageContext, stage

SOURCE = SyntheticSource(num_products=100, num_queries=18, judgments_per_query=4)
SAMPLE = SampleConfig(queries=16, judged_queries=3, results=2)


@stage(name="judge", kind="judge")
def judge_of(ctx: StageContext, base: ArtifactRef, store: ArtifactRef) -> None:
    """An untrained judge with a prompt and a threshold."""
    from models.evaluation.tiers import CumPT
    from models.judge.config import PromptConfig
    from models.judge.spec import JudgeSpec

    shutil.copytree(ctx.open(base) / "weights", ctx.out, dirs_exist_ok=True)
    JudgeSpec.fit(PromptConfig(evidence=False), [], []).calibrated(CumPT(0.5)).write(ctx.out)


@stage(name="encoder", kind="embedder")
def encoder_of(ctx: StageContext, base: ArtifactRef, store: ArtifactRef) -> None:
    """An untrained encoder."""
    shutil.copytree(ctx.open(base) / "weights", ctx.out, dirs_exist_ok=True)


@stage(name="moved", kind="data")
def moved(ctx: StageContext, store: ArtifactRef) -> None:
    """The store with other queries, all of one segment, and ten products that cost more."""
    data = Store.read(ctx.open(store) / "store")
    texts = [f"zyx{i} quu{i}" for i in range(data.queries.num_rows)]
    queries = replaced(data.queries, "text", texts)
    queries = replaced(queries, "segment", ["question"] * len(texts))
    prices = data.products["price"].to_pylist()
    prices[:10] = [5000.0 + i for i in range(10)]
    products = replaced(data.products, "price", prices)
    replace(data, queries=queries, products=products).write(ctx.out / "store")


def replaced(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with other values in one column."""
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(values, table.schema.field(name).type))


def test_equal_data_does_not_drift_and_moved_data_does(home: Path) -> None:
    store = ingest.make(source=SOURCE, split=SplitConfig(), content="")
    bases = {
        role: base_model.make(name="tiny", role=role, content="", store=store)
        for role in ("judge", "embedder")
    }
    judge = judge_of.make(base=bases["judge"], store=store)
    encoder = encoder_of.make(base=bases["embedder"], store=store)
    index = index_catalogue.make(config=IndexConfig(sample=8), encoder=encoder, store=store)
    artifacts = ArtifactStore(settings())
    champions = {"judge": judge, "encoder": encoder, "index": index}
    reference = {"reference": trained_on(encoder, artifacts=artifacts)}
    reference["judge_reference"] = trained_on(judge, artifacts=artifacts)
    assert {ref.fingerprint for ref in reference.values()} == {store.fingerprint}

    def values(today: ArtifactRef) -> dict[str, float | None]:
        made = drift.make(sample=SAMPLE, max_new_tokens=4, today=today, **reference, **champions)
        found, notes = read_drift(artifacts.path(made))
        assert notes.keys() <= found.keys()
        return found

    same = values(store)
    assert same.pop("contradiction_rise") is None, "four tokens state no verdicts"
    assert len(same) == 8 and same == pytest.approx(dict.fromkeys(same, 0.0), abs=1e-6)
    other = moved.make(store=store)
    found = values(other)
    # zyx and quu are new; a number may be a known term
    assert found["query_new_terms"] is not None and found["query_new_terms"] > 0.5
    assert found["segment_shift"] is not None and found["segment_shift"] > 0.2
    assert found["query_mmd"] is not None and found["query_mmd"] > 0.02
    assert (found["product_new_terms"], found["category_shift"]) == (0.0, 0.0)
    assert found["confidence_drop"] != 0.0

    publish("shop", index, artifacts=artifacts)
    served, none = staleness("shop", store, artifacts=artifacts)
    assert (none.stale, none.products) == (0, 100)
    later = datetime.fromisoformat(served.made_at) + timedelta(hours=30)
    age, _ = index_age("shop", store, later, artifacts)
    assert age == {"index_stale_share": 0.0, "index_lag_hours": 0}
    age, notes = index_age("shop", other, later, artifacts)
    assert age == {"index_stale_share": 0.1, "index_lag_hours": 30.0}
    assert "10 changed" in notes["index_stale_share"]
    _, counts = refresh_to("shop", other, RefreshConfig(), artifacts=artifacts)
    assert (counts.updated, counts.inserted, counts.deleted, counts.encoded) == (10, 0, 0, 10)
    assert staleness("shop", other, artifacts=artifacts)[1].stale == 0
