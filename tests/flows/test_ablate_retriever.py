"""The retriever's ablation: rows differ in what they claim, and the flow shares an ordinary run."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from flows import ablate_retriever as flow
from flows.ablate_retriever import (
    HELD_OUT,
    TITLES,
    RowPlan,
    Unseen,
    ablate_retriever,
    ablation_table,
    row_plan,
)
from flows.recipes import DataConfig, with_settings
from models.errors import ConfigError
from models.evaluation import retriever_rows
from models.evaluation.retrieval import read_trec_run
from models.evaluation.retriever_report import markdown
from models.evaluation.retriever_rows import interval, over_seeds, table_rows
from models.sources import SyntheticSource, TablesSource, load
from models.sources.synthetic import Oracle
from models.text import normalise
from tasks.artifacts import ArtifactRef
from tasks.retriever_ablation import PLOT, REPORT, RUN, TABLE
from tasks.settings import settings
from tasks.stage import Stage
from tests.flows.conftest import Chain, at_home, small_config

EMBEDDER = small_config().embedder
QUIET = with_settings(small_config(), ["embedder.evaluation.judged_queries=0"])
"""Rows of its own: the tests that count what is made share one home."""


def flat(body: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted path."""
    if not isinstance(body, dict):
        return {prefix: body}
    return {
        k: v for key, x in body.items() for k, v in flat(x, f"{prefix}.{key}".strip(".")).items()
    }


def changed(one: RowPlan, other: RowPlan) -> set[str]:
    """Dotted settings in which two plans differ; a part only one has is named as a whole."""
    a, b = one.model_dump(), other.model_dump()
    whole = {name for name in a if (a[name] is None) != (b[name] is None)}
    shared = [flat({k: v for k, v in x.items() if k not in whole}) for x in (a, b)]
    return whole | {k for k in shared[0] if shared[0][k] != shared[1][k]}


def plan(name: str, seed: int = 0) -> RowPlan:
    return row_plan(name, EMBEDDER, seed)


@pytest.mark.parametrize(
    ("name", "other", "differs"),
    [
        ("sft", "base", {"sft"}),
        ("sft_longer", "sft", {"sft.steps"}),
        ("rgrpo", "sft", {"rgrpo", "rewards", "judge"}),
        ("rgrpo_no_sft", "rgrpo", {"sft", "rgrpo.sft_weight"}),
        ("rgrpo_no_anchor", "rgrpo", {"rgrpo.sft_weight"}),
        ("rgrpo_relevance", "rgrpo", {"rewards.quality", "rewards.exclusivity"}),
        ("rgrpo_relevance_quality", "rgrpo", {"rewards.exclusivity"}),
        ("rgrpo_weak_judge", "rgrpo", {"judge"}),
        ("rgrpo_cross_encoder", "rgrpo", {"judge"}),
        ("ranking", "sft", {"mining", "hard", "judge"}),
        ("dpo", "ranking", {"hard.loss"}),
        ("bm25", "random", {"channel"}),
    ],
)
def test_rows_differ_in_exactly_what_they_claim(name: str, other: str, differs: set[str]) -> None:
    assert changed(plan(name), plan(other)) == differs


def test_a_seed_changes_every_seed_and_nothing_else() -> None:
    for name in TITLES:
        differs = changed(plan(name, 0), plan(name, 1))
        stages = ("sft", "mining", "hard", "rgrpo")
        own = {f"{stage}.seed" for stage in stages if getattr(plan(name), stage) is not None}
        assert differs == own, name


def test_the_rows_of_the_recipe_are_those_of_an_ordinary_run() -> None:
    own = plan("rgrpo")
    assert (own.sft, own.rgrpo, own.rewards) == (EMBEDDER.sft, EMBEDDER.rgrpo, EMBEDDER.rewards)


def test_longer_sft_trains_as_many_steps_as_sft_and_its_rival() -> None:
    longer, rival = plan("sft_longer").sft, plan("rgrpo")
    assert longer is not None and rival.sft is not None and rival.rgrpo is not None
    assert longer.steps == (rival.sft.steps or 0) + rival.rgrpo.steps
    whole = EMBEDDER.model_copy(
        update={"sft": EMBEDDER.sft.model_copy(update={"steps": None, "epochs": 2})}
    )
    unbounded = row_plan("sft_longer", whole, 0).sft
    assert unbounded is not None and whole.rgrpo.steps > 0
    asked = unbounded.steps, unbounded.epochs, unbounded.extra_steps
    assert asked == (None, 2, whole.rgrpo.steps), "an epoch has as many steps as there are pairs"


def test_later_stages_take_the_positives_of_sft() -> None:
    sft = EMBEDDER.sft.model_copy(update={"interactions": False, "max_pairs": 7})
    config = EMBEDDER.model_copy(update={"sft": sft})
    rgrpo, ranking = row_plan("rgrpo", config, 0), row_plan("ranking", config, 0)
    assert rgrpo.rgrpo is not None and ranking.mining is not None and ranking.hard is not None
    assert (rgrpo.rgrpo.interactions, rgrpo.rgrpo.anchor_pairs) == (False, 7)
    assert not ranking.mining.interactions and not ranking.hard.interactions
    assert rgrpo.rgrpo.dim is ranking.hard.dim is None
    short = config.model_copy(update={"index": config.index.model_copy(update={"dim": 8})})
    served = row_plan("rgrpo", short, 0).rgrpo, row_plan("dpo", short, 0).hard
    assert [stage.dim for stage in served if stage is not None] == [8, 8]
    left_out = {"interactions", "anchor_pairs", "dim", "extra_steps"}
    for kept in (EMBEDDER.sft, EMBEDDER.rgrpo, EMBEDDER.mining, EMBEDDER.hard):
        assert not (left_out - {"interactions"}) & kept.model_dump().keys(), "identities stay"
        assert kept is EMBEDDER.sft or "interactions" not in kept.model_dump()
    dumped = rgrpo.rgrpo.model_dump()
    assert (dumped["interactions"], dumped["anchor_pairs"]) == (False, 7)


def test_means_over_seeds_and_pooled_metrics_as_arithmetic() -> None:
    one = {"hitrate@10": {"q": (1.0, 4.0), "r": (2.0, 2.0)}, "ndcg@10": {"q": (0.5, 1.0)}}
    two = {"hitrate@10": {"q": (3.0, 4.0), "r": (2.0, 2.0)}, "ndcg@10": {"q": (0.7, 1.0)}}
    both = over_seeds([one, two])
    assert both["hitrate@10"]["q"] == (2.0, 4.0)
    mean, low, high = interval(list(both["hitrate@10"].values()))
    assert mean == (2 + 2) / (4 + 2)
    assert low == 2 / 4 and high == 2 / 2, "both draws the same query"
    rows = table_rows({"a": [one, two], "b": [one]}, {"q": "general", "r": "negation"}, "b")
    overall = {r["run"]: r for r in rows if r["segment"] == "all"}
    assert overall["a"]["ndcg@10"] == pytest.approx(0.6)
    assert overall["a"]["ndcg@10_sd"] == pytest.approx(0.2 / 2**0.5)
    assert overall["a"]["ndcg@10_diff"] == pytest.approx(0.1)
    assert "ndcg@10_diff" not in overall["b"] and "ndcg@10_sd" not in overall["b"]
    assert [r["segment"] for r in rows if r["run"] == "a"] == ["all", "general", "negation"]
    for row in rows:  # no query of negation has an nDCG: that is no difference of 0
        compared = row["run"] == "a" and row["segment"] != "negation"
        assert ("ndcg@10_diff" in row, "ndcg@10_diff_p" in row) == (compared, compared)
    with pytest.raises(ValueError, match="hitrate@10 compared query by query"):
        table_rows({"a": [one], "b": [one]}, {"q": "general"}, "b", compared=["hitrate@10"])


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_an_interval_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    values_Q2 = np.random.default_rng(1).random((7, 2)) + 0.1
    picks_SQ = np.random.default_rng(5).integers(0, 7, (300, 7))
    sums_S2 = values_Q2[picks_SQ].sum(1)
    low, high = np.percentile(sums_S2[:, 0] / sums_S2[:, 1], [2.5, 97.5])
    monkeypatch.setattr(retriever_rows, "PICKS_AT_ONCE", at_once)
    got = interval([(a, b) for a, b in values_Q2.tolist()], num_samples=300, seed=5)
    assert got[1:] == (low, high)


def test_an_interval_over_many_queries_takes_little_memory() -> None:
    tracemalloc.start()
    interval([(1.0, 1.0)] * 22_000, num_samples=200)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 40e6, "200 x 22,000 x (2 doubles and a number) are 106 MB"


@pytest.mark.parametrize(("rows", "seeds"), [(["sft", "bert"], [0]), ([], [0]), (["sft"], [1, 1])])
def test_wrong_rows_and_seeds_are_one_clear_error(rows: list[str], seeds: list[int]) -> None:
    with pytest.raises(ConfigError, match="rgrpo_no_sft"):
        ablate_retriever.fn(small_config(), seeds, rows)


def named(name: str, digit: str) -> ArtifactRef:
    return ArtifactRef(kind="data", name=name, version=digit, uri="", fingerprint=digit * 64)


def test_every_row_is_made_of_its_own_stages_and_shares_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows, two seeds, no stage run: what is counted are distinct identities."""
    called: set[tuple[str, str]] = set()

    def identify(stage: Stage, **inputs: Any) -> ArtifactRef:
        fingerprint = stage.identity(**inputs).fingerprint
        called.add((stage.name, fingerprint))
        return ArtifactRef(
            kind=stage.kind, name=stage.name, version="v", uri="", fingerprint=fingerprint
        )

    @contextmanager
    def no_run(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        yield SimpleNamespace(reports=[], run_id="r")

    monkeypatch.setattr(Stage, "__call__", identify)
    monkeypatch.setattr(flow, "pipeline", no_run)
    monkeypatch.setattr(flow, "prepare_data", lambda config: named("validate", "0"))
    ablate_retriever.fn(small_config(), [0, 1], list(TITLES))
    rgrpo = 2 * 7
    counts = Counter(name for name, _ in called)
    assert counts == {
        "base_model": 2,  # the judge's, and the encoder's, with which a cross-encoder begins too
        "judge_prompt": 1,
        "judge_teacher": 2,
        "judge_cot_sft": 1,
        "judge_probe": 1,
        "judge_pass_at_n": 1,
        "judge_dpo": 1,
        "judge_grpo": 1,
        "judge_cross_encoder": 1,
        "judge": 2,  # the finished one and the weaker; neither is evaluated here
        "embedder_sft": 2 * 2,
        "embedder_negatives": 2,
        "embedder_hard": 2 * 2,
        "embedder_rgrpo": rgrpo,
        "index": 1 + 2 * 2 + 2 * 2 + rgrpo,
        "retriever_row": 2 + 1 + 1 + 2 * 2 + 2 * 2 + rgrpo,
        "retriever_ablation": 1,
    }
    called.clear()
    other = SyntheticSource(num_products=200, num_queries=30, seed=4)
    monkeypatch.setattr(
        flow, "prepare_data", lambda config: named("validate", str(int(config.split == HELD_OUT)))
    )
    unseen = Unseen(data=small_config().data.model_copy(update={"source": other}))
    ablate_retriever.fn(small_config(), [0, 1], list(TITLES), unseen=unseen)
    twice = {name: 2 * counts[name] for name in ("index", "retriever_row", "retriever_ablation")}
    # mining reads an index of the store that was trained on
    assert Counter(name for name, _ in called) == counts | twice


def test_an_unseen_store_is_measured_on_all_its_queries_and_trains_nothing(chain: Chain) -> None:
    other = SyntheticSource(num_products=200, num_queries=30, seed=4)
    unseen = Unseen(data=small_config().data.model_copy(update={"source": other}))
    with at_home(chain.home):
        result = ablate_retriever(QUIET, [0], ["bm25", "base", "rgrpo"], "base", unseen)
        assert result.unseen is not None
        rows, text = flow.read_report(chain.artifacts.path(result.unseen))
    made = Counter(r.ref.name for r in result.reports if not r.cached)
    assert made["index"] == 2 and made["ingest"] == 1
    assert not {name for name in made if name.startswith(("embedder", "judge"))}
    overall = {r["run"]: r for r in rows if r["segment"] == "all"}
    assert list(overall) == [TITLES[name] for name in ("bm25", "base", "rgrpo")]
    assert flow.UNSEEN_NOTE in text
    oracle, runs = Oracle(other), []
    texts = {normalise(q.text) for q in load(other, None).store.query_by_id.values()}
    for row in overall.values():
        assert 26 <= row["n"] <= 29 < 2 + len(texts), "all but the two that a split must have"
        assert "goodrate@10" not in row, "the judge was validated elsewhere"
    for report in result.reports:
        if report.ref.name == "retriever_row":
            run = read_trec_run(chain.artifacts.path(report.ref) / RUN)
            if len(run) == overall["BM25"]["n"]:  # BM25 finds nothing for some
                good = [oracle.grade(q, p)[0] >= 3 for q, row in run.items() for p in row[:10]]
                runs.append(sum(good) / 10 / len(run))
    rates = [overall[TITLES[name]]["true_goodrate@10"] for name in ("base", "rgrpo")]
    assert sorted(runs) == pytest.approx(sorted(rates))


def test_the_files_of_an_unseen_store_are_read_where_they_are(chain: Chain, tmp_path: Path) -> None:
    """In the middle of a pipeline that reads another store's, and not after it."""
    other = load(SyntheticSource(num_products=200, num_queries=30, seed=4), None).store
    for name in ("products", "queries", "judgments"):
        pq.write_table(getattr(other, name), tmp_path / f"{name}.parquet")
    unseen = Unseen(data=DataConfig(source=TablesSource()), folder=str(tmp_path))
    with at_home(chain.home):
        result = ablate_retriever(QUIET, [0], ["bm25", "base"], "base", unseen)
        assert result.unseen is not None and settings().data_dir is None
        rows, _ = flow.read_report(chain.artifacts.path(result.unseen))
    assert [r["run"] for r in rows if r["segment"] == "all"] == ["BM25", "base"]
    assert 26 <= rows[0]["n"] <= 29 and "true_goodrate@10" not in rows[0]
    gone = Unseen(data=DataConfig(source=TablesSource()), folder=str(tmp_path / "gone"))
    with at_home(chain.home), pytest.raises(ConfigError, match="gone on this machine"):
        ablate_retriever(QUIET, [0], ["base"], "base", gone)


def test_rows_share_the_stages_of_an_ordinary_run(chain: Chain) -> None:
    with at_home(chain.home):
        result = ablate_retriever(
            small_config(), [0], ["rgrpo", "dpo", "sft", "rgrpo_cross_encoder"], "dpo"
        )
    made = Counter(r.ref.name for r in result.reports if not r.cached)
    assert made == {
        "retriever_row": 5,  # BM25 is measured for the overlap with it
        "embedder_negatives": 1,
        "embedder_hard": 1,
        "judge_cross_encoder": 1,
        "embedder_rgrpo": 1,
        "index": 2,
        "retriever_ablation": 1,
    }
    ordinary = {r.ref.fingerprint for r in chain.results[0].reports}
    shared = {r.ref.name for r in result.reports if r.ref.fingerprint in ordinary}
    assert {"judge", "embedder_sft", "embedder_rgrpo", "index"} <= shared
    folder = chain.artifacts.path(result.table)
    assert {TABLE, REPORT, PLOT} <= {p.name for p in folder.iterdir()}
    assert (folder / PLOT).read_bytes()[1:4] == b"PNG"
    with at_home(chain.home):
        from flows.ablate_retriever import read_report

        rows, text = read_report(folder)
    overall = {r["run"]: r for r in rows if r["segment"] == "all"}
    assert list(overall) == [
        TITLES[name] for name in ("sft", "dpo", "rgrpo", "rgrpo_cross_encoder")
    ]
    small = overall[TITLES["rgrpo_cross_encoder"]]
    assert small["judge_pairs"] > 0 and small["judge_tokens"] == 0
    for row in overall.values():
        for metric in ("hitrate@100", "recall@10", "ndcg@10", "mrr@10", "goodrate@10", "judged@10"):
            assert 0 <= row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"] <= 1
        assert row["lexical_overlap@10"] >= 0 and row["quality@10"] >= 0 and row["train_s"] > 0
    assert overall["SFT"]["judge_tokens"] == 0
    assert overall[TITLES["dpo"]]["judge_tokens"] > overall[TITLES["dpo"]]["judge_pairs"] > 0
    assert overall[TITLES["rgrpo"]]["judge_pairs"] > 0
    for metric in ("ndcg@10", "goodrate@10", "quality@10", "hybrid_ndcg@10", "lexical_overlap@10"):
        gap = overall[TITLES["rgrpo"]][metric] - overall[TITLES["dpo"]][metric]
        assert overall[TITLES["rgrpo"]][f"{metric}_diff"] == pytest.approx(gap, abs=1e-9)
    assert f"Points against {TITLES['dpo']}" in text
    assert "best of its looks" in text
    oracle = Oracle(small_config().data.source)  # type: ignore[arg-type]
    small_queries = overall["SFT"]["n"]
    known = set()
    for report in result.reports:
        if report.ref.name == "retriever_row":
            run = read_trec_run(chain.artifacts.path(report.ref) / RUN)
            good = [oracle.grade(q, p)[0] >= 3 for q, row in run.items() for p in row[:10]]
            known.add(round(sum(good) / 10 / small_queries, 9))
    assert {round(row["true_goodrate@10"], 9) for row in overall.values()} <= known
    assert len(known) > 1
    assert 0 < overall[TITLES["dpo"]]["mining_s"] < overall[TITLES["dpo"]]["train_s"]
    assert overall[TITLES["rgrpo"]]["mining_s"] == 0
    assert TITLES["dpo"] in text and "seeds of the retriever: 0" in text
    table = ablation_table(rows, "t")
    assert list(table.columns[0].cells) == ["sft", "dpo", "rgrpo", "rgrpo_cross_encoder"]
    widths = [Console(width=110).measure(table).maximum, table.row_count]
    assert widths[0] <= 110 and widths[1] == 4, "it fits a terminal"
    ordinary_rows = read_rows(chain)
    for name, title in (("SFT", TITLES["sft"]), ("SFT + R-GRPO", TITLES["rgrpo"])):
        for metric in ("recall@10", "ndcg@10", "hitrate@100", "goodrate@10", "quality@10"):
            assert overall[title][metric] == pytest.approx(ordinary_rows[name][metric]), metric


def read_rows(chain: Chain) -> dict[str, dict[str, Any]]:
    """The ordinary run's retrieval table, overall."""
    from tasks.evaluate import RETRIEVAL_TABLE, read_table

    folder = chain.artifacts.path(chain.results[0].retriever.evaluation)
    return {r["run"]: r for r in read_table(folder, RETRIEVAL_TABLE) if r["segment"] == "all"}


def test_the_report_compares_rows_in_each_segment_too() -> None:
    texts = {
        run: {"ndcg@10": {"q": (value, 1.0), "r": (0.5, 1.0)}}
        for run, value in (("SFT", 0.25), ("R-GRPO", 0.75))
    }
    rows = table_rows(
        {run: [parts] for run, parts in texts.items()},
        {"q": "long_tail", "r": "general"},
        "SFT",
    )
    text = markdown(rows, "SFT", ["a note"])
    assert "* a note" in text
    part = text[text.index("Segment long_tail, 1 queries") :].splitlines()
    assert part[2].endswith("| nDCG@10 against SFT |")
    assert part[4].endswith("|  |") and part[5].endswith("| +50.0 [+50.0, +50.0] |")
    other = text[text.index("Segment general") : text.index("Segment long_tail")]
    assert "+0.0 [+0.0, +0.0]" in other
