"""Settings of the embedder's stages; light, so that a form can be shown without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

SFT_PAIRS = 20_000
"""Pairs SFT keeps, and so the anchor of Retrieval-GRPO."""

Event = Literal["click", "cart", "purchase"]
Interactions = dict[Event, PositiveFloat] | bool
"""What an event says of a pair that nobody has judged. True: a cart or purchase makes it a positive
of weight 1. False: nothing. Else the weight by event; the heaviest counts, others say nothing."""


def _unchanged(interactions: Interactions) -> bool:
    return interactions is True


class FitConfig(BaseModel):
    """What every stage that fits an encoder with sentence-transformers' trainer can set."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int | None = Field(default=60, ge=1)
    """Optimiser steps; None: `epochs` decides."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the pairs, when `steps` is None."""
    extra_steps: int = Field(default=0, ge=0, exclude_if=lambda n: n == 0)
    """Steps on top, however many those are. Not in the dump when 0, as `interactions`."""
    batch_size: int = Field(default=32, ge=2)
    """Pairs a step; each is a negative for the others."""
    tau: float = Field(default=0.05, gt=0)
    """Temperature; 1/20 as in sentence-transformers."""
    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate of AdamW, linear decay."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps spent warming up."""
    max_tokens: int | None = Field(default=128, ge=8)
    """Longest text in training, in tokens; None: the encoder's own limit."""
    bf16: bool = True
    """bf16 autocast (1.7 times faster on CPUs that have it)."""
    save_every: int = Field(default=20, ge=1)
    """Steps between two checkpoints."""
    seed: int = 0


class ContrastiveConfig(FitConfig):
    """Contrastive SFT. What the paper does not print is ours: two minutes on two cores."""

    global_negatives: int = Field(default=32, ge=0)
    """Products drawn uniformly from the whole catalogue, a step [TaoSearchEmb s3.1]."""
    max_pairs: int | None = Field(default=SFT_PAIRS, ge=2)
    """Pairs kept, drawn at random; None: all."""
    min_grade: int = Field(default=4, ge=2, le=4)
    """Judgments from this grade on are positives (4: the Excellent ones); grade 4 weighs 1,
    grade 3 weighs 2/3, grade 2 weighs 1/3, times the judgment's own weight."""
    interactions: Interactions = True
    """Whether events of train queries are positives too: cart and purchase with weight 1, or by
    event, e.g. {"purchase": 1, "cart": 0.6, "click": 0.2}."""
    mask_false_negatives: bool = True
    """Whether known positives and copies are masked out of the negatives."""
    chunk: int | None = Field(default=None, ge=1)
    """Texts embedded at once, by gradient caching: memory for a second forward. None: all."""
    matryoshka_dims: tuple[PositiveInt, ...] = ()
    """Widths trained at once: the loss is the mean over them, each on the first so many numbers of
    a vector. Name the full width too. Empty: the full width alone. See `index.dim`."""


class MiningConfig(BaseModel):
    """Hard negatives: near a query for the SFT encoder, and poor for the judge."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_queries: int | None = Field(default=128, ge=1)
    """Train queries mined, drawn at random among those with a positive; None: all."""
    depth: int = Field(default=20, ge=1)
    """Nearest products that the judge reads, a query."""
    per_query: int = Field(default=4, ge=1)
    """Negatives kept a query, the nearest first."""
    max_good: float = Field(default=0.5, ge=0, le=1)
    """Largest P3 + P4 of a negative; .5: the judge says grade 1 or 2."""
    interactions: Interactions = Field(default=True, exclude_if=_unchanged)
    """Whether events are positives too; the flows take SFT's. Not in the dump when true, so that
    what was made before it could be set stays valid."""
    seed: int = 0


class HardNegativeConfig(FitConfig):
    """One stage on mined hard negatives: the paper's two rivals of Retrieval-GRPO."""

    steps: int | None = Field(default=36, ge=1)
    """Optimiser steps; None: `epochs` decides."""
    batch_size: int = Field(default=16, ge=2)
    """Pairs a step, each with `negatives` mined ones."""
    negatives: int = Field(default=4, ge=1)
    """Mined negatives of a pair; where its query has fewer, they are repeated."""
    loss: Literal["infonce", "margin", "dpo"] = "infonce"
    """infonce: the positive among its mined negatives. margin: hinge on each. dpo: preference of
    the positive over each, on similarities, the start as the reference."""
    margin: float = Field(default=0.1, ge=0)
    """Cosine by which a positive must be ahead; for `margin` alone."""
    beta: float = Field(default=0.1, gt=0)
    """DPO's beta, on s / tau; for `dpo` alone."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of in-batch InfoNCE beside it, as in Retrieval-GRPO; 0 turns it off."""
    min_grade: int = Field(default=4, ge=2, le=4)
    """Judgments from this grade on are positives."""
    interactions: Interactions = Field(default=True, exclude_if=_unchanged)
    """As in MiningConfig."""
    dim: int | None = Field(default=None, ge=1, exclude_if=lambda n: n is None)
    """Numbers of a vector that the losses see, the first ones; the flows take the index's. None:
    all."""
    lr: float = Field(default=4e-5, gt=0)
    """Peak learning rate of AdamW, linear decay."""


class EncoderConfig(BaseModel):
    """How a base model without such settings of its own becomes an encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pooling: Literal["mean", "cls", "lasttoken"] = "mean"
    """mean for BERT-like models, lasttoken for decoder LLMs."""
    query_prompt: str = ""
    """Put before every query, e.g. "Instruct: find products that answer the query\nQuery: "."""
    document_prompt: str = ""
    """Put before every product."""


class RetrievalGRPOConfig(BaseModel):
    """Retrieval-GRPO. The paper prints none of these numbers: ours, sized for three minutes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=36, ge=1)
    """Optimiser steps (batches of queries times `inner_steps`)."""
    batch_queries: int = Field(default=8, ge=1)
    """Queries a batch."""
    k: int = Field(default=16, ge=2)
    """Candidates of a query."""
    max_queries: int | None = Field(default=128, ge=1)
    """Train queries used, drawn at random; several passes over them hit the judge's cache."""
    pool: Literal["index", "batch"] = "index"
    """Where candidates come from; see `embedder/candidates.py`."""
    pool_size: int | None = Field(default=3000, ge=2)
    """Products in the pool: the judged ones of these queries and a uniform sample; None: all."""
    refresh_every: int = Field(default=18, ge=1)
    """Steps between two embeddings of the pool, which are also the checkpoints and the watch."""
    towers: Literal["both", "query"] = "both"
    """query: product vectors stay as embedded at the last refresh; cheap, and drifts."""
    advantage: Literal["full", "positive"] = "full"
    """positive: only candidates above the group's mean push."""
    inner_steps: int = Field(default=1, ge=1)
    """Optimiser steps on one batch; from the second on rho differs from 1 and clips."""
    tau: float = Field(default=0.05, gt=0)
    """Temperature of the policy, that of the SFT."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    clip_high: float = Field(default=0.2, ge=0)
    beta: float = Field(default=0.1, ge=0)
    """Weight of the KL to the SFT encoder."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the InfoNCE anchor; 0 turns it off. It is what holds recall."""
    sft_batch: int = Field(default=24, ge=2)
    """Pairs of the anchor, a step."""
    min_grade: int = Field(default=4, ge=2, le=4)
    """Judgments from this grade on are positives of the anchor."""
    interactions: Interactions = Field(default=True, exclude_if=_unchanged)
    """As in MiningConfig."""
    anchor_pairs: int | None = Field(default=SFT_PAIRS, ge=2, exclude_if=lambda n: n == SFT_PAIRS)
    """Pairs of the anchor, drawn at random; None: all. The flows take SFT's `max_pairs`, and the
    dump leaves it out like `interactions`."""
    dim: int | None = Field(default=None, ge=1, exclude_if=lambda n: n is None)
    """Numbers of a vector that candidates, scores, KL, anchor and watch see, the first ones; the
    flows take the index's. None: all."""
    std_floor: float = Field(default=1e-3, gt=0)
    """Groups whose reward std is below are skipped."""
    lr: float = Field(default=4e-5, gt=0)
    """Peak learning rate of AdamW, linear decay after `warmup_steps`."""
    warmup_steps: int = Field(default=4, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    val_queries: int = Field(default=256, ge=1)
    """Validation queries whose recall is watched (cheap: only embedded)."""
    val_reward_queries: int = Field(default=32, ge=1)
    """Validation queries whose results the judge reads, `recall_k` products each; rewards that ask
    no model are read on all `val_queries`."""
    order_products: int = Field(default=256, ge=0)
    """Labelled validation products, up to 8 a query, on which the rewards' order is compared with
    the encoder's: what Retrieval-GRPO could learn. 0 leaves it out."""
    guard: tuple[str, ...] = ("relevance", "quality")
    """Rewards whose validation mean may not fall below the start's beyond noise, where in use."""
    recall_k: int = Field(default=10, ge=1)
    """Cut-off of the watched recall and reward."""
    max_recall_loss: float = Field(default=0.0, ge=0)
    """Recall an encoder may lose against the start and still be chosen, absolute."""
    noise: float = Field(default=1.0, ge=0)
    """Standard errors of the paired difference to the start, of recall and of each guarded reward,
    that count as noise; 0 is strict, and on a few dozen validation queries refuses encoders that
    are better on test."""
    collapse_recall: float = Field(default=0.5, ge=0, le=1)
    """The run stops when recall falls below this share of the start."""
    collapse_spread: float = Field(default=0.2, ge=0, le=1)
    """The run stops when the spread of the product vectors falls below this share of the start."""
    max_tokens: int | None = Field(default=128, ge=8)
    """Longest text in training, in tokens; None: the encoder's own limit."""
    chunk: int | None = Field(default=None, ge=1)
    """Texts embedded at once with gradient, by gradient caching: memory for a second forward. None:
    all of a step."""
    bf16: bool = True
    """bf16 autocast."""
    seed: int = 0
