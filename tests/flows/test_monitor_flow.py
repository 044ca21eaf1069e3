"""Monitor, refresh and backfill on a home with one finished run: same data, moved, and past."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import backfill as backfill_module
from flows import index
from flows.backfill import Span, backfill
from flows.index import refresh_index
from flows.monitor import monitor
from flows.scheduled import Chain
from models.errors import ArtifactError, ConfigError, DataContractError
from models.store import Store
from tasks.monitor import MONITOR
from tests.flows.conftest import SMALLER, at_home
from tests.flows.conftest import Chain as Finished

FEW = (
    "monitor.sample.queries=24",
    "monitor.sample.judged_queries=4",
    "monitor.sample.results=2",
)
NAME = "synthetic-smoke"
SAME = Chain(recipe="smoke", changes=(*SMALLER, *FEW))


def today(folder: Path) -> Chain:
    """The champions of the finished run, asked about the tables of `folder`."""
    changes = (*(c for c in SMALLER if not c.startswith("data.source")), *FEW, f"name={NAME}")
    return Chain(recipe="smoke", store="tables", data=str(folder), changes=changes)


def store_of(chain: Finished) -> Store:
    """The data of the finished run."""
    ref = next(r.ref for r in chain.results[0].reports if r.ref.name == "validate")
    return Store.read(chain.artifacts.path(ref) / "store")


def replaced(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with other values in one column."""
    at = table.column_names.index(name)
    return table.set_column(at, name, pa.array(values, table.schema.field(name).type))


def write(store: Store, folder: Path, **dates: list[Any]) -> Path:
    """A store as a folder of tables; dates: a column updated_at of a table."""
    folder.mkdir()
    for name in ("products", "queries", "judgments", "interactions"):
        table = getattr(store, name)
        gone = [c for c in ("split", "updated_at") if c in table.column_names]
        if name == "interactions" and not dates:
            gone.append("timestamp")  # or their age on the day of the test would be measured
        table = table.drop_columns(gone)
        if name in dates:
            table = table.append_column("updated_at", pa.array(dates[name], pa.timestamp("us")))
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


@pytest.fixture
def published(chain: Finished, tmp_path: Path) -> Iterator[Path]:
    """The served index of the finished run, put back afterwards."""
    folder = chain.home / "published" / NAME
    shutil.copytree(folder, tmp_path / "kept")
    yield folder
    shutil.rmtree(folder)
    shutil.move(tmp_path / "kept", folder)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Prefect was told."""
    import prefect.events

    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(prefect.events, "emit_event", lambda **kw: heard.append(kw) or kw)
    return heard


def passes(chain: Finished) -> int:
    """How many drift artifacts there are: passes that were not cached."""
    condition = "tags.`relearn.stage` = 'drift' and attributes.status = 'FINISHED'"
    return len(chain.artifacts.search(condition))


def test_the_data_of_the_champions_has_not_drifted(
    chain: Finished, events: list[dict[str, Any]]
) -> None:
    before = passes(chain)
    with at_home(chain.home):
        first, again = monitor(SAME), monitor(SAME)
    for done in (first, again):
        values = {v.name: v.value for v in done.report.values}
        # six tokens state no verdicts, and generated labels have no date
        assert values.pop("contradiction_rise") is None and values.pop("label_age_days") is None
        assert values == pytest.approx(dict.fromkeys(values, 0.0), abs=1e-6)
        assert (done.outcomes, events) == ([], [])
    assert passes(chain) - before == 1 and first.run_id != again.run_id
    run = chain.artifacts.client.get_run(again.run_id)
    assert run.data.metrics["drift/query_mmd"] == pytest.approx(0.0, abs=1e-6)
    assert (run.data.tags[MONITOR], run.data.tags[f"{MONITOR}.state"]) == (NAME, "ok")
    report = chain.artifacts.client.download_artifacts(again.run_id, "reports/monitor.md")
    assert "all within their limits" in Path(report).read_text()


def test_moved_data_is_marked_asked_for_once_and_mended(
    chain: Finished, published: Path, events: list[dict[str, Any]], tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    store = store_of(chain)
    queries, products = store.queries, store.products
    texts = [f"zyx{i} quu{i}" for i in range(queries.num_rows)]
    prices = [1000.0 + i for i in range(products.num_rows)]
    queries = replaced(queries, "text", texts)
    queries = replaced(queries, "segment", ["question"] * len(texts))
    products = replaced(products, "price", prices)
    moved = today(write(replace(store, queries=queries, products=products), tmp_path / "moved"))
    with at_home(chain.home):
        first, again = monitor(moved), monitor(moved)
        assert {"query_new_terms", "segment_shift", "index_stale_share"} <= {
            v.name for v in first.report.over
        }
        stale = next(v for v in first.report.values if v.name == "index_stale_share")
        assert stale.value == 1.0 and "120 changed" in stale.note
        asked = [e["resource"]["relearn.deployment"] for e in events]
        assert sorted(asked) == ["refresh-index", "retrain"]
        assert all(e["payload"]["chain"] == moved.model_dump(mode="json") for e in events)
        assert len(again.outcomes) == 2 and all("not asked for again" in o for o in again.outcomes)
        wanted = events[asked.index("refresh-index")]["payload"]["chain"]
        refreshed = refresh_index(Chain.model_validate(wanted))
        mended = monitor(moved)
    assert (refreshed["updated"], refreshed["inserted"], refreshed["deleted"]) == (120, 0, 0)
    values = {v.name: v.value for v in mended.report.values}
    assert values["index_stale_share"] == 0.0 and values["index_lag_hours"] == 0.0
    shown = ArtifactFilter(key=ArtifactFilterKey(any_=[f"monitor-{NAME}"]))
    with get_client(sync_client=True) as client:
        kept = client.read_artifacts(artifact_filter=shown)
    assert any("OVER" in str(a.data) and "retrain asked for" in str(a.data) for a in kept)


def test_a_delta_folder_may_be_empty_and_must_be_there(
    chain: Finished, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with at_home(chain.home):
        assert "nothing changed" in refresh_index(SAME, str(tmp_path / "empty"))["delta"]
        with pytest.raises(ConfigError, match=r"delta /nowhere on this machine"):
            refresh_index(SAME, "/nowhere")
        (tmp_path / "empty" / "product.csv").write_text("product_id,title\n")
        with pytest.raises(DataContractError, match=r"products\.parquet"):
            refresh_index(SAME, str(tmp_path / "empty"))
        write(store_of(chain), tmp_path / "delta")
        unchanged = refresh_index(SAME, str(tmp_path / "delta"))
    assert (unchanged["unchanged"], unchanged["updated"]) == (120, 0)


def test_the_settings_of_a_refresh_come_with_its_chain(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(index, "_require_published", lambda name: 1)
    monkeypatch.setattr(index, "prepare_data", lambda config: None)
    monkeypatch.setattr(index, "_refreshed", lambda *v, **how: given.append((v[3], how)))
    (tmp_path / "products.csv").write_text("product_id,title\n")
    chain = Chain(changes=("refresh.max_deleted=0.5",))
    for delta in (None, str(tmp_path)):
        refresh_index.fn(chain, delta)
    assert [config.max_deleted for config, _ in given] == [0.5, 0.5]
    assert given[1][1] == {"encoding": "utf-8"}
    latin = Chain(store="tables", changes=("data.source.encoding=latin-1",))
    refresh_index.fn(latin, str(tmp_path))
    assert given[2][1] == {"encoding": "latin-1"}


@pytest.mark.parametrize("flow", [monitor, refresh_index])
def test_without_champions_the_first_step_is_named(
    prefect_server: None, home: Path, flow: Any
) -> None:
    with pytest.raises(
        ArtifactError, match=r"no (champion|published index) of synthetic .*retrain/retrain"
    ):
        flow(Chain())


def test_past_days_are_measured_on_what_they_had_and_ask_for_nothing(
    chain: Finished, events: list[dict[str, Any]], tmp_path: Path
) -> None:
    store = store_of(chain)
    rows = store.judgments.num_rows
    days = [datetime(2026, 3, 1 if i % 2 else 5) for i in range(rows)]
    dates = {"products": [datetime(2026, 1, 1)] * store.products.num_rows, "judgments": days}
    past = today(write(store, tmp_path / "dated", **dates))
    span = Span(from_date=date(2026, 3, 4), to_date=date(2026, 3, 6), flow="monitor")
    before = passes(chain)
    with at_home(chain.home):
        made = backfill(past, span)
    assert [row["day"] for row in made] == ["2026-03-04", "2026-03-05", "2026-03-06"]
    assert [row["judgments"] for row in made] == [rows // 2, rows, rows]
    ages = [row["result"]["drift/label_age_days"] for row in made]
    assert ages == [4.0, 1.0, 2.0], "days from the newest judgment to the end of the day"
    assert "drift/index_stale_share" not in made[0]["result"]
    assert passes(chain) - before == 2, "between the 5th and the 6th nothing changed"
    assert events == [] and not list((chain.home / "work").glob("backfill-*"))


def test_a_past_training_has_a_name_of_its_own(
    chain: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Chain] = []

    def instead(then: Chain) -> Any:
        called.append(then)
        assert (Path(str(then.data)) / "judgments.parquet").is_file()
        return chain.results[0].release

    monkeypatch.setattr(backfill_module, "retrain", instead)
    undated = ("products", "judgments", "interactions")
    now = today(write(store_of(chain), tmp_path / "now"))
    span = Span(
        from_date=date(2026, 3, 1),
        to_date=date(2026, 3, 9),
        every_days=7,
        flow="retrain",
        undated=undated,
    )
    with at_home(chain.home):
        made = backfill(now, span)
    assert [row["day"] for row in made] == ["2026-03-01", "2026-03-08"]
    assert {then.config.name for then in called} == {f"{NAME}-backfill"}


def versions(chain: Finished) -> dict[str, list[str]]:
    """Registered models of the home, with their versions."""
    client = chain.artifacts.client
    return {
        model.name: sorted(v.version for v in client.search_model_versions(f"name='{model.name}'"))
        for model in client.search_registered_models()
    }


@pytest.mark.live
def test_past_days_are_trained_for_real_and_once(chain: Finished, tmp_path: Path) -> None:
    """The whole chain on the judgments of two past days, then again: live names stay as they are,
    each day has its own versions, and the second time makes none."""
    store = store_of(chain)
    days = [datetime(2026, 3, 5 if i % 8 == 0 else 1) for i in range(store.judgments.num_rows)]
    now = today(write(store, tmp_path / "dated", judgments=days))
    span = Span(
        from_date=date(2026, 3, 4),
        to_date=date(2026, 3, 5),
        flow="retrain",
        undated=("products", "interactions"),
    )
    live = versions(chain)
    served = sorted(p.name for p in (chain.home / "published" / NAME).iterdir())
    with at_home(chain.home):
        made = backfill(now, span)
    assert [row["day"] for row in made] == ["2026-03-04", "2026-03-05"]
    assert made[0]["judgments"] < made[1]["judgments"] == store.judgments.num_rows
    assert made[0]["result"]["artifacts"] != made[1]["result"]["artifacts"]
    after = versions(chain)
    past = {name: found for name, found in after.items() if name not in live}
    assert {name: after[name] for name in live} == live
    assert sorted(past) == [f"{NAME}-backfill-{kind}" for kind in ("embedder", "index", "judge")]
    assert sorted(p.name for p in (chain.home / "published" / NAME).iterdir()) == served
    with at_home(chain.home):
        again = backfill(now, span)
    assert [row["result"]["artifacts"] for row in again] == [
        row["result"]["artifacts"] for row in made
    ]
    assert versions(chain) == after


def test_a_backfill_without_dates_says_what_is_missing(chain: Finished, tmp_path: Path) -> None:
    span = Span(from_date=date(2026, 3, 1), to_date=date(2026, 3, 1))
    with at_home(chain.home):
        with pytest.raises(ConfigError, match=r"backfill of the store synthetic.*dated tables"):
            backfill(SAME, span)
        now = today(write(store_of(chain), tmp_path / "now"))
        with pytest.raises(
            DataContractError, match=r"no column updated_at or timestamp"
        ) as refused:
            backfill(now, span)
    assert "backfill of 2026-03-01; 0 days" in "".join(refused.value.__notes__)


def test_a_span_must_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="lies before"):
        Span(from_date=date(2026, 3, 2), to_date=date(2026, 3, 1))
