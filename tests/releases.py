"""Releases without training: stages of the real names that write what the gate reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from models.evaluation.outcomes import Outcomes
from models.index.config import IndexConfig
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.evaluate import JUDGE_TABLE, RETRIEVAL_TABLE, RetrievalEvalConfig
from tasks.judge import AnswersConfig
from tasks.release import Release, register_candidates
from tasks.settings import settings
from tasks.stage import Stage, StageContext, stage

STORE = "shop"
UNITS = 40
INDEX = IndexConfig(sample=7)


@stage(name="validate", kind="data")
def store_stage(ctx: StageContext, data: str) -> None:
    """A store: one word."""
    (ctx.out / "data.txt").write_text(data)


@stage(name="judge", kind="judge")
def judge_stage(ctx: StageContext, seed: int, store: ArtifactRef) -> None:
    """A judge: one number."""
    (ctx.out / "judge.txt").write_text(str(seed))


@stage(name="embedder_rgrpo", kind="embedder")
def embedder_stage(ctx: StageContext, seed: int, judge: ArtifactRef, store: ArtifactRef) -> None:
    """An embedder that a judge taught."""
    (ctx.out / "embedder.txt").write_text(str(seed))


@stage(name="index", kind="index")
def index_stage(
    ctx: StageContext, config: IndexConfig, encoder: ArtifactRef, store: ArtifactRef
) -> Mapping[str, float]:
    """An index whose recall is 1."""
    (ctx.out / "index.txt").write_text("index")
    return {"recall_at_10": 1.0}


@stage(name="judge_answers", kind="judge")
def answers_stage(
    ctx: StageContext, config: AnswersConfig, judge: ArtifactRef, store: ArtifactRef
) -> None:
    """Answers."""
    (ctx.out / "answers.json").write_text("[]")


@stage(name="evaluate_judge", kind="evaluation")
def evaluate_judge_stage(
    ctx: StageContext, quality: float, answers: dict[str, ArtifactRef], store: ArtifactRef
) -> None:
    """Every pair has the value `quality`."""
    write_evaluation(ctx, quality, store, JUDGE_TABLE)


@stage(name="evaluate_retrieval", kind="evaluation")
def evaluate_retrieval_stage(
    ctx: StageContext,
    quality: float,
    config: RetrievalEvalConfig,
    encoder: ArtifactRef,
    store: ArtifactRef,
) -> None:
    """Every query has the value `quality`."""
    write_evaluation(ctx, quality, store, RETRIEVAL_TABLE)


def write_evaluation(ctx: StageContext, quality: float, store: ArtifactRef, table: str) -> None:
    """A table of one row, and outcomes on a set that the store's word names."""
    numbers = {"kappa": 0.5, "macro_f1": 0.4, "ndcg@10": quality}
    (ctx.out / table).write_text(json.dumps([{"segment": "all", **numbers}]))
    units = [f"u{i}" for i in range(UNITS)]
    word = (ctx.open(store) / "data.txt").read_text()
    values = dict.fromkeys(units, quality)
    Outcomes(word, values, dict.fromkeys(units, "general"), numbers).write(ctx.out)


def artifacts() -> ArtifactStore:
    """The store of the current home."""
    return ArtifactStore(settings(experiment=STORE))


def make_release(
    quality: float = 0.5,
    judge: int = 0,
    embedder: int | None = None,
    data: str = "one",
    index_by: Stage = index_stage,
    index: IndexConfig = INDEX,
) -> Release:
    """Make and register a judge, an embedder and an index, all of one quality."""
    store = store_stage.make(data=data)
    made = judge_stage.make(seed=judge, store=store)
    encoder = embedder_stage.make(
        seed=judge if embedder is None else embedder, judge=made, store=store
    )
    built = index_by.make(config=index, encoder=encoder, store=store)
    answers = answers_stage.make(config=AnswersConfig(max_pairs=9), judge=made, store=store)
    evaluations = {
        "judge": evaluate_judge_stage.make(quality=quality, answers={"x": answers}, store=store),
        "retrieval": evaluate_retrieval_stage.make(
            quality=quality, config=RetrievalEvalConfig(depth=110), encoder=encoder, store=store
        ),
    }
    refs = {"judge": made, "embedder": encoder, "index": built}
    return register_candidates(STORE, refs, evaluations, artifacts=artifacts())


def champion_labels() -> dict[str, Any]:
    """Which artifact is champion, by role; None where none is."""
    from tasks import registry
    from tasks.release import ROLES, model_name

    found = {r: registry.champion(model_name(STORE, r), store=artifacts()) for r in ROLES}
    return {r: None if v is None else v.ref.label for r, v in found.items()}


def labels(release: Release) -> dict[str, str]:
    """The artifacts of a release, by role."""
    return {role: part.ref.label for role, part in release.parts.items()}
