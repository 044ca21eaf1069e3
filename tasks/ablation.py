"""Stages that only the judge's ablation needs: the cross-encoder, sampled answers, the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.judge.config import CrossEncoderConfig, SamplesConfig
from models.teacher.response import Order
from tasks.artifacts import ArtifactRef
from tasks.base import weights_path
from tasks.evaluate import read_table
from tasks.ingest import open_store
from tasks.judge import AnswersConfig, answer_rows, sample_pairs
from tasks.stage import StageContext, stage

RECORDS = "ablation.json"
MARKDOWN = "ablation.md"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class JudgeAblationConfig(_Config):
    """What `relearn ablate judge` needs beyond an ordinary run's settings."""

    cross_encoder: CrossEncoderConfig = CrossEncoderConfig()
    samples: SamplesConfig = SamplesConfig()
    bootstrap: int = Field(1000, ge=100)
    """Resamples of the held-out queries behind each interval."""


class TableRow(_Config):
    """One row of the table: its name, format and seeds; its answers are "<key>/<seed>"."""

    key: str
    title: str
    order: Order
    seeds: tuple[int, ...]


class TableConfig(_Config):
    """The ablation table."""

    rows: tuple[TableRow, ...]
    majority: bool = True
    """Whether a judge that always says the most frequent training grade comes first."""
    bootstrap: int = Field(1000, ge=100)
    title: str


@stage(name="judge_cross_encoder", kind="judge", code_version="2")
def judge_cross_encoder(
    ctx: StageContext,
    config: CrossEncoderConfig,
    base: ArtifactRef,
    prompt: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """A small encoder fine-tuned to grade pairs: the BERT row [TaoSR1 s4]."""
    from models.judge.cross_encoder import train_cross_encoder
    from models.judge.spec import JudgeSpec

    return train_cross_encoder(
        weights_path(ctx, base),
        JudgeSpec.read(ctx.open(prompt)),
        open_store(ctx, store).pairs("train"),
        config,
        ctx.out,
        ctx.scratch,
        ctx.sink,
        ctx.settings.torch_device,
    )


@stage(name="cross_encoder_answers", kind="judge", code_version="1")
def cross_encoder_answers(
    ctx: StageContext,
    config: AnswersConfig,
    max_tokens: int,
    cross_encoder: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """The cross-encoder's probabilities on the same test pairs that the judges answer."""
    from models.judge.cross_encoder import CrossEncoder

    pairs = sample_pairs(open_store(ctx, store).pairs("test"), config.max_pairs, config.seed)
    model = CrossEncoder(ctx.open(cross_encoder), ctx.settings.torch_device, max_tokens)
    return answer_rows(ctx, pairs, model.score([(p.query, p.product) for p in pairs], "test pairs"))


@stage(name="judge_samples", kind="judge", code_version="3")
def judge_samples(
    ctx: StageContext,
    config: SamplesConfig,
    answers: AnswersConfig,
    prompt: ArtifactRef,
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """Responses drawn for the first of the test pairs: how many state the gold grade.

    answers: chooses the test pairs, so that they are those which are scored.
    """
    from models.judge.config import PassAtNConfig
    from models.judge.preferences import sample_responses
    from models.judge.scoring import ScoringJudge
    from models.judge.spec import JudgeSpec

    pairs = sample_pairs(open_store(ctx, store).pairs("test"), answers.max_pairs, answers.seed)
    pairs = pairs[: config.prompts]
    spec = JudgeSpec.read(ctx.open(prompt))
    model = ScoringJudge.open(weights_path(ctx, judge), spec, ctx.settings.torch_device)
    drawing = PassAtNConfig(
        samples=config.samples,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    groups = sample_responses(model, pairs, drawing, "pass@k")
    rows = [
        {
            "query_id": p.query.query_id,
            "product_id": p.product.product_id,
            "n": len(group),
            "correct": sum(s.grade == p.grade for s in group),
        }
        for p, group in zip(pairs, groups, strict=True)
    ]
    (ctx.out / "samples.json").write_text(json.dumps(rows), encoding="utf-8")
    return {
        "prompts": len(rows),
        "right_share": sum(r["correct"] / r["n"] for r in rows) / len(rows),
    }


@stage(name="judge_ablation", kind="evaluation", code_version="6")
def judge_ablation(
    ctx: StageContext,
    config: TableConfig,
    answers: dict[str, ArtifactRef],
    samples: dict[str, ArtifactRef],
    store: ArtifactRef,
) -> Mapping[str, float]:
    """The table: every judge on the same pairs, means over seeds, intervals over queries.

    Writes ablation.json and .csv (one record a judge and metric), ablation.md and ablation.png.
    """
    import pandas as pd

    from models.evaluation.ablation import Answered, Row, ablation_rows, majority_row
    from models.evaluation.ablation_report import figure, markdown
    from models.evaluation.judge import majority_grade

    def read(refs: Mapping[str, ArtifactRef], key: str, file: str) -> Any:
        return read_table(ctx.open(refs[key]), file) if key in refs else []

    rows = []
    for row in config.rows:
        keys = [f"{row.key}/{seed}" for seed in row.seeds]
        given = [
            Answered(read(answers, k, "answers.json"), read(samples, k, "samples.json"))
            for k in keys
        ]
        rows.append(Row(row.title, row.order, given))
    if config.majority:
        train = open_store(ctx, store).pairs("train")
        first = majority_row(rows[0].seeds[0].answers, majority_grade([p.grade for p in train]))
        rows.insert(0, first)
    records = ablation_rows(rows, config.bootstrap)
    (ctx.out / RECORDS).write_text(json.dumps(records, indent=1), encoding="utf-8")
    pd.DataFrame(records).to_csv(ctx.out / "ablation.csv", index=False)
    text = markdown(records, config.title)
    (ctx.out / MARKDOWN).write_text(text, encoding="utf-8")
    plot = figure(records, config.title)
    plot.savefig(ctx.out / "ablation.png", dpi=150)
    ctx.table("judge-ablation", records)
    ctx.markdown("judge-ablation", text)
    ctx.figure("judge-ablation", plot)
    key_of = {row.title: row.key for row in config.rows}
    return {f"{key_of.get(r['judge'], r['judge'])}/{r['metric']}": r["mean"] for r in records}
