"""Release: judge, retriever and index become registered model versions."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from flows.embedder import EmbedderResult
from flows.judge import JudgeResult
from tasks.artifacts import ArtifactStore
from tasks.release import register_candidates
from tasks.settings import settings


@flow(name="release", log_prints=False)
def release(name: str, judge: JudgeResult, retriever: EmbedderResult) -> list[dict[str, Any]]:
    """Register candidates, and a first champion where there is none."""
    register = task(name="register", persist_result=False)(register_candidates)
    artifacts = ArtifactStore(settings().model_copy(update={"experiment": name}))
    refs = {"judge": judge.judge, "embedder": retriever.embedder, "index": retriever.index}
    evaluations = {"judge": judge.evaluation, "retrieval": retriever.evaluation}
    rows: list[dict[str, Any]] = register(name, refs, evaluations, artifacts=artifacts)
    return rows
