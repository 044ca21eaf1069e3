"""The whole chain on a tiny store: made once, cached after, re-made exactly where it must be."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest

from flows.tables import JUDGE_COLUMNS, RETRIEVAL_COLUMNS
from models.evaluation.gate import Outcome
from models.evaluation.outcomes import Outcomes
from models.store import SPLITS, Store
from models.text import normalise
from tasks import registry
from tasks.artifacts import ArtifactStore
from tasks.evaluate import JUDGE_TABLE, RETRIEVAL_TABLE, read_table
from tasks.gate import _measure_judge, _measure_retrieval, contender
from tasks.publish import published
from tasks.release import Action, release_of
from tasks.settings import settings
from tasks.stage import Stage
from tests.flows.conftest import Chain, at_home, small_config

STAGES = {
    "ingest": 1,
    "validate": 1,
    "base_model": 2,
    "judge_prompt": 1,
    "judge_teacher": 2,
    "judge_cot_sft": 1,
    "judge_probe": 1,
    "judge_pass_at_n": 1,
    "judge_dpo": 1,
    "judge_grpo": 1,
    "judge": 1,
    "judge_answers": 4,
    "evaluate_judge": 1,
    "embedder_sft": 1,
    "embedder_rgrpo": 1,
    "index": 3,
    "evaluate_retrieval": 1,
}
"""Stages of one run and how often each is called."""
AFTER_DPO = {
    "judge_dpo": 1,
    "judge_grpo": 1,
    "judge": 1,
    "judge_answers": 2,
    "evaluate_judge": 1,
    "embedder_rgrpo": 1,
    "index": 1,
    "evaluate_retrieval": 1,
}
"""Those that read DPO's output, directly or not."""
JUDGES = ["majority", "zero-shot", "CoT SFT", "+ DPO", "+ GRPO", "+ GRPO + CumPT"]
RUNS = ["random", "bm25", "base", "SFT", "SFT + R-GRPO"]


def test_every_stage_is_made_once(chain: Chain) -> None:
    reports = chain.results[0].reports
    assert Counter(r.ref.name for r in reports) == STAGES
    assert not any(r.cached for r in reports)
    assert all(chain.artifacts.path(r.ref).is_dir() for r in reports)
    assert len({r.ref.fingerprint for r in reports}) == len(reports)


def test_the_judge_table_is_complete(chain: Chain) -> None:
    rows = read_table(chain.artifacts.path(chain.results[0].judge.evaluation), JUDGE_TABLE)
    overall = [r for r in rows if r["segment"] == "all"]
    assert [r["judge"] for r in overall] == JUDGES
    for row in overall:
        f1 = [row[f"f1_{g}"] for g in (1, 2, 3, 4)]
        assert row["macro_f1"] == pytest.approx(sum(f1) / 4)
        assert all(0 <= row[name] <= 1 for name in ("macro_f1", "accuracy"))
        assert -1 <= row["kappa"] <= 1 and row["n"] == 40
    majority = overall[0]
    assert majority["kappa"] == pytest.approx(0)
    assert sum(majority[f"f1_{g}"] > 0 for g in (1, 2, 3, 4)) == 1
    for segment in {r["segment"] for r in rows}:
        assert [r["judge"] for r in rows if r["segment"] == segment] == JUDGES


def test_the_retrieval_table_is_complete(chain: Chain) -> None:
    folder = chain.artifacts.path(chain.results[0].retriever.evaluation)
    rows = read_table(folder, RETRIEVAL_TABLE)
    overall = [r for r in rows if r["segment"] == "all"]
    assert [r["run"] for r in overall] == RUNS
    metrics = ("recall@10", "hitrate@100", "ndcg@10", "mrr@10", "judged@10", "quality@10")
    for row in overall:
        assert all(0 <= row[name] <= 1 for name in metrics)
        assert row["quality_source"] and math.isfinite(row["goodrate@10"])
    # BM25 knows the words; a random run of 120 products does not
    assert overall[1]["ndcg@10"] > overall[0]["ndcg@10"]
    assert {f"{run}.trec" for run in RUNS} | {"qrels.txt"} <= {p.name for p in folder.iterdir()}


def test_every_column_of_the_terminal_tables_is_filled(chain: Chain) -> None:
    for part, file, columns in (
        (chain.results[0].judge, JUDGE_TABLE, JUDGE_COLUMNS),
        (chain.results[0].retriever, RETRIEVAL_TABLE, RETRIEVAL_COLUMNS),
    ):
        rows = read_table(chain.artifacts.path(part.evaluation), file)
        missing = {c for c in columns if not any(c in row for row in rows)}
        assert missing <= {"contradiction_rate"}, "a random judge may state nothing"


def test_candidate_and_first_champion_are_registered(chain: Chain) -> None:
    rows = chain.results[0].registered
    assert [r["model"] for r in rows] == [
        f"synthetic-smoke-{role}" for role in ("judge", "embedder", "index")
    ]
    result = chain.results[0]
    refs = (result.judge.judge, result.retriever.embedder, result.retriever.index)
    for row, ref in zip(rows, refs, strict=True):
        (version,) = registry.versions(row["model"], store=chain.artifacts)[:1]
        assert version.aliases == ("candidate", "champion") and version.version == "1"
        assert version.ref.fingerprint == ref.fingerprint
        assert version.metrics


def test_the_first_champion_is_published(chain: Chain) -> None:
    ref = chain.results[0].retriever.index
    served = published(small_config().name, artifacts=chain.artifacts)
    assert served is not None and served.origin.fingerprint == ref.fingerprint
    assert served.origin.encoder == chain.results[0].retriever.embedder.label
    assert served.facts.rows == 120 and served.deltas == ()


def test_the_first_release_is_champion_and_its_floors_are_noted(chain: Chain) -> None:
    released = chain.results[0].release
    assert released.action is Action.FIRST and released.decision.outcome is Outcome.PROMOTE
    rows = {r.name: r for r in released.decision.reasons}
    table = read_table(chain.artifacts.path(chain.results[0].judge.evaluation), JUDGE_TABLE)
    served = [r for r in table if r["segment"] == "all"][-1]
    assert rows["judge kappa"].candidate == pytest.approx(served["kappa"])
    table = read_table(chain.artifacts.path(chain.results[0].retriever.evaluation), RETRIEVAL_TABLE)
    last = [r for r in table if r["segment"] == "all"][-1]
    assert rows["retrieval nDCG@10"].candidate == pytest.approx(last["ndcg@10"])
    assert rows["index recall@10"].candidate == 1.0


def test_what_the_stages_measure_of_a_champion_is_what_its_own_run_kept(chain: Chain) -> None:
    """A champion is measured on a candidate's set; here the candidate is the champion itself."""
    name = small_config().name
    with at_home(chain.home):
        release = release_of(name, "champion", artifacts=chain.artifacts)
        assert release is not None
        known = contender(name, release, artifacts=chain.artifacts).outcomes
        for what, measure in (("judge", _measure_judge), ("retrieval", _measure_retrieval)):
            made = measure(release, release, chain.artifacts, Stage.make)
            found = Outcomes.read(chain.artifacts.path(made))
            assert found.evaluation_set == known[what].evaluation_set
            assert found.values == known[what].values and found.values
            assert found.segments == known[what].segments


def test_no_test_query_is_in_any_training_pair(chain: Chain) -> None:
    """Splits are disjoint by text, and no stage before the evaluation read a test query."""
    by_name = {r.ref.name: chain.artifacts.path(r.ref) for r in chain.results[0].reports}
    store = Store.read(by_name["validate"] / "store")
    texts = {s: {normalise(store.query_by_id[q].text) for q in store.query_ids(s)} for s in SPLITS}
    assert all(texts[s] for s in SPLITS)
    assert not texts["train"] & (texts["test"] | texts["validation"])
    assert not texts["test"] & texts["validation"]
    train = set(store.query_ids("train"))
    lines = [
        line
        for stage, file in (("judge_pass_at_n", "samples"), ("judge_pass_at_n", "preferences"))
        for line in (by_name[stage] / f"{file}.jsonl").read_text().splitlines()
    ]
    seen = {json.loads(line)["query_id"] for line in lines}
    seen |= {
        row["query_id"]
        for row in json.loads((by_name["judge_grpo"] / "difficulty.json").read_text())
    }
    assert seen and seen <= train
    answered = json.loads((by_name["judge_answers"] / "answers.json").read_text())
    assert {row["query_id"] for row in answered} <= set(store.query_ids("test"))


# the runs after the first; each adds to the home, so their order matters and they are one test


def test_what_is_cached_and_what_is_made_again(chain: Chain) -> None:
    first = chain.results[0]

    second = chain.run()
    assert Counter(r.ref.name for r in second.reports) == STAGES
    assert [r.reason for r in second.reports if not r.cached] == []
    assert all(r.reason.startswith("cached: ") for r in second.reports)
    assert [r.ref for r in second.reports] == [r.ref for r in first.reports]
    assert [r["version"] for r in second.registered] == ["1", "1", "1"]
    assert second.release.action is None
    assert "nothing to do" in second.release.decision.summary

    changed = chain.run("judge.dpo.beta=0.3")
    made = [r for r in changed.reports if not r.cached]
    assert Counter(r.ref.name for r in made) == AFTER_DPO
    (dpo,) = (r for r in made if r.ref.name == "judge_dpo")
    assert "beta" in dpo.reason and "0.3" in dpo.reason and "0.1" in dpo.reason
    assert "learning" not in dpo.reason and "sft_weight" not in dpo.reason
    (grpo,) = (r for r in made if r.ref.name == "judge_grpo")
    assert "judge" in grpo.reason and "beta" not in grpo.reason
    assert [r["version"] for r in changed.registered] == ["2", "2", "2"]
    assert all(r["alias"] == "candidate" for r in changed.registered)
    assert changed.release.action is None
    compared = {r.name: r for r in changed.release.decision.reasons}
    with at_home(chain.home):
        store = ArtifactStore(settings().model_copy(update={"experiment": "synthetic-smoke"}))
        (evaluated,) = (r.ref for r in made if r.ref.name == "evaluate_judge")
        metrics = store.client.get_run(evaluated.run_id).data.metrics
        outcomes = Outcomes.read(store.path(evaluated))
    assert metrics["judge/n"] == len(outcomes.values) == 40, "of all pairs, not of one segment"
    assert metrics["judge/accuracy"] == pytest.approx(np.mean(list(outcomes.values.values())))
    assert compared["judge: queries"].candidate == len(set(outcomes.queries.values())) <= 40
    assert compared["judge: same evaluation set"].passed
    assert compared["retrieval: same evaluation set"].passed
    assert compared["parts belong together"].passed and compared["nothing withdrawn"].passed

    with at_home(chain.home):
        champion = registry.champion("synthetic-smoke-judge")
    assert champion is not None and champion.version == "1"
    assert champion.ref.fingerprint == first.judge.judge.fingerprint

    lost = next(r.ref for r in first.reports if r.ref.name == "judge_cot_sft")
    folder = chain.artifacts.path(lost)
    (folder / "model.safetensors").unlink()
    repaired = chain.run()
    made_names = [r.ref.name for r in repaired.reports if not r.cached]
    assert made_names == ["judge_cot_sft"]
    (report,) = (r for r in repaired.reports if not r.cached)
    assert "model.safetensors" in report.reason or "missing" in report.reason
    assert (chain.artifacts.path(report.ref) / "model.safetensors").is_file()

    shutil.rmtree(chain.artifacts.path(report.ref))
    again = chain.run()
    assert [r.ref.name for r in again.reports if not r.cached] == ["judge_cot_sft"]
