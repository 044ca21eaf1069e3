"""The judge's ablation: what each part of the method adds, one row a part [TaoSR1, TaoSR-AGRL].

A row is the run's own configuration with a few settings changed, so that rows share their stages
with each other and with ordinary runs: `relearn run --set ...` with a row's settings makes the very
judge of that row. From `respond-first` on, each row adds one thing to the row above it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefect import flow

from flows.data import prepare_data
from flows.judge import JudgeStages
from flows.recipes import PipelineConfig, with_settings
from models.errors import ConfigError, explain
from models.judge.config import CrossEncoderConfig
from tasks.ablation import (
    RECORDS,
    TableConfig,
    TableRow,
    cross_encoder_answers,
    judge_ablation,
    judge_cross_encoder,
    judge_samples,
)
from tasks.artifacts import ArtifactRef
from tasks.evaluate import read_table
from tasks.stage import StageReport, current_settings, pipeline

Made = Literal["majority", "base", "cross_encoder", "sft", "probed", "dpo", "grpo"]


@dataclass(frozen=True)
class JudgeRow:
    """One row: the stage that makes its judge, and the settings that differ from the run's.

    adds: what it has that the row above has not.
    """

    key: str
    title: str
    made: Made
    adds: str
    settings: tuple[str, ...] = ()

    def config(self, config: PipelineConfig) -> PipelineConfig:
        """`config` as this row has it."""
        return with_settings(config, self.settings)


_NO_PROBE = "judge.probe=null"
_EVERY_STEP = "judge.sft.cot_share=1"  # think-first knows no response without steps
_RESPOND = "judge.prompt.order=respond_then_think"
_NO_REPLAY = "judge.grpo.replay=null"
_OUTCOME = "judge.grpo.reward.shaped=false"
_UNSAMPLED = (
    "judge.grpo.max_refills=0",
    "judge.grpo.gamma=null",
    "judge.grpo.pool.max_confidence=null",
    "judge.grpo.pool.balanced=false",
)


def judge_rows(config: PipelineConfig) -> tuple[JudgeRow, ...]:
    """Every row that `config` has, in the table's order.

    `probe` is left out where the run fits no probe, `told` where its judge has no evidence. AGR's
    settings are the run's, or the defaults where it replays nothing.
    """
    replay = () if config.judge.grpo.replay else ("judge.grpo.replay={}",)
    shaped = (_RESPOND, "judge.grpo.reward.shaped=true")
    rows = [
        JudgeRow("majority", "majority", "majority", "the most frequent training grade"),
        JudgeRow("zero-shot", "zero-shot", "base", "the base model, untrained", (_RESPOND,)),
        JudgeRow(
            "cross-encoder",
            "cross-encoder",
            "cross_encoder",
            "a fine-tuned encoder that reads query and item",
            (_RESPOND, "ablation.cross_encoder.evidence=false"),
        ),
        JudgeRow(
            "told",
            "cross-encoder + evidence",
            "cross_encoder",
            "the same, told the judge's evidence and estimate",
            (_RESPOND, "ablation.cross_encoder.evidence=true"),
        ),
        JudgeRow(
            "label-only",
            "label-only SFT",
            "sft",
            "the base model trained on grades alone",
            ("judge.prompt.order=label_only", _NO_PROBE),
        ),
        JudgeRow(
            "think-first",
            "think-then-respond SFT",
            "sft",
            "reasoning, before the grade",
            ("judge.prompt.order=think_then_respond", _EVERY_STEP, _NO_PROBE),
        ),
        JudgeRow(
            "respond-first",
            "respond-then-think SFT",
            "sft",
            "the same reasoning after the grade (post-CoT)",
            (_RESPOND, _NO_PROBE),
        ),
        JudgeRow("probe", "+ grade probe", "probed", "grade rows fitted after SFT", (_RESPOND,)),
        JudgeRow("dpo", "+ DPO", "dpo", "DPO on the judge's own mistakes", (_RESPOND,)),
        JudgeRow(
            "grpo",
            "+ GRPO",
            "grpo",
            "GRPO on a random pool, reward 1 for the gold grade, no refills",
            (_RESPOND, _NO_REPLAY, _OUTCOME, *_UNSAMPLED),
        ),
        JudgeRow(
            "sampling",
            "+ dynamic sampling",
            "grpo",
            "a class-balanced pool of unsure pairs; groups of the wrong difficulty are replaced",
            (_RESPOND, _NO_REPLAY, _OUTCOME),
        ),
        JudgeRow(
            "rrs",
            "+ rule-aware rewards",
            "grpo",
            "rewards for right steps, and the rule table's gate; they rank all-wrong groups too",
            (*shaped, _NO_REPLAY),
        ),
        JudgeRow(
            "agr",
            "+ guided replay",
            "grpo",
            "stuck prompts replayed with the gold verdicts as a hint",
            (*shaped, *replay),
        ),
    ]
    missing = {"probe": config.judge.probe is None, "told": not config.judge.prompt.evidence}
    return tuple(row for row in rows if not missing.get(row.key, False))


def chosen_rows(config: PipelineConfig, keys: Sequence[str] | None) -> tuple[JudgeRow, ...]:
    """The rows named by `keys`, in the table's order; all for None.

    Raises:
        ConfigError: an unknown key, no judge but the majority, or a row that cannot be.
    """
    rows = judge_rows(config)
    known = [row.key for row in rows]
    unknown = [key for key in keys or () if key not in known]
    chosen = tuple(row for row in rows if keys is None or row.key in keys)
    if unknown or not any(row.made != "majority" for row in chosen):
        got = f"rows {', '.join(unknown or keys or ['none'])}"
        raise ConfigError(explain(got, f"some of {', '.join(known)}", "fix --rows"))
    for row in chosen:
        row.config(config)
    return chosen


def seeded(config: PipelineConfig, seed: int) -> PipelineConfig:
    """`config` with `seed` in every training stage; data, split and test pairs stay."""
    names = (
        "judge.sft.optimiser.seed",
        "judge.pass_at_n.seed",
        "judge.dpo.optimiser.seed",
        "judge.grpo.optimiser.seed",
        "ablation.cross_encoder.seed",
    )
    return with_settings(config, [f"{name}={seed}" for name in names])


@dataclass(frozen=True)
class AblationResult:
    """The table's artifact, its records, and what every stage did."""

    table: ArtifactRef
    records: list[dict[str, Any]]
    reports: list[StageReport]
    run_id: str


@flow(name="ablate-judge", flow_run_name="ablate-judge {config.name}", log_prints=False)
def ablate_judge(
    config: PipelineConfig, seeds: tuple[int, ...] = (0, 1, 2), rows: tuple[str, ...] | None = None
) -> AblationResult:
    """Train and measure every row with every seed, on the same held-out pairs.

    Nothing is registered or promoted. Finished stages are kept: interrupt it and go on later.

    Raises:
        ConfigError: no seed, one twice, or rows there are not.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(explain(f"seeds {seeds}", "one or more, each once", "fix --seeds"))
    chosen = chosen_rows(config, rows)
    with pipeline(f"ablate judge {config.name}", experiment=config.name) as current:
        store = prepare_data(config.data)
        table = _table(config, store, chosen, seeds)
        records = read_table(_folder(table), RECORDS)
    return AblationResult(table, records, current.reports, current.run_id)


def _table(
    config: PipelineConfig, store: ArtifactRef, rows: Sequence[JudgeRow], seeds: Sequence[int]
) -> ArtifactRef:
    made: dict[str, ArtifactRef] = {}
    answers: dict[str, ArtifactRef] = {}
    samples: dict[str, ArtifactRef] = {}
    shown: list[TableRow] = []
    for row in rows:
        if row.made == "majority":
            continue
        of_row = seeds[:1] if row.made == "base" else seeds  # nothing of the base is drawn
        order = row.config(config).judge.prompt.order
        for seed in of_row:
            full, key = seeded(row.config(config), seed), f"{row.key}/{seed}"
            stages = JudgeStages(full.judge, store, made)
            if row.made == "cross_encoder":
                answers[key] = _cross_encoder_answers(full, stages)
                continue
            judge = _MAKE[row.made](stages)
            answers[key] = stages.answers(judge)
            samples[key] = stages.call(
                judge_samples,
                config=full.ablation.samples,
                answers=full.judge.answers,
                prompt=stages.prompt,
                judge=judge,
                store=store,
            )
        order = "label_only" if row.made == "cross_encoder" else order
        shown.append(TableRow(key=row.key, title=row.title, order=order, seeds=tuple(of_row)))
    what = ", ".join(map(str, seeds))
    return judge_ablation(
        config=TableConfig(
            rows=tuple(shown),
            majority=any(row.made == "majority" for row in rows),
            bootstrap=config.ablation.bootstrap,
            title=f"Judge ablation on {config.name}, seeds {what}",
        ),
        answers=answers,
        samples=samples,
        store=store,
    )


_MAKE: dict[str, Callable[[JudgeStages], ArtifactRef]] = {
    "base": lambda stages: stages.base,
    "sft": lambda stages: stages.sft,
    "probed": lambda stages: stages.probed,
    "dpo": lambda stages: stages.dpo,
    "grpo": lambda stages: stages.grpo,
}


def cross_encoder(config: CrossEncoderConfig, stages: JudgeStages) -> ArtifactRef:
    """The small encoder that grades pairs, trained on the judge's training pairs."""
    return stages.call(
        judge_cross_encoder,
        config=config,
        base=stages.base_of(config.base, "embedder"),
        prompt=stages.prompt,
        store=stages.store,
    )


def _cross_encoder_answers(config: PipelineConfig, stages: JudgeStages) -> ArtifactRef:
    settings = config.ablation.cross_encoder
    return stages.call(
        cross_encoder_answers,
        config=config.judge.answers,
        max_tokens=settings.max_tokens,
        cross_encoder=cross_encoder(settings, stages),
        store=stages.store,
    )


def _folder(ref: ArtifactRef) -> Any:
    from tasks.artifacts import ArtifactStore

    return ArtifactStore(current_settings()).path(ref)
