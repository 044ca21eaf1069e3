"""The whole chain: data -> judge -> embedder -> release, under one MLflow run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect import flow

from flows.data import prepare_data
from flows.embedder import EmbedderResult, train_embedder
from flows.judge import JudgeResult, train_judge
from flows.recipes import PipelineConfig
from flows.release import ReleaseResult, release
from tasks.stage import StageReport, pipeline


@dataclass(frozen=True)
class PipelineResult:
    """What one run made or found."""

    judge: JudgeResult
    retriever: EmbedderResult
    release: ReleaseResult
    reports: list[StageReport]
    run_id: str

    @property
    def registered(self) -> list[dict[str, Any]]:
        """The versions it registered, one row a model."""
        return self.release.registered


@flow(name="relearn", flow_run_name="{config.name}", log_prints=False)
def run_pipeline(config: PipelineConfig) -> PipelineResult:
    """From raw store files to two registered models, an index, an evaluation and a decision."""
    with pipeline(f"relearn {config.name}", experiment=config.name) as current:
        store = prepare_data(config.data)
        judge = train_judge(config.judge, store)
        retriever = train_embedder(config.embedder, store, judge.judge)
        released = release(config.name, judge, retriever, config.gate)
    return PipelineResult(judge, retriever, released, current.reports, current.run_id)
