"""The retriever's stages: contrastive SFT -> index -> Retrieval-GRPO -> index; and its rivals'."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.embedder.config import (
    ContrastiveConfig,
    EncoderConfig,
    HardNegativeConfig,
    MiningConfig,
    RetrievalGRPOConfig,
)
from models.errors import DivergenceError
from models.index.config import IndexConfig
from tasks.artifacts import TAG, ArtifactRef
from tasks.base import weights_path
from tasks.ingest import open_store
from tasks.stage import StageContext, stage

VECTORS = f"{TAG}vectors"
"""Tag of an index's run: content of the encoder, and how it computed."""


class RewardsConfig(BaseModel):
    """r = relevance + quality + exclusivity, each weighted [TaoSearchEmb s3.2]."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    relevance: float = Field(1.0, ge=0)
    """Weight of the judge's live score."""
    quality: float = Field(0.7, ge=0)
    """Weight of the item's quality level."""
    exclusivity: float = Field(0.1, ge=0)
    """Weight of 1 - term overlap with the query. The paper weighs all three alike; with 1 / 1 / 1 a
    MiniLM lost recall on the synthetic store (.273 -> .242, infra/LOG.md)."""
    readout: Literal["good", "expected"] = "good"
    """good: P4 + P3; expected: (E[grade] - 1) / 3."""


@stage(name="embedder_base", kind="embedder", code_version="2")
def embedder_base(ctx: StageContext, config: EncoderConfig, base: ArtifactRef) -> None:
    """A base model with pooling and prompts, as a folder of its own (weights are copied)."""
    from models.embedder.encoder import prepare_encoder

    prepare_encoder(weights_path(ctx, base), config, ctx.out)


@stage(name="embedder_sft", kind="embedder", code_version="7")
def embedder_sft(
    ctx: StageContext, config: ContrastiveConfig, base: ArtifactRef, store: ArtifactRef
) -> Mapping[str, float]:
    """Contrastive SFT with in-batch and global random negatives [TaoSearchEmb s3.1]."""
    from models.embedder.contrastive import train_contrastive

    return train_contrastive(
        weights_path(ctx, base),
        open_store(ctx, store),
        config,
        ctx.out,
        ctx.scratch,
        ctx.sink,
        ctx.settings.torch_device,
    )


@stage(name="index", kind="index", code_version="4")
def index_catalogue(
    ctx: StageContext, config: IndexConfig, encoder: ArtifactRef, store: ArtifactRef
) -> Mapping[str, float]:
    """The whole catalogue in LanceDB, its recall measured on the store's own queries.

    Texts that an earlier index of this store holds are not embedded again if its encoder has the
    same content, whichever run made it: Retrieval-GRPO may keep the SFT encoder; a base stays. Nor
    are those that an interrupted build of this one had embedded.
    """
    import hashlib
    import random

    from models.embedder.encoder import document_encoder, encode, load_encoder
    from models.index.build import build_index
    from models.index.reuse import resumable
    from models.store import stream_products, stream_queries

    weights = weights_path(ctx, encoder)
    earlier, mark = _index_of_same_vectors(ctx, weights, config.dim)
    batches = ctx.scratch / f"vectors-{hashlib.sha256(mark.encode()).hexdigest()[:16]}"
    model = load_encoder(weights, ctx.settings.torch_device)
    folder = ctx.open(store) / "store"
    texts = [query.text for query in stream_queries(folder)]
    probes = random.Random(config.seed).sample(texts, min(config.sample, len(texts)))
    products, total = stream_products(folder)
    facts = build_index(
        resumable(document_encoder(model, bf16=True), batches),
        products,
        config,
        ctx.out,
        ctx.sink,
        encode(model, probes, prompt="query", bf16=True),
        total,
        None if earlier is None else ctx.open(earlier),
    )
    if earlier is not None:
        ctx.log.info(
            "index: the encoder is that of %s: %d vectors taken from it, %d texts embedded",
            earlier.label,
            facts.rows - (facts.encoded_rows or 0),
            facts.encoded_rows,
        )
    ctx.table("index", [facts.numbers() | {"kind": facts.kind}])
    return facts.numbers()


def _index_of_same_vectors(
    ctx: StageContext, weights: str, dim: int | None
) -> tuple[ArtifactRef | None, str]:
    """The newest whole index of this store whose vectors have as many numbers, by an encoder with
    the content of `weights` on the same kind of device, and what says so: the run is marked with
    it, for later ones to find."""
    from models.lm.precision import has_bf16
    from models.lm.weights import fingerprint

    device = ctx.settings.torch_device.split(":")[0]
    how = f"{device}-{'bf16' if has_bf16(device) else 'float32'}"
    mark = f"{fingerprint(weights, whole=True)}-{how}-{dim or 'all'}"
    runs = ctx.store.search(f"tags.`{VECTORS}` = '{mark}' and attributes.status = 'FINISHED'")
    ctx.store.client.set_tag(ctx.run_id, VECTORS, mark)
    own = (run for run in runs if run.info.experiment_id == ctx.store.experiment_id)
    found = next((run for run in own if not ctx.store.damage(run)), None)
    return (None if found is None else ctx.store.ref(found)), mark


@stage(name="embedder_rgrpo", kind="embedder", code_version="10")
def embedder_rgrpo(
    ctx: StageContext,
    config: RetrievalGRPOConfig,
    rewards: RewardsConfig,
    encoder: ArtifactRef,
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """Retrieval-GRPO with judge, quality and exclusivity rewards [TaoSearchEmb s3.2]."""
    from models.embedder.retrieval_grpo import train_retrieval_grpo
    from models.rewards.exclusivity import Exclusivity
    from models.rewards.quality import Quality, quality_scores

    data = open_store(ctx, store)
    relevance = judge_relevance(ctx, judge, rewards.readout, rewards.relevance)
    levels, source = quality_scores(data)
    ctx.log.info("item quality from %s", source)
    parts = [relevance, Quality(levels, rewards.quality), Exclusivity(rewards.exclusivity)]
    with _kept_when_it_diverges(ctx):
        counts = train_retrieval_grpo(
            weights_path(ctx, encoder),
            data,
            [r for r in parts if r.weight > 0],
            config,
            ctx.out,
            ctx.scratch,
            ctx.sink,
            ctx.settings.torch_device,
        )
    cost = judge_cost(relevance)
    return dict(counts) | cost | {"judge_cache/hit_rate": relevance.cache.hit_rate}


@contextlib.contextmanager
def _kept_when_it_diverges(ctx: StageContext) -> Iterator[None]:
    """A failed stage's folder goes; the encoder in that of a diverged one is put aside first.

    Raises:
        DivergenceError: the one from inside, with the place it was put.
    """
    try:
        yield
    except DivergenceError as error:
        if not any(ctx.out.iterdir()):
            raise
        kept = ctx.settings.home / "diverged" / f"{ctx.stage}-{ctx.fingerprint[:12]}"
        try:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(ctx.out, kept)
        except OSError as problem:
            ctx.log.warning("the best encoder could not be kept in %s: %s", kept, problem)
            raise error from None
        raise DivergenceError(f"{error}. The best encoder before that is kept in {kept}") from error


@stage(name="embedder_negatives", kind="data", code_version="4")
def embedder_negatives(
    ctx: StageContext,
    config: MiningConfig,
    encoder: ArtifactRef,
    index: ArtifactRef,
    judge: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """Hard negatives from the SFT index: high similarity, low grade by the judge."""
    from models.embedder.encoder import load_encoder
    from models.embedder.mining import mine, write_negatives
    from models.index.lance import LanceIndex

    relevance = judge_relevance(ctx, judge)
    found, counts = mine(
        load_encoder(weights_path(ctx, encoder), ctx.settings.torch_device),
        LanceIndex.open(ctx.open(index)),
        open_store(ctx, store),
        relevance,
        config,
        ctx.progress,
    )
    write_negatives(found, ctx.out)
    ctx.table("hard-negatives", [counts])
    known = {name: value for name, value in counts.items() if value == value}
    return {f"mining/{name}": value for name, value in known.items()} | judge_cost(relevance)


@stage(name="embedder_hard", kind="embedder", code_version="4")
def embedder_hard(
    ctx: StageContext,
    config: HardNegativeConfig,
    encoder: ArtifactRef,
    negatives: ArtifactRef,
    store: ArtifactRef,
) -> Mapping[str, float]:
    """Ranking loss or DPO on mined hard negatives, from the SFT encoder."""
    from models.embedder.hard_negatives import train_on_hard_negatives
    from models.embedder.mining import read_negatives

    return train_on_hard_negatives(
        weights_path(ctx, encoder),
        open_store(ctx, store),
        read_negatives(ctx.open(negatives)),
        config,
        ctx.out,
        ctx.scratch,
        ctx.sink,
        ctx.settings.torch_device,
    )


def judge_cost(relevance: Any) -> dict[str, float]:
    """What a stage asked of the judge, whatever the cache already knew.

    judge/pairs: distinct pairs; judge/tokens: read with an empty cache, shared ones once;
    judge/pairs_computed: pairs the cache did not have.
    """
    return {
        "judge/pairs": float(relevance.num_pairs),
        "judge/pairs_computed": float(relevance.computed),
        "judge/tokens": float(relevance.num_tokens),
    }


def judge_relevance(
    ctx: StageContext, judge: ArtifactRef, readout: str = "good", weight: float = 1.0
) -> Any:
    """The judge as a reward, its scores cached under the home by the content of its weights.

    Its fingerprint would not do: a judge that was deleted and trained again, maybe on another
    device, keeps it. A cross-encoder (the stage `judge_cross_encoder`) is one as well; its tokens
    are not counted.
    """
    from models.judge.cross_encoder import CrossEncoder
    from models.judge.scoring import ScoringJudge
    from models.lm.precision import has_bf16
    from models.lm.weights import fingerprint
    from models.rewards.relevance import JudgeRelevance, ScoreCache

    folder, device = ctx.open(judge), ctx.settings.torch_device
    path = ctx.settings.home / "scores" / f"{judge.fingerprint[:16]}.sqlite"
    version = f"{fingerprint(folder, whole=True)} bf16 {has_bf16(device)}"
    if judge.name == "judge_cross_encoder":
        small: Any = CrossEncoder(folder, device)
        return JudgeRelevance(small, ScoreCache(path, version), readout, weight)  # type: ignore[arg-type]
    model = ScoringJudge.load(folder, device)
    cache = ScoreCache(path, version, model.rules_version)
    return JudgeRelevance(model, cache, readout, weight, model.num_tokens)  # type: ignore[arg-type]
