"""The thinking relevance judge: CoT SFT -> pass@N -> DPO -> GRPO -> CumPT [TaoSR1]."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.recipes import JudgeConfig
from models.rules.base import load_rules
from tasks.artifacts import ArtifactRef
from tasks.base import TINY, base_content, base_model
from tasks.evaluate import evaluate_judge
from tasks.judge import (
    judge_answers,
    judge_calibrated,
    judge_cot_sft,
    judge_dpo,
    judge_grpo,
    judge_pass_at_n,
    judge_prompt,
    judge_teacher,
)


class JudgeResult(BaseModel):
    """The finished judge and its table."""

    model_config = ConfigDict(frozen=True)

    judge: ArtifactRef
    evaluation: ArtifactRef


@flow(name="train-judge", flow_run_name="judge", log_prints=False)
def train_judge(config: JudgeConfig, store: ArtifactRef) -> JudgeResult:
    """Train and evaluate the judge; each stage starts from the one before."""
    rules = load_rules(config.prompt.rules).version
    prompt = judge_prompt(prompt=config.prompt, rules=rules, store=store)
    base = base_model(
        name=config.base,
        role="judge",
        content=base_content(config.base),
        store=store if config.base == TINY else None,
    )
    teacher = judge_teacher(
        config=config.teacher,
        draw=config.sft.draw,
        rule_base=config.prompt.rules,
        rules=rules,
        store=store,
    )
    sft = judge_cot_sft(config=config.sft, base=base, prompt=prompt, teacher=teacher, store=store)
    preferences = judge_pass_at_n(config=config.pass_at_n, judge=sft, teacher=teacher, store=store)
    dpo = judge_dpo(config=config.dpo, judge=sft, preferences=preferences, store=store)
    grpo = judge_grpo(config=config.grpo, judge=dpo, store=store)
    judge = judge_calibrated(config=config.calibration, judge=grpo, store=store)
    rows = {"zero-shot": base, "CoT SFT": sft, "+ DPO": dpo, "+ GRPO": grpo}
    answers = {
        name: judge_answers(config=config.answers, prompt=prompt, judge=model, store=store)
        for name, model in rows.items()
    }
    evaluation = evaluate_judge(answers=answers, judge=judge, store=store)
    return JudgeResult(judge=judge, evaluation=evaluation)
