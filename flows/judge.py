"""The thinking relevance judge: CoT SFT -> probe -> pass@N -> DPO -> GRPO -> CumPT [TaoSR1]."""

from __future__ import annotations

import functools
from typing import Any

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.recipes import JudgeConfig
from models.judge.config import PromptDraw
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
    judge_probe,
    judge_prompt,
    judge_teacher,
)
from tasks.stage import Stage


class JudgeResult(BaseModel):
    """The finished judge and its table."""

    model_config = ConfigDict(frozen=True)

    judge: ArtifactRef
    evaluation: ArtifactRef


class JudgeStages:
    """The judge's stages; each starts from the one before, and is made when it is asked for.

    made: stages by fingerprint, for chains that share their first ones; each is called once.
    """

    def __init__(
        self, config: JudgeConfig, store: ArtifactRef, made: dict[str, ArtifactRef] | None = None
    ) -> None:
        self.config, self.store = config, store
        self.made = {} if made is None else made
        self._rules = load_rules(config.prompt.rules).version

    @functools.cached_property
    def prompt(self) -> ArtifactRef:
        """What every judge reads by."""
        return self.call(
            judge_prompt, prompt=self.config.prompt, rules=self._rules, store=self.store
        )

    @functools.cached_property
    def base(self) -> ArtifactRef:
        """The zero-shot judge."""
        return self.base_of(self.config.base, "judge")

    @functools.cached_property
    def teacher(self) -> ArtifactRef:
        """The reasoning that SFT learns."""
        return self._taught(None)

    def _taught(self, prompts: PromptDraw | None) -> ArtifactRef:
        return self.call(
            judge_teacher,
            config=self.config.teacher,
            draw=self.config.sft.draw,
            rule_base=self.config.prompt.rules,
            rules=self._rules,
            store=self.store,
            prompts=prompts,
        )

    @functools.cached_property
    def sft(self) -> ArtifactRef:
        """The judge after CoT SFT."""
        return self.call(
            judge_cot_sft,
            config=self.config.sft,
            base=self.base,
            prompt=self.prompt,
            teacher=self.teacher,
            store=self.store,
        )

    @functools.cached_property
    def probed(self) -> ArtifactRef:
        """The judge after SFT and, if it has one, the grade probe."""
        if self.config.probe is None:
            return self.sft
        return self.call(
            judge_probe,
            config=self.config.probe,
            trained_on=self.config.sft.draw,
            judge=self.sft,
            store=self.store,
        )

    @functools.cached_property
    def dpo(self) -> ArtifactRef:
        """The judge after DPO on its own mistakes."""
        preferences = self.call(
            judge_pass_at_n,
            config=self.config.pass_at_n,
            trained_on=self.config.sft.draw,
            judge=self.probed,
            teacher=self._taught(self.config.pass_at_n.draw),
            store=self.store,
        )
        return self.call(
            judge_dpo,
            config=self.config.dpo,
            judge=self.probed,
            preferences=preferences,
            store=self.store,
        )

    @functools.cached_property
    def grpo(self) -> ArtifactRef:
        """The judge after GRPO."""
        return self.call(
            judge_grpo,
            config=self.config.grpo,
            trained_on=self.config.sft.draw,
            judge=self.dpo,
            store=self.store,
        )

    def calibrated(self, judge: ArtifactRef) -> ArtifactRef:
        """`judge` with a CumPT reading: a finished judge, which others may use."""
        return self.call(
            judge_calibrated, config=self.config.calibration, judge=judge, store=self.store
        )

    def answers(self, judge: ArtifactRef) -> ArtifactRef:
        """What `judge` says of the held-out pairs."""
        return self.call(
            judge_answers,
            config=self.config.answers,
            prompt=self.prompt,
            judge=judge,
            store=self.store,
        )

    def base_of(self, name: str, role: str) -> ArtifactRef:
        """The base model `name`."""
        return self.call(
            base_model,
            name=name,
            role=role,
            content=base_content(name),
            store=self.store if name == TINY else None,
        )

    def call(self, stage: Stage, **inputs: Any) -> ArtifactRef:
        """`stage(**inputs)`, unless a chain that shares `made` has called it."""
        key = stage.identity(**inputs).fingerprint
        if key not in self.made:
            self.made[key] = stage(**inputs)
        return self.made[key]


@flow(name="train-judge", flow_run_name="judge", log_prints=False)
def train_judge(config: JudgeConfig, store: ArtifactRef) -> JudgeResult:
    """Train and evaluate the judge; each stage starts from the one before."""
    stages = JudgeStages(config, store)
    rows = {
        "zero-shot": stages.base,
        "CoT SFT": stages.probed,
        "+ DPO": stages.dpo,
        "+ GRPO": stages.grpo,
    }
    judge = stages.calibrated(stages.grpo)
    answers = {name: stages.answers(model) for name, model in rows.items()}
    evaluation = evaluate_judge(answers=answers, judge=judge, store=store)
    return JudgeResult(judge=judge, evaluation=evaluation)
