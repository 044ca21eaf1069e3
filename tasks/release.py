"""Register what was made: judge, retriever and index as model versions, and a first champion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.evaluate import JUDGE_TABLE, RETRIEVAL_TABLE, read_table
from tasks.registry import first_champion_if_none, get, register

ROLES = ("judge", "embedder", "index")


def model_name(store_name: str, role: str) -> str:
    """Registered model name of one store's judge, embedder or index."""
    return f"{store_name}-{role}"


def register_candidates(
    store_name: str,
    refs: Mapping[str, ArtifactRef],
    evaluations: Mapping[str, ArtifactRef],
    *,
    artifacts: ArtifactStore,
) -> list[dict[str, Any]]:
    """Make every ref a version with alias `candidate`; the first of its name is also `champion`.

    Returns:
        one row a model: name, version, its aliases, artifact.
    """
    judge = read_table(artifacts.path(evaluations["judge"]), JUDGE_TABLE)
    retrieval = read_table(artifacts.path(evaluations["retrieval"]), RETRIEVAL_TABLE)
    metrics = {
        "judge": _numbers([r for r in judge if r["segment"] == "all"][-1]),
        "embedder": _numbers([r for r in retrieval if r["segment"] == "all"][-1]),
    }
    metrics["index"] = metrics["embedder"]
    rows = []
    for role in ROLES:
        name = model_name(store_name, role)
        tags = {f"evaluation_{k}": ref.label for k, ref in evaluations.items()}
        version = register(name, refs[role], metrics[role], tags, store=artifacts)
        first_champion_if_none(name, version, store=artifacts)
        made = get(name, version, store=artifacts)
        assert made is not None, "it was registered above"
        alias = ", ".join(made.aliases)
        rows.append(
            {"model": name, "version": version, "alias": alias, "artifact": refs[role].label}
        )
    return rows


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and v == v}
