"""The two tables: how good each judge is, and what each retriever finds, on held-out queries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tasks.artifacts import ArtifactRef
from tasks.base import weights_path
from tasks.embedder import judge_relevance
from tasks.ingest import open_store
from tasks.stage import StageContext, stage

JUDGE_TABLE = "judge_table.json"
RETRIEVAL_TABLE = "retrieval_table.json"
HEADLINES = {
    "judge": ("n", "macro_f1", "f1_1", "f1_2", "f1_3", "f1_4", "accuracy", "kappa", "spearman"),
    "retrieval": (
        *("n", "recall@10", "recall@100", "ndcg@10", "mrr@10", "goodrate@10", "quality@10"),
        *("condensed_ndcg@10", "hybrid_ndcg@10", "hybrid_recall@100"),
    ),
}
"""Measures of the report; the table has all of them."""
JUDGED_AT_ONCE = 192
"""Pairs between two progress reports; a multiple of what the judge scores in one pass."""


class RetrievalEvalConfig(BaseModel):
    """The retrieval table."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ks: tuple[int, ...] = (10, 100)
    """Cut-offs of Recall, Hitrate and judged; Goodrate is of the first 10."""
    depth: int = Field(100, ge=10, validate_default=True)
    """Products ranked a query; raised to the largest of `ks`, which a shorter run would belie."""
    judged_queries: int = Field(48, ge=0)
    """Test queries whose top 10 the judge reads for Goodrate@10; 0 leaves Goodrate out."""
    seed: int = 0

    @field_validator("depth")
    @classmethod
    def _reaches_every_cutoff(cls, depth: int, info: ValidationInfo) -> int:
        return max((depth, *info.data.get("ks", ())))


@stage(name="evaluate_judge", kind="evaluation", code_version="9")
def evaluate_judge(
    ctx: StageContext, answers: dict[str, ArtifactRef], judge: ArtifactRef, store: ArtifactRef
) -> Mapping[str, float]:
    """One row a judge, overall and by segment, on the same test pairs; a majority row first.

    answers: {row name: judge_answers artifact}. The last one is also read by CumPT; what it did on
    each pair is kept for the gate.
    """
    from models.evaluation.judge_table import judge_rows
    from models.evaluation.outcomes import judge_outcomes
    from models.judge.spec import JudgeSpec

    data = open_store(ctx, store)
    loaded = {name: _read_json(ctx.open(ref) / "answers.json") for name, ref in answers.items()}
    spec = JudgeSpec.read(ctx.open(judge))
    assert spec.cumpt is not None, "the judge artifact is calibrated"
    rows = judge_rows(loaded, data, spec.prompt.order, spec.cumpt)
    judge_outcomes(list(loaded.values())[-1], data, spec.cumpt).write(ctx.out)
    return _publish(ctx, JUDGE_TABLE, "judge", rows)


@stage(name="evaluate_retrieval", kind="evaluation", code_version="6")
def evaluate_retrieval(
    ctx: StageContext,
    config: RetrievalEvalConfig,
    encoders: dict[str, ArtifactRef],
    indexes: dict[str, ArtifactRef],
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """Random, BM25 and one row an encoder over the whole catalogue, overall and by segment.

    What the last encoder did on each query is kept for the gate.
    """
    from models.embedder.encoder import encode, load_encoder
    from models.evaluation.lexical import Bm25, random_run
    from models.evaluation.outcomes import retrieval_outcomes
    from models.evaluation.retrieval import evaluate_runs, write_trec_qrels, write_trec_run
    from models.index.lance import LanceIndex
    from models.rewards.quality import quality_scores

    data = open_store(ctx, store)
    qrels = data.qrels("test")
    queries = [data.query_by_id[q] for q in qrels]
    products = data.product_by_id
    runs: dict[str, dict[str, list[str]]] = {
        "random": random_run(queries, list(products), config.depth, config.seed),
        "bm25": Bm25(products.values()).search(queries, config.depth),
    }
    for name, ref in encoders.items():
        model = load_encoder(weights_path(ctx, ref), ctx.settings.torch_device)
        vectors = encode(model, [q.text for q in queries], prompt="query", bf16=True)
        ids, _ = LanceIndex.open(ctx.open(indexes[name])).search(vectors, config.depth)
        runs[name] = {q.query_id: row for q, row in zip(queries, ids, strict=True)}
    for name, run in runs.items():
        write_trec_run(run, ctx.out / f"{name}.trec", tag=name)
    write_trec_qrels(qrels, ctx.out / "qrels.txt")
    retrieval_outcomes(runs[list(runs)[-1]], qrels, data).write(ctx.out)
    every = {
        q.query_id: sorted({p for run in runs.values() for p in run.get(q.query_id, [])[:10]})
        for q in queries
    }
    good = goodrate_judge(
        ctx, config, judge, queries, lambda q: [products[p] for p in every[q.query_id]]
    )
    levels, source = quality_scores(data)
    rows = evaluate_runs(runs, qrels, data.query_by_id, products, good, levels, config.ks)
    rows = [{**row, "quality_source": source} for row in rows]
    return _publish(ctx, RETRIEVAL_TABLE, "retrieval", rows)


def goodrate_judge(
    ctx: StageContext,
    config: RetrievalEvalConfig,
    judge: ArtifactRef | None,
    queries: Sequence[Any],
    shown: Callable[[Any], Sequence[Any]],
) -> Any:
    """Good (grade 4 or 3 by the judge) of the products `shown` for the queries it reads, one NaN
    for the others; None where no judge reads any."""
    import random

    if judge is None or config.judged_queries == 0:
        return None
    count = min(config.judged_queries, len(queries))
    chosen = random.Random(config.seed).sample(list(queries), count)
    pairs = [(q, product) for q in chosen for product in shown(q)]
    relevance = judge_relevance(ctx, judge)
    verdict: dict[tuple[str, str], float] = {}
    ctx.progress(0, len(pairs), "pairs judged for Goodrate")
    for start in range(0, len(pairs), JUDGED_AT_ONCE):
        part = pairs[start : start + JUDGED_AT_ONCE]
        for (query, product), word in zip(part, relevance.is_good(part), strict=True):
            verdict[query.query_id, product.product_id] = float(word)
        ctx.progress(start + len(part), len(pairs), "pairs judged for Goodrate")
    read = {q.query_id for q in chosen}

    def good(query: Any, found: Any) -> list[float]:
        if query.query_id not in read:
            return [float("nan")]
        return [verdict[query.query_id, p.product_id] for p in found]

    return good


def overall(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last row over all units: the finished model's."""
    return [r for r in rows if r["segment"] == "all"][-1]


def _publish(
    ctx: StageContext, file: str, name: str, rows: list[dict[str, Any]]
) -> dict[str, float]:
    (ctx.out / file).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    ctx.table(name, rows)
    ctx.markdown(f"{name}-report", evaluation_report(name, rows))
    return {f"{name}/{k}": float(v) for k, v in overall(rows).items() if isinstance(v, int | float)}


def evaluation_report(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """An evaluation to read: the headline measures overall, then the last row by segment.

    rows: dicts with `segment`, the row's name first; measures a row lacks are left blank.
    """
    first = next(iter(rows[0]))
    named = [m for m in HEADLINES[name] if any(m in row for row in rows)]
    overall = [row for row in rows if row["segment"] == "all"]
    last = overall[-1][first]
    segments = [row for row in rows if row["segment"] != "all" and row[first] == last]
    parts = [f"# {name} on held-out queries", "", *_markdown_table(first, named, overall)]
    if segments:
        parts += ["", f"## {last} by segment", "", *_markdown_table("segment", named, segments)]
    return "\n".join(parts) + "\n"


def _markdown_table(
    head: str, measures: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    return [
        f"| {' | '.join([head, *measures])} |",
        f"| {' | '.join(['---', *['---:'] * len(measures)])} |",
        *(f"| {' | '.join([str(r[head]), *(_cell(r.get(m)) for m in measures)])} |" for r in rows),
    ]


def _cell(value: Any) -> str:
    if not isinstance(value, int | float) or value != value:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_table(folder: Path, file: str) -> list[dict[str, Any]]:
    """Rows of an evaluation artifact."""
    rows: list[dict[str, Any]] = _read_json(folder / file)
    return rows
