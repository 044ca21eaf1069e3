"""The deployed flows on a home with one finished run: what they reuse, make and refuse."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flows.backfill import Span, backfill
from flows.index import refresh_index
from flows.monitor import monitor
from flows.scheduled import Chain, evaluate_champion, retrain, retrain_embedder, retrain_judge
from models.errors import ArtifactError, ConfigError, RelearnError
from tasks.links import KEY
from tests.flows.conftest import SMALLER, at_home
from tests.flows.conftest import Chain as Finished

CHAIN = Chain(recipe="smoke", changes=SMALLER)


def test_retrain_is_the_chain_of_the_command_line(chain: Finished) -> None:
    with at_home(chain.home):
        rows = retrain(CHAIN).registered
    assert [r["artifact"] for r in rows] == [r["artifact"] for r in chain.results[0].registered]


def test_judge_or_retriever_alone_is_completed_by_the_champion(chain: Finished) -> None:
    before = {r["model"]: r["artifact"] for r in chain.results[0].registered}
    with at_home(chain.home):
        for released in (retrain_judge(CHAIN), retrain_embedder(CHAIN)):
            # the champion judge is the one of the first run, so nothing is made again
            assert {r["model"]: r["artifact"] for r in released.registered} == before
            assert released.action is None and "nothing to do" in released.decision.summary


def test_a_champion_that_disagrees_with_people_teaches_nobody(chain: Finished) -> None:
    strict = CHAIN.model_copy(update={"changes": (*SMALLER, "gate.min_kappa=0.99")})
    with at_home(chain.home), pytest.raises(ArtifactError, match=r"kappa -?0\.\d+ .*0\.99"):
        retrain_embedder(strict)


def test_champions_are_measured_and_nothing_is_registered(chain: Finished) -> None:
    with at_home(chain.home):
        tables = evaluate_champion(CHAIN)
    overall = {name: [r for r in rows if r["segment"] == "all"] for name, rows in tables.items()}
    assert [r["judge"] for r in overall["judge"]] == ["majority", "champion", "champion + CumPT"]
    assert [r["run"] for r in overall["retrieval"]] == ["random", "bm25", "champion"]
    assert overall["judge"][1]["n"] == 40
    # the same judge on the same pairs as in the run that trained it
    from tasks.evaluate import JUDGE_TABLE, read_table

    trained = read_table(chain.artifacts.path(chain.results[0].judge.evaluation), JUDGE_TABLE)
    cumpt = next(r for r in trained if r["judge"] == "+ GRPO + CumPT" and r["segment"] == "all")
    assert overall["judge"][2]["macro_f1"] == pytest.approx(cumpt["macro_f1"])


@pytest.mark.parametrize("flow", [retrain_judge, retrain_embedder, evaluate_champion])
def test_without_a_champion_the_first_step_is_named(
    prefect_server: None, home: Path, flow: object
) -> None:
    with pytest.raises(ArtifactError, match=r"no champion \w+ of synthetic .*retrain/retrain"):
        flow(Chain())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("flow", "more"),
    [
        *((flow, {}) for flow in (retrain, retrain_judge, retrain_embedder, evaluate_champion)),
        (monitor, {}),
        (refresh_index, {}),
        (backfill, {"span": Span(from_date="2026-01-01", to_date="2026-01-01")}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_deployed_flow_prepares_its_environment_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch, flow: Any, more: dict[str, Any]
) -> None:
    monkeypatch.setenv("RELEARN_MLFLOW_TIMEOUT_S", "7")
    monkeypatch.setenv("RELEARN_NUM_THREADS", "3")
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    with pytest.raises(RelearnError):
        flow.fn(Chain(data="/nowhere"), **more)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_missing_data_folder_is_named_and_a_given_one_does_not_stay(
    prefect_server: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"data /nowhere on this machine"):
        retrain(Chain(store="tables", data="/nowhere"))
    monkeypatch.setenv("RELEARN_DATA_DIR", "/before")
    with pytest.raises(Exception, match=str(tmp_path)):
        retrain(Chain(store="tables", data=str(tmp_path)))  # no tables in it
    assert os.environ["RELEARN_DATA_DIR"] == "/before"


def test_a_flow_run_links_to_its_mlflow_run(
    chain: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    monkeypatch.setenv("RELEARN_MLFLOW_UI", "http://127.0.0.1:5999/")
    with at_home(chain.home):
        retrain_judge(CHAIN)
    with get_client(sync_client=True) as client:
        # a page of all artifacts may not reach it
        only = ArtifactFilter(key=ArtifactFilterKey(any_=[KEY]))
        found = client.read_artifacts(artifact_filter=only)
        (link,) = [a for a in found if ":5999" in str(a.data)]
        flow_id = client.read_flow_run(link.flow_run_id).flow_id
        assert client.read_flow(flow_id).name == "retrain-judge"
    newest = chain.artifacts.search("tags.`relearn.pipeline` != ''", limit=1)[0].info
    address = f"http://127.0.0.1:5999/#/experiments/{newest.experiment_id}/runs/{newest.run_id}"
    assert address in str(link.data)
