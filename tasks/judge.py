"""The judge's stages, CoT SFT -> probe -> pass@N -> DPO -> GRPO -> CumPT, and test answers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from models.errors import DataContractError, explain
from models.judge.config import (
    DpoConfig,
    DrawConfig,
    GrpoConfig,
    PassAtNConfig,
    ProbeConfig,
    PromptConfig,
    PromptDraw,
    SftConfig,
)
from models.teacher.config import Endpoint, TeacherConfig
from tasks.artifacts import ArtifactRef
from tasks.base import weights_path
from tasks.ingest import open_store
from tasks.settings import Settings
from tasks.stage import StageContext, stage

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


class CalibrationConfig(BaseModel):
    """CumPT threshold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pairs: int = Field(400, ge=1)
    """Validation pairs scored."""


class AnswersConfig(BaseModel):
    """What is asked of a judge on held-out pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_pairs: int = Field(400, ge=1)
    """Test pairs scored from one prefill."""
    reasoning_pairs: int = Field(64, ge=0)
    """Of those, pairs whose reasoning is decoded too (greedy)."""
    max_new_tokens: int = Field(64, ge=1)
    seed: int = 0


@stage(name="judge_prompt", kind="judge", code_version="11")
def judge_prompt(ctx: StageContext, prompt: PromptConfig, rules: str, store: ArtifactRef) -> None:
    """The prompt format, the training queries' kinds, the catalogue's word weights, and what words
    alone say of the grade.

    Every judge reads by it.

    rules: version of the rule base, so that an edited rule is a changed prompt.
    """
    from models.judge.spec import JudgeSpec

    tables = open_store(ctx, store)
    spec = JudgeSpec.fit(prompt, tables.pairs("train"), tables.product_by_id.values())
    spec.write(ctx.out)


@stage(name="judge_teacher", kind="data", code_version="7")
def judge_teacher(
    ctx: StageContext,
    config: TeacherConfig,
    draw: DrawConfig,
    rule_base: str,
    rules: str,
    store: ArtifactRef,
    prompts: PromptDraw | None = None,
) -> Mapping[str, float]:
    """The CoT data set: a teacher's response for every pair whose steps SFT learns [TaoSR1 s3.1],
    or for every prompt of pass@N, which DPO prefers where the judge has none [TaoSR1 s3.2].

    draw: the part of SFT's config that chooses the pairs. prompts: the part of pass@N's that
    chooses the prompts. rule_base: its name; rules: its version.
    """
    from models.judge.cot_sft import reasoned_pairs
    from models.judge.preferences import pass_at_n_prompts
    from models.rules.base import load_rules
    from models.teacher.dataset import write_responses

    pairs = open_store(ctx, store).pairs("train")
    asked = pass_at_n_prompts(pairs, draw, prompts) if prompts else reasoned_pairs(pairs, draw)
    return write_responses(
        asked,
        config,
        load_rules(rule_base),
        _endpoint(ctx.settings),
        ctx.out,
        ctx.scratch,
        ctx.progress,
    )


@stage(name="judge_cot_sft", kind="judge", code_version="5")
def judge_cot_sft(
    ctx: StageContext,
    config: SftConfig,
    base: ArtifactRef,
    prompt: ArtifactRef,
    teacher: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """CoT SFT on the teacher's responses [TaoSR1 s3.1]."""
    from models.judge.cot_sft import train_cot_sft
    from models.judge.spec import JudgeSpec
    from models.teacher.dataset import read_responses

    spec = JudgeSpec.read(ctx.open(prompt))
    return train_cot_sft(
        weights_path(ctx, base),
        spec,
        open_store(ctx, store).pairs("train"),
        config,
        ctx.out,
        ctx.scratch,
        ctx.sink,
        ctx.settings.torch_device,
        read_responses(ctx.open(teacher), spec.prompt.order),
    )


@stage(name="judge_probe", kind="judge", code_version="3")
def judge_probe(
    ctx: StageContext,
    config: ProbeConfig,
    trained_on: DrawConfig,
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """The judge with its grade rows fitted to its features, on pairs new to it first.

    trained_on: what SFT drew.
    """
    from models.judge.probe import train_probe
    from models.judge.spec import JudgeSpec

    folder = ctx.open(judge)
    return train_probe(
        str(folder),
        JudgeSpec.read(folder),
        open_store(ctx, store).pairs("train"),
        trained_on,
        config,
        ctx.out,
        ctx.settings.torch_device,
    )


@stage(name="judge_pass_at_n", kind="judge", code_version="8")
def judge_pass_at_n(
    ctx: StageContext,
    config: PassAtNConfig,
    trained_on: DrawConfig,
    judge: ArtifactRef,
    teacher: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """Sample N responses a training pair and build preference pairs [TaoSR1 s3.2].

    trained_on: what SFT drew. teacher: its responses to the same prompts.
    """
    from models.judge.preferences import make_preferences
    from models.teacher.dataset import read_responses

    model = _open_judge(ctx, judge)
    counts = make_preferences(
        model,
        open_store(ctx, store).pairs("train"),
        trained_on,
        config,
        ctx.out,
        read_responses(ctx.open(teacher), model.encoder.config.order),
    )
    ctx.table("pass-at-n", [dict(counts)])
    return counts


@stage(name="judge_dpo", kind="judge", code_version="3")
def judge_dpo(
    ctx: StageContext,
    config: DpoConfig,
    judge: ArtifactRef,
    preferences: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """DPO on the judge's own mistakes [TaoSR1 s3.2]."""
    from models.judge.dpo import train_dpo
    from models.judge.preferences import read_preferences
    from models.judge.spec import JudgeSpec

    folder, data = ctx.open(judge), open_store(ctx, store)
    return train_dpo(
        str(folder),
        JudgeSpec.read(folder),
        read_preferences(ctx.open(preferences)),
        data.query_by_id,
        data.product_by_id,
        config,
        ctx.out,
        ctx.scratch,
        ctx.sink,
        ctx.settings.torch_device,
    )


@stage(name="judge_grpo", kind="judge", code_version="10")
def judge_grpo(
    ctx: StageContext,
    config: GrpoConfig,
    trained_on: DrawConfig,
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """GRPO with class-balanced, difficulty-based dynamic sampling and, if set, guided replay.

    trained_on: what SFT drew.
    """
    from models.judge.cot_sft import draw_prompts
    from models.judge.grpo import train_grpo
    from models.judge.pool import choose_pool
    from models.judge.spec import JudgeSpec

    folder = ctx.open(judge)
    pairs = open_store(ctx, store).pairs("train")
    seed = config.optimiser.seed
    drawn = PromptDraw(count=config.pool.candidates, balance=float(config.pool.balanced), seed=seed)
    candidates = draw_prompts(pairs, trained_on, drawn, "RL pool")
    confidence = None
    if config.pool.max_confidence is not None:
        asked = [(p.query, p.product) for p in candidates]
        confidence = pool_confidence(
            ctx.scratch, lambda: _open_judge(ctx, judge).score(asked, "RL pool").max(1)
        )
    pool, facts = choose_pool(candidates, confidence, config.pool, seed)
    ctx.table("rl-pool", [facts])
    counts = train_grpo(
        str(folder),
        JudgeSpec.read(folder),
        pool,
        config,
        ctx.out,
        ctx.scratch,
        ctx.sink,
        ctx.settings.torch_device,
    )
    return facts | counts


@stage(name="judge", kind="judge", code_version="4")
def judge_calibrated(
    ctx: StageContext, config: CalibrationConfig, judge: ArtifactRef, store: ArtifactRef
) -> Mapping[str, float]:
    """The finished judge: weights, prompt, and the CumPT threshold of validation [TaoSR1 s3.4]; the
    median of P(grade) where validation lacks a grade of training (ours).
    """
    import numpy as np

    from models.evaluation.judge import grade_metrics
    from models.evaluation.tiers import ENOUGH, MEDIAN, calibrate, scarce
    from models.judge.spec import JudgeSpec

    folder = ctx.open(judge)
    tables = open_store(ctx, store)
    pairs = sample_pairs(tables.pairs("validation"), config.max_pairs, 0)
    if not pairs:
        do = "label a few validation queries"
        raise DataContractError(explain("no validation pairs", "some to calibrate CumPT on", do))
    scores = _open_judge(ctx, judge).score([(p.query, p.product) for p in pairs], "calibration")
    grades_N = np.array([p.grade for p in pairs])
    few = scarce(grades_N, np.array([p.grade for p in tables.pairs("train")]))
    if few:
        log.warning(
            "judge: fewer than %d of %d validation pairs have grade %s, so CumPT is not calibrated "
            "and reads the median of P(grade); label more validation queries, or raise "
            "judge.calibration.max_pairs",
            ENOUGH,
            len(pairs),
            " or ".join(map(str, few)),
        )
        cumpt, f1 = MEDIAN, grade_metrics(grades_N, MEDIAN.grades(scores))["macro_f1"]
    else:
        cumpt, f1 = calibrate(scores, grades_N)
    shutil.copytree(folder, ctx.out, dirs_exist_ok=True)
    JudgeSpec.read(folder).calibrated(cumpt).write(ctx.out)
    return {
        "beta_cum": cumpt.beta,
        "sharpness": cumpt.sharpness,
        "calibrated": float(not few),
        "validation/macro_f1": f1,
        "pairs": len(pairs),
    }


@stage(name="judge_answers", kind="judge", code_version="5")
def judge_answers(
    ctx: StageContext,
    config: AnswersConfig,
    prompt: ArtifactRef,
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """One judge's probabilities and decoded reasoning on the frozen test pairs."""
    from models.judge.answers import decode_greedy
    from models.judge.scoring import ScoringJudge
    from models.judge.spec import JudgeSpec

    spec = JudgeSpec.read(ctx.open(prompt))
    pairs = sample_pairs(open_store(ctx, store).pairs("test"), config.max_pairs, config.seed)
    model = ScoringJudge.open(weights_path(ctx, judge), spec, ctx.settings.torch_device)
    scores = model.score([(p.query, p.product) for p in pairs], "test pairs")
    texts = decode_greedy(model, pairs[: config.reasoning_pairs], config.max_new_tokens)
    return answer_rows(ctx, pairs, scores, texts)


def answer_rows(
    ctx: StageContext, pairs: list[Any], scores: Any, texts: Sequence[tuple[str, bool]] = ()
) -> Mapping[str, float]:
    """Write answers.json: P(grade) of every pair, and what was decoded for the first of them."""
    import numpy as np

    from models.evaluation.judge import grade_metrics

    rows: list[dict[str, Any]] = [
        {
            "query_id": p.query.query_id,
            "product_id": p.product.product_id,
            "grade": p.grade,
            "rating": p.rating,
            "p": [float(x) for x in row],
        }
        for p, row in zip(pairs, scores, strict=True)
    ]
    for row, (text, finished) in zip(rows, texts, strict=False):
        row |= {"response": text, "finished": finished}
    (ctx.out / "answers.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    gold = np.array([p.grade for p in pairs])
    return grade_metrics(gold, scores.argmax(1) + 1)


def pool_confidence(scratch: Path, ask: Callable[[], np.ndarray]) -> np.ndarray:
    """Confidence in each candidate of the RL pool [N], asked for once: a run that goes on trains on
    the pool that its checkpoint counts, though another device may round another way."""
    import numpy as np

    from models.files import replace_text

    path = scratch / "confidence.json"
    if not path.is_file():
        replace_text(path, json.dumps([float(c) for c in ask()]))
    return np.array(json.loads(path.read_text(encoding="utf-8")))


def _endpoint(current: Settings) -> Endpoint | None:
    """Where a chat teacher is asked, as the environment says; None where it says nothing."""
    if current.teacher_url is None:
        return None
    return Endpoint(
        url=current.teacher_url,
        api_key=current.teacher_api_key,
        concurrency=current.teacher_concurrency,
        timeout_s=current.teacher_timeout_s,
        attempts=current.teacher_attempts,
    )


def _open_judge(ctx: StageContext, ref: ArtifactRef) -> Any:
    from models.judge.scoring import ScoringJudge

    return ScoringJudge.load(ctx.open(ref), ctx.settings.torch_device)


def sample_pairs(pairs: list[Any], count: int, seed: int) -> list[Any]:
    """A fixed random sample, so that every judge answers the same pairs."""
    import random

    return pairs if len(pairs) <= count else random.Random(seed).sample(pairs, count)
