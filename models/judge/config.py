"""Every setting of the judge's stages, importable without torch.

One place rather than beside each stage, so that flows deploy and show their forms on a machine that
has no torch. Defaults are the paper's value with its tag, or ours with the reason.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.rewards.config import RuleRewardConfig
from models.teacher.response import Order


class PromptConfig(BaseModel):
    """What the judge reads and in which format it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rules: str = "default"
    """Rule base: a name in models/rules or a path to your own .json."""
    evidence: bool = True
    """Add the found / missing / excluded / price lines (ours; small judges need them)."""
    max_item_chars: int = Field(220, ge=1)
    """Longest product line, in characters."""
    max_query_chars: int = Field(160, ge=1)
    """Longest query, in characters."""
    order: Order = "respond_then_think"
    """post-CoT ships; think-then-respond is the paper's ablation [TaoSR1 s3.1]; label_only states
    the grade and no steps."""
    max_thought_tokens: int = Field(64, ge=1)
    """think_then_respond: longest reasoning decoded before the grade is read."""


class CrossEncoderConfig(BaseModel):
    """The fine-tuned encoder that the judge has to beat: the BERT row of TaoSR1."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str = "all-minilm-l6-v2"
    """Encoder with a fresh head of four grades: a packaged name, a folder, a hub id, or `tiny`."""
    max_pairs: int = Field(2000, ge=1)
    """Training pairs, class-balanced as for SFT."""
    balance: float = Field(1.0, ge=0, le=1)
    """As in SFT: 1 equal counts a grade, 0 the natural mix."""
    epochs: int = Field(4, ge=1)
    batch_size: int = Field(16, ge=1)
    """Pairs in one optimiser step."""
    max_steps: int | None = Field(None, ge=1)
    """Optimiser steps at most; None: all epochs."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate, linear to 0 after a tenth of warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    evidence: bool = False
    """Read the judge's evidence and estimate too; the paper's BERT reads query and item."""
    max_tokens: int = Field(192, ge=16)
    """Query, item and evidence together; the item's end is cut."""
    checkpoint_every: int = Field(50, ge=1)
    """Optimiser steps between checkpoints."""
    seed: int = 0
    """Of the head, the draw and the order."""


class SamplesConfig(BaseModel):
    """Responses sampled on held-out pairs for pass@k."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompts: int = Field(64, ge=1)
    """Test pairs, the first of those that are scored."""
    samples: int = Field(5, ge=2)
    """Responses a pair; pass@1..samples is reported."""
    temperature: float = Field(1.0, gt=0)
    max_new_tokens: int = Field(64, ge=1)
    seed: int = 0


class LoraSettings(BaseModel):
    """Low-rank adapters on every linear layer (peft)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: int = Field(32, ge=1)
    """Scale numerator: updates are multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Adapter dropout; 0 keeps the shared-prefix forward equal to the plain one."""


class OptimiserConfig(BaseModel):
    """How a judge stage steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lr: float = Field(1e-4, gt=0)
    """Peak learning rate. 1e-4 whole-model learned on real pairs where LoRA did not (ours)."""
    warmup_share: float = Field(0.1, ge=0, lt=1)
    """Share of the steps spent warming up."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    lora: LoraSettings | None = None
    """None trains the weights themselves, not adapters. Not together with `train_layers`."""
    train_layers: int | None = Field(None, ge=1)
    """Train only the last n transformer layers and the final norm; None trains all of them and the
    embeddings. The layers below need no backward pass: 12 of 30 is 1.7 times faster on a CPU."""
    bf16: bool = True
    """Autocast the backbone to bf16; master weights and optimiser stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, and prompts are no
    longer shared while training, as recomputing drops their caches."""
    checkpoint_every: int = Field(20, ge=1)
    """Optimiser steps between checkpoints."""
    seed: int = 0

    @model_validator(mode="after")
    def _one_way_to_train_a_part(self) -> OptimiserConfig:
        if self.lora is not None and self.train_layers is not None:
            raise ValueError("lora adapts every layer: set train_layers=null, or lora=null")
        return self


class ProbeConfig(BaseModel):
    """Linear probe after SFT: grade rows of the output layer where the features now are (ours)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_pairs: int = Field(1000, ge=1)
    """Training pairs read once, class-balanced; those that SFT did not train on come first."""
    smoothing: float = Field(0.7, ge=0, le=1)
    """Share of a pair's target that is what the words' estimate says of its grade; 0: labels alone.
    A label is one draw and noisy; the estimate has read every labelled pair."""
    l2: float = Field(1e-3, ge=0)
    """Weight of the squared norm of the probe, its features scaled to a mean square of one."""
    quiet: float = Field(0.02, ge=0)
    """Weight of the mean squared logit that the moved rows add where no grade is due."""
    bf16: bool = True
    """Read the features in bf16 where the device has it, as scoring does."""


class DrawConfig(BaseModel):
    """What decides which pairs CoT SFT trains on, and which of them with steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_pairs: int = Field(ge=1)
    epochs: int = Field(ge=1)
    balance: float = Field(ge=0, le=1)
    cot_share: float = Field(ge=0, le=1)
    seed: int


class SftConfig(BaseModel):
    """CoT SFT."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    optimiser: OptimiserConfig = OptimiserConfig()
    max_pairs: int = Field(2000, ge=1)
    """Pairs trained on, one epoch each."""
    epochs: int = Field(1, ge=1)
    balance: float = Field(1.0, ge=0, le=1)
    """1: equal counts a grade; 0: the natural mix; between: count ** (1 - balance)."""
    cot_share: float = Field(1.0, ge=0, le=1)
    """Share of the pairs that carry the steps; the others teach the grade alone. 1 is the paper."""
    grade_share: float | None = Field(0.4, ge=0, le=1)
    """Weight of the grade token's mean in the loss; None: one plain mean, as in the paper."""
    verdict_share: float = Field(0.4, ge=0, le=1)
    """Weight of the verdict words' mean (match, yes, no, the decision). The other step tokens,
    mostly copied from the prompt, have what is left. A plain mean gives the verdicts an eighth of
    the steps' gradient. Ours."""
    micro_batch: int = Field(16, ge=1)
    """Pairs in one forward."""
    accumulate: int = Field(2, ge=1)
    """Forwards in one optimiser step."""

    @model_validator(mode="after")
    def _shares_fit(self) -> SftConfig:
        if self.grade_share is not None and self.grade_share + self.verdict_share > 1:
            raise ValueError("grade_share + verdict_share must not exceed 1")
        return self

    @property
    def draw(self) -> DrawConfig:
        """The part a teacher's data set depends on: it outlives another learning rate."""
        return DrawConfig(
            max_pairs=self.max_pairs,
            epochs=self.epochs,
            balance=self.balance,
            cot_share=self.cot_share,
            seed=self.optimiser.seed,
        )


class PromptDraw(BaseModel):
    """What decides which training pairs are prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    count: int = Field(ge=1)
    balance: float = Field(ge=0, le=1)
    seed: int


class PassAtNConfig(BaseModel):
    """Sampling for preference pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompts: int = Field(128, ge=1)
    """Training pairs sampled from, class-balanced; those that SFT did not train on first."""
    samples: int = Field(5, ge=2)
    """N; the paper reports pass@1..5."""
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """0 keeps the whole distribution."""
    max_new_tokens: int = Field(64, ge=1)
    pairs_per_prompt: int = Field(2, ge=1)
    seed: int = 0

    @property
    def draw(self) -> PromptDraw:
        """The part that a teacher's answers for them depend on."""
        return PromptDraw(count=self.prompts, balance=1.0, seed=self.seed)


class DpoConfig(BaseModel):
    """DPO."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    optimiser: OptimiserConfig = OptimiserConfig(lr=5e-6)
    beta: float = Field(0.1, gt=0)
    """The paper is silent; 0.1 is the field's default."""
    kind: Literal["sigmoid", "ipo", "robust"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences, for kind="robust"."""
    sft_weight: float = Field(0.2, ge=0)
    """Weight of the chosen responses' mean NLL."""
    epochs: int = Field(1, ge=1)
    micro_batch: int = Field(8, ge=1)
    """Preference pairs in one forward."""
    accumulate: int = Field(2, ge=1)


class PoolConfig(BaseModel):
    """Which pairs GRPO may train on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    candidates: int = Field(600, ge=1)
    """Training pairs scored for the pool; those that SFT did not train on first."""
    size: int = Field(200, ge=1)
    """Pairs kept; the paper's best recipe uses the least data."""
    max_confidence: float | None = Field(0.7, gt=0, le=1)
    """Pairs the input judge is at least this sure of are left out, unless those below are too few;
    then the least sure come first [TaoSR1 s3.3, sister paper]. None: the pool is drawn at random
    and the input judge scores nothing."""
    balanced: bool = True
    """Equal counts a grade (CV of the label counts = 0) [TaoSR1 s3.3]."""


class ReplayConfig(BaseModel):
    """Adaptive guided replay [TaoSR-AGRL s3.agr]. The paper prints no number: all are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    guidance: Literal["hint", "prefix"] = "hint"
    """hint: the gold step verdicts stand in the sampler's prompt. prefix: the response is made to
    begin with the offline template's, whoever taught SFT, and those tokens are not trained on; in
    respond_then_think the first of them is the grade, so prefixes teach that order its steps
    only."""
    max_accuracy: float = Field(0.125, ge=0, lt=1)
    """Groups with at most this share of right grades enter the buffer: one of eight. A group with
    more teaches itself."""
    fade_accuracy: float = Field(0.5, gt=0, le=1)
    """Un-hinted accuracy at which guidance has faded to none and a prompt leaves the buffer; half
    is where a group's own contrast is largest."""
    guided_share: float = Field(0.5, gt=0, lt=1)
    """Share of a replayed group that is guided at accuracy 0; the un-hinted rest is the contrast
    that advantages are measured against."""
    prompts_per_step: int = Field(4, ge=1)
    """Prompts replayed a step: half of GRPO's, so that guidance stays the smaller stream."""
    capacity: int = Field(64, ge=1)
    """Prompts the buffer holds; the least needy, then the latest, go first."""
    max_tries: int = Field(4, ge=1)
    """Replays before a prompt is given up for good: a label that guidance cannot reach may be
    wrong."""
    weight: float = Field(1.0, ge=0)
    """Weight of the replay loss; its ratios are mostly far below one, so it is the smaller stream
    at 1. 0 measures guidance and trains as if there were none."""
    max_ratio: float = Field(1.0, gt=0)
    """c of min(c, ratio): at 1 a guided token never weighs more than one of the policy's own."""
    prefix_share: float = Field(0.5, gt=0, lt=1)
    """guidance="prefix": share of the template's response forced at first."""
    prefix_step: float = Field(0.25, gt=0, lt=1)
    """Added to that share when the guided responses fail, taken off when they succeed."""

    @model_validator(mode="after")
    def _fades_above_the_threshold(self) -> ReplayConfig:
        if self.max_accuracy >= self.fade_accuracy:
            raise ValueError("max_accuracy must lie below fade_accuracy: guidance fades upwards")
        return self


class GrpoConfig(BaseModel):
    """GRPO and its sampling."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    optimiser: OptimiserConfig = OptimiserConfig(
        lr=1e-6, schedule="constant_with_warmup", checkpoint_every=5
    )
    """lr 1e-6 for a whole-model fine-tune [TaoSR1 s3.3, sister paper]."""
    pool: PoolConfig = PoolConfig()
    reward: RuleRewardConfig = RuleRewardConfig()
    steps: int = Field(20, ge=1)
    prompts_per_step: int = Field(8, ge=1)
    group_size: int = Field(8, ge=2)
    """G; the sister paper uses 16."""
    gamma: int | None = Field(None, ge=2)
    """Groups with 0 < #correct < gamma are kept; None is G."""
    keep_spread: bool | None = None
    """Keep groups that are all wrong (or, without a gamma, all right) too, where their rewards'
    std is above `std_floor`. None: where the reward is shaped [TaoSR1 s3.3, ours]."""
    max_refills: int = Field(2, ge=0)
    """Rounds of fresh prompts a step may draw to fill its batch."""
    inner_steps: int = Field(1, ge=1)
    """Optimiser steps on one batch of rollouts."""
    temperature: float = Field(0.99, gt=0)
    """[TaoSR1 s3.3, sister paper]"""
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(64, ge=1)
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    scale_rewards: Literal["group", "none"] = "group"
    """What advantages are divided by: a group's std [TaoSR1 s3.3], or nothing, which Dr. GRPO asks
    for beside its loss."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whose ratio is clipped: a token's [TaoSR1 s3.3], or a response's, the geometric mean over its
    tokens (GSPO, which wants clips of about 3e-4). Guided replay truncates a token's ratio
    either way."""
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    """0.28 is DAPO's clip-higher."""
    beta: float = Field(0.02, ge=0)
    """KL weight; 0 keeps no reference."""
    std_floor: float = Field(1e-3, gt=0)
    max_advantage: float = Field(2.0, gt=0)
    mask_truncated: bool = True
    """Leave responses that hit max_new_tokens out of the loss altogether."""
    responses_at_once: int = Field(32, ge=1)
    """Responses in one forward of the update."""
    rollouts_at_once: int = Field(64, ge=1)
    """Responses decoded together, whole groups of them."""
    replay: ReplayConfig | None = None
    """Adaptive guided replay; None is TaoSR1's plain GRPO."""

    @property
    def spread_kept(self) -> bool:
        """`keep_spread`, resolved."""
        return self.reward.shaped if self.keep_spread is None else self.keep_spread
