"""The retriever's ablation: one measured row a stage, and the table made of all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from models.sources import SyntheticSource
from tasks.artifacts import ArtifactRef
from tasks.base import weights_path
from tasks.evaluate import RetrievalEvalConfig, goodrate_judge
from tasks.ingest import open_store
from tasks.stage import StageContext, stage

RUN, PARTS = "run.trec", "parts.json"
TABLE, REPORT, PLOT = "ablation.json", "ablation.md", "ablation.png"
GOOD_K = 10
MINING = ("index", "embedder_negatives")
"""Stages of a row that are there for its hard negatives: labour that R-GRPO does without."""
Channel = Literal["random", "bm25", "encoder"]


@stage(name="retriever_row", kind="evaluation", code_version="4")
def retriever_row(
    ctx: StageContext,
    config: RetrievalEvalConfig,
    channel: Channel,
    store: ArtifactRef,
    seed: int = 0,
    encoder: ArtifactRef | None = None,
    index: ArtifactRef | None = None,
    lexical: ArtifactRef | None = None,
    judge: ArtifactRef | None = None,
    truth: SyntheticSource | None = None,
) -> Mapping[str, float]:
    """One run over the held-out queries, and every metric of each query.

    seed: of the random channel alone. lexical: the BM25 row, for the overlap with it. judge: for
    Goodrate, on the same queries whatever the row; None leaves it out. truth: a generated store,
    which knows the grade of every pair, for true_goodrate on all queries.
    """
    from models.embedder.encoder import encode, load_encoder
    from models.evaluation.lexical import Bm25, random_run
    from models.evaluation.retrieval import read_trec_run, write_trec_run
    from models.evaluation.retriever_rows import interval, row_parts
    from models.index.lance import LanceIndex
    from models.rewards.quality import quality_scores

    data = open_store(ctx, store)
    qrels = data.qrels("test")
    queries = [data.query_by_id[q] for q in qrels]
    products = data.product_by_id
    if channel == "random":
        run = random_run(queries, list(products), config.depth, seed)
    elif channel == "bm25":
        run = Bm25(products.values()).search(queries, config.depth)
    else:
        assert encoder is not None and index is not None, "an encoder's row has an index"
        model = load_encoder(weights_path(ctx, encoder), ctx.settings.torch_device)
        vectors = encode(model, [q.text for q in queries], prompt="query", bf16=True)
        ids, _ = LanceIndex.open(ctx.open(index)).search(vectors, config.depth)
        run = {q.query_id: row for q, row in zip(queries, ids, strict=True)}
    write_trec_run(run, ctx.out / RUN, tag=channel)
    words = None if lexical is None else read_trec_run(ctx.open(lexical) / RUN)
    levels, source = quality_scores(data)
    good = goodrate_judge(
        ctx,
        config,
        judge,
        queries,
        lambda q: [products[p] for p in run.get(q.query_id, ())[:GOOD_K]],
    )
    parts = row_parts(
        run,
        qrels,
        data.query_by_id,
        products,
        levels,
        good,
        config.ks,
        GOOD_K,
        run if channel == "bm25" else words,
        None if truth is None else _true(truth),
    )
    body = {
        "parts": parts,
        "segments": {q.query_id: q.segment for q in queries},
        "quality_source": source,
    }
    (ctx.out / PARTS).write_text(json.dumps(body), encoding="utf-8")
    means = {metric: interval(list(values.values()), 1)[0] for metric, values in parts.items()}
    return {f"retrieval/{metric}": mean for metric, mean in means.items() if mean == mean}


def _true(source: SyntheticSource) -> Any:
    """The generated store's own word on any product."""
    from models.sources.synthetic import Oracle
    from models.types import RELEVANT_GRADE

    oracle = Oracle(source)

    def good(query: Any, found: Any) -> list[bool]:
        grades = [oracle.grade(query.query_id, p.product_id)[0] for p in found]
        return [grade >= RELEVANT_GRADE for grade in grades]

    return good


@stage(name="retriever_ablation", kind="report", code_version="4")
def retriever_ablation(
    ctx: StageContext,
    rows: dict[str, list[ArtifactRef]],
    trained: dict[str, list[ArtifactRef]],
    against: str,
    notes: list[str],
) -> Mapping[str, float]:
    """The table, its markdown and its plot.

    rows: {row name: the `retriever_row` of each seed}, in the order of the table. trained: {row
    name: the stages that trained it, of all seeds}; their seconds and judge tokens are what the
    row cost, a seed. against: the row the others are compared with.
    """
    from models.evaluation.retriever_report import COMPARED, figure, markdown
    from models.evaluation.retriever_rows import table_rows

    loaded = {
        name: [json.loads((ctx.open(r) / PARTS).read_text(encoding="utf-8")) for r in refs]
        for name, refs in rows.items()
    }
    first = next(iter(loaded.values()))[0]
    parts = {name: [body["parts"] for body in bodies] for name, bodies in loaded.items()}
    table = table_rows(parts, first["segments"], against, COMPARED)
    costs = {name: _cost(ctx, trained.get(name, []), len(refs)) for name, refs in rows.items()}
    table = [{**row, **costs[str(row["run"])]} for row in table]
    notes = [*notes, f"item quality: {first['quality_source']}"]
    text = markdown(table, against, notes)
    plot = figure(table)
    (ctx.out / TABLE).write_text(json.dumps(table, indent=1), encoding="utf-8")
    (ctx.out / REPORT).write_text(text, encoding="utf-8")
    plot.savefig(ctx.out / PLOT, dpi=120)
    ctx.table("ablation", table)
    ctx.markdown("ablation", text)
    ctx.figure("ablation", plot)
    overall = [row for row in table if row["segment"] == "all"]
    return {f"ndcg@10/{r['run']}": float(r["ndcg@10"]) for r in overall if "ndcg@10" in r}


def _cost(ctx: StageContext, refs: Sequence[ArtifactRef], seeds: int) -> dict[str, float]:
    """train_s, mining_s of it, judge_pairs, judge_tokens of a seed, from the runs that made it."""
    names = {
        "train_s": "stage/duration_s",
        "judge_pairs": "judge/pairs",
        "judge_tokens": "judge/tokens",
    }
    logged = [ctx.store.client.get_run(ref.run_id).data.metrics for ref in refs]
    spent = {name: sum(m.get(key, 0.0) for m in logged) / seeds for name, key in names.items()}
    mined = [m for ref, m in zip(refs, logged, strict=True) if ref.name in MINING]
    return spent | {"mining_s": sum(m.get(names["train_s"], 0.0) for m in mined) / seeds}
