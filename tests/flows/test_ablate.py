"""The judge's ablation: rows are what they claim, and share their stages with ordinary runs."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from flows import ablate
from flows.ablate import JudgeRow, ablate_judge, chosen_rows, judge_rows, seeded
from flows.recipes import PipelineConfig, recipe
from models.errors import ConfigError
from tests.flows.conftest import Chain, at_home, small_config

KEYS = (
    "majority zero-shot cross-encoder told label-only think-first respond-first probe dpo grpo "
    "sampling rrs agr"
).split()


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """{dotted path: leaf} of nested dicts."""
    if not isinstance(value, dict):
        return {at: value}
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out |= flat(inner, f"{at}.{key}" if at else key)
    return out


def changed(before: PipelineConfig, after: PipelineConfig) -> set[str]:
    """Paths that differ, those below an optional part by the part's name."""
    old, new = flat(before.model_dump()), flat(after.model_dump())
    differ = {k for k in old.keys() | new.keys() if old.get(k, "?") != new.get(k, "?")}
    optional = ("judge.probe", "judge.grpo.replay")
    return {next((o for o in optional if k.startswith(o)), k) for k in differ}


ADDED = {
    ("cross-encoder", "told"): {"ablation.cross_encoder.evidence"},
    ("label-only", "think-first"): {"judge.prompt.order"},
    ("think-first", "respond-first"): {"judge.prompt.order"},
    ("respond-first", "probe"): {"judge.probe"},
    ("probe", "dpo"): set(),
    ("grpo", "sampling"): {
        "judge.grpo.max_refills",
        "judge.grpo.gamma",
        "judge.grpo.pool.max_confidence",
        "judge.grpo.pool.balanced",
    },
    ("sampling", "rrs"): {"judge.grpo.reward.shaped"},
    ("rrs", "agr"): {"judge.grpo.replay"},
}
"""What may differ between neighbours; between dpo and grpo it is GRPO's own settings."""


@pytest.mark.parametrize("name", ["smoke", "small"])
def test_each_row_differs_from_the_one_before_in_the_named_thing(name: str) -> None:
    config = recipe(name, "synthetic", ["judge.grpo.gamma=4"])
    rows = {row.key: row for row in judge_rows(config)}
    assert list(rows) == KEYS
    for (before, after), paths in ADDED.items():
        found = changed(rows[before].config(config), rows[after].config(config))
        assert found == paths, (before, after)
    plain = changed(rows["dpo"].config(config), rows["grpo"].config(config))
    assert all(path.startswith("judge.grpo.") for path in plain)
    made = [(row.key, row.made) for row in rows.values()]
    assert made[4:] == [
        *((key, "sft") for key in KEYS[4:7]),
        ("probe", "probed"),
        ("dpo", "dpo"),
        *((key, "grpo") for key in KEYS[9:]),
    ]


def test_plain_grpo_has_none_of_what_the_later_rows_add() -> None:
    config = recipe("smoke", "synthetic")
    (row,) = chosen_rows(config, ["grpo"])
    grpo = row.config(config).judge.grpo
    assert (grpo.max_refills, grpo.gamma, grpo.pool.max_confidence) == (0, None, None)
    assert not grpo.pool.balanced
    assert (grpo.reward.shaped, grpo.replay, grpo.spread_kept) == (False, None, False)


def test_the_runs_own_judge_is_one_of_the_rows() -> None:
    """`smoke` replays and `small` does not: their last row and last but one are the run's."""
    for name, key in (("smoke", "agr"), ("small", "rrs")):
        config = recipe(name, "synthetic")
        rows = {row.key: row for row in judge_rows(config)}
        assert rows[key].config(config) == config
        assert rows["dpo"].config(config).judge.sft == config.judge.sft
        assert seeded(config, 0) == config


def test_a_seed_reaches_every_training_stage_and_nothing_else() -> None:
    config = recipe("small", "synthetic")
    paths = changed(config, seeded(config, 5))
    assert paths == {
        "judge.sft.optimiser.seed",
        "judge.pass_at_n.seed",
        "judge.dpo.optimiser.seed",
        "judge.grpo.optimiser.seed",
        "ablation.cross_encoder.seed",
    }


def test_rows_are_chosen_by_name_in_the_tables_order() -> None:
    config = recipe("smoke", "synthetic")
    assert [r.key for r in chosen_rows(config, ["dpo", "majority"])] == ["majority", "dpo"]
    assert len(chosen_rows(config, None)) == len(KEYS)
    bare = recipe("smoke", "synthetic", ["judge.probe=null"])
    assert "probe" not in [r.key for r in chosen_rows(bare, None)]
    assert [r.key for r in judge_rows(recipe("full", "synthetic"))] == [
        key for key in KEYS if key not in ("told", "probe")
    ], "no evidence to tell, no probe"
    for wrong in (["dqo"], ["majority"], []):
        with pytest.raises(ConfigError, match="some of majority, zero-shot"):
            chosen_rows(config, wrong)
    assert all(isinstance(row, JudgeRow) and row.adds for row in judge_rows(config))


def test_the_table_shares_its_stages_with_the_run(chain: Chain) -> None:
    changes = ("ablation.samples.prompts=3", "ablation.samples.max_new_tokens=4")
    config = small_config(*changes, "ablation.cross_encoder.max_steps=2", "ablation.bootstrap=100")
    with at_home(chain.home):
        result = ablate_judge(config, seeds=(0,), rows=("majority", "cross-encoder", "probe"))
    of_run = {r.ref.fingerprint for r in chain.results[0].reports}
    made = {r.ref.name for r in result.reports if not r.cached}
    new = {"judge_cross_encoder", "cross_encoder_answers", "judge_samples", "judge_ablation"}
    assert made == new
    shared = {r.ref.name for r in result.reports if r.ref.fingerprint in of_run}
    assert shared >= {"judge_teacher", "judge_cot_sft", "judge_probe", "judge_answers"}
    names = [r.ref.fingerprint for r in result.reports]
    assert len(names) == len(set(names)), "a stage is called once"
    judges = list(dict.fromkeys(r["judge"] for r in result.records))
    assert judges == ["majority", "cross-encoder", "+ grade probe"]
    metrics = {(r["judge"], r["metric"]) for r in result.records}
    assert {("+ grade probe", f"pass@{k}") for k in range(1, 6)} <= metrics
    assert ("cross-encoder", "spearman") in metrics and ("majority", "spearman") not in metrics
    folder = chain.artifacts.path(result.table)
    assert json.loads((folder / "ablation.json").read_text()) == result.records
    with (folder / "ablation.csv").open(encoding="utf-8") as handle:
        assert len(list(csv.DictReader(handle))) == len(result.records)
    assert (folder / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "| cross-encoder |" in (folder / "ablation.md").read_text(encoding="utf-8")
    kept = {f.path for f in chain.artifacts.client.list_artifacts(result.table.run_id, "figures")}
    assert kept == {"figures/judge-ablation.png"}


def test_think_first_has_steps_everywhere_whatever_the_run_has() -> None:
    config = recipe("smoke", "synthetic", ["judge.sft.cot_share=0.5"])
    rows = {row.key: row.config(config) for row in chosen_rows(config, None)}
    assert rows["think-first"].judge.sft.cot_share == 1
    assert {c.judge.sft.cot_share for key, c in rows.items() if key != "think-first"} == {0.5}


def test_a_row_that_cannot_be_is_refused_before_any_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = JudgeRow("b", "b", "sft", "nothing", ("judge.sft.cot_share=2",))
    monkeypatch.setattr(ablate, "judge_rows", lambda _: (JudgeRow("a", "a", "sft", "a"), broken))
    with pytest.raises(ConfigError, match="cot_share"):
        chosen_rows(recipe("smoke", "synthetic"), None)


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_wrong_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="fix --seeds"):
        ablate_judge.fn(recipe("smoke", "synthetic"), seeds)
