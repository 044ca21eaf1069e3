"""Recipes: every setting of a run, as frozen values that Prefect shows as forms.

A recipe is a function from a store's name to a PipelineConfig. Variants are `--set key=value` on
the command line or `with_settings` here; nothing else changes a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from models.embedder.config import (
    ContrastiveConfig,
    EncoderConfig,
    HardNegativeConfig,
    MiningConfig,
    RetrievalGRPOConfig,
)
from models.errors import ConfigError, explain
from models.evaluation.gate import GateConfig
from models.evaluation.monitor import MonitorConfig
from models.index.config import IndexConfig, RefreshConfig
from models.judge.config import (
    CrossEncoderConfig,
    DpoConfig,
    GrpoConfig,
    OptimiserConfig,
    PassAtNConfig,
    PoolConfig,
    ProbeConfig,
    PromptConfig,
    ReplayConfig,
    SamplesConfig,
    SftConfig,
)
from models.sources import SourceConfig, SyntheticSource, TablesSource
from models.split import SplitConfig
from models.teacher.config import TeacherConfig, TemplateTeacher
from tasks.ablation import JudgeAblationConfig
from tasks.base import TINY
from tasks.embedder import RewardsConfig
from tasks.evaluate import RetrievalEvalConfig
from tasks.judge import AnswersConfig, CalibrationConfig
from tasks.quality import QualityConfig

STORES = ("synthetic", "homedepot", "chorus", "esci", "wands", "tables")
RULES = {"synthetic": "synthetic", "homedepot": "homedepot"}
"""Rule base of a store; the others use `default`."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(_Config):
    """Ingest, validation and split."""

    source: SourceConfig = SyntheticSource()
    """Where the store comes from."""
    split: SplitConfig = SplitConfig()
    quality: QualityConfig = QualityConfig()


class JudgeConfig(_Config):
    """The judge's stages, in order."""

    base: str
    """Base model: a packaged name, a local folder, a hub id, or `tiny`."""
    prompt: PromptConfig = PromptConfig()
    teacher: TeacherConfig = TemplateTeacher()
    """Who writes the reasoning that SFT learns: the offline template, or a chat endpoint."""
    sft: SftConfig = SftConfig()
    probe: ProbeConfig | None = None
    """Fit the grade rows after SFT; None, the paper, leaves them as they are."""
    pass_at_n: PassAtNConfig = PassAtNConfig()
    dpo: DpoConfig = DpoConfig()
    grpo: GrpoConfig = GrpoConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    answers: AnswersConfig = AnswersConfig()

    @model_validator(mode="after")
    def _grade_comes_first(self) -> JudgeConfig:
        thinks_first = self.prompt.order == "think_then_respond"
        if thinks_first and (self.sft.cot_share < 1 or self.probe is not None):
            raise ValueError("think_then_respond needs sft.cot_share=1 and probe=null")
        return self


class EmbedderConfig(_Config):
    """The retriever's stages, in order."""

    base: str
    """Base encoder: a packaged name, a local folder, a hub id, or `tiny`."""
    encoder: EncoderConfig | None = None
    """Pooling and prompts for a base that has none of its own, e.g. a decoder LLM."""
    sft: ContrastiveConfig = ContrastiveConfig()
    rgrpo: RetrievalGRPOConfig = RetrievalGRPOConfig()
    rewards: RewardsConfig = RewardsConfig()
    mining: MiningConfig = MiningConfig()
    """Hard negatives, for the two rows of `relearn ablate retriever` that need them."""
    hard: HardNegativeConfig = HardNegativeConfig()
    """Training on them; those two rows differ in its `loss`."""
    index: IndexConfig = IndexConfig()
    evaluation: RetrievalEvalConfig = RetrievalEvalConfig()

    def in_step(self) -> EmbedderConfig:
        """Stages after SFT with its positives (its events or none, as many pairs), on vectors of
        the width that the index serves."""
        events = {"interactions": self.sft.interactions}
        served = {"dim": self.index.dim}
        anchor = {"anchor_pairs": self.sft.max_pairs}
        stages = {
            "rgrpo": self.rgrpo.model_copy(update=events | served | anchor),
            "mining": self.mining.model_copy(update=events),
            "hard": self.hard.model_copy(update=events | served),
        }
        return self.model_copy(update=stages)


class PipelineConfig(_Config):
    """One run of the whole chain."""

    name: str = Field(min_length=1, pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The store's name: MLflow experiment, and prefix of the registered models."""
    data: DataConfig
    judge: JudgeConfig
    embedder: EmbedderConfig
    gate: GateConfig = GateConfig()
    """What a candidate must reach to become champion."""
    ablation: JudgeAblationConfig = JudgeAblationConfig()
    """Read by `relearn ablate judge` alone."""
    monitor: MonitorConfig = MonitorConfig()
    """How far today's data may move from the champions' before something is run."""
    refresh: RefreshConfig = RefreshConfig()
    """Read by `relearn refresh` and the deployment `refresh-index` alone."""


SMALL_QUERIES = 1200
"""Queries of the synthetic store in `small`: 234 of them are test queries and tell rows of a table
apart, which the 77 of the source's own 360 do not."""

DELTA_KEYS = (
    *(f"refresh.{name}" for name in RefreshConfig.model_fields if name != "max_deleted"),
    "data.source.encoding",
)
"""Settings that `relearn refresh` reads."""


def _source(store: str) -> Any:
    if store not in STORES:
        raise ConfigError(explain(f"store {store!r}", f"one of {', '.join(STORES)}", "fix --store"))
    return TypeAdapter(SourceConfig).validate_python({"kind": store})


def _prompt(store: str) -> PromptConfig:
    return PromptConfig(rules=RULES.get(store, "default"))


def small(store: str = "synthetic") -> PipelineConfig:
    """SmolLM2-135M-Instruct and all-MiniLM-L6-v2 on two CPU cores: a coffee break.

    Labels that people gave are noisier than generated ones: other stores probe more pairs, and
    smooth their labels more.
    """
    top = OptimiserConfig(lr=2.5e-4, train_layers=10, checkpoint_every=25)
    # ten steps at 5e-6 moved the features away from under the grade rows (infra/LOG.md)
    gentle = top.model_copy(update={"lr": 3e-6, "schedule": "constant_with_warmup"})
    sft_pairs = 400
    probe = ProbeConfig(max_pairs=800)
    source = _source(store)
    if store == "synthetic":
        source = SyntheticSource(num_queries=SMALL_QUERIES)
    else:
        probe = ProbeConfig(max_pairs=1200, smoothing=0.85)
    return PipelineConfig(
        name=store,
        data=DataConfig(source=source),
        judge=JudgeConfig(
            base="smollm2-135m-instruct",
            prompt=_prompt(store),
            sft=SftConfig(
                optimiser=top,
                max_pairs=sft_pairs,
                grade_share=0.25,
                verdict_share=0.3,
                micro_batch=8,
                accumulate=1,
            ),
            probe=probe,
            pass_at_n=PassAtNConfig(prompts=32, samples=4, max_new_tokens=56),
            dpo=DpoConfig(
                optimiser=gentle.model_copy(update={"lr": 2e-6}), micro_batch=6, accumulate=1
            ),
            grpo=GrpoConfig(
                optimiser=gentle.model_copy(update={"checkpoint_every": 1}),  # a step is minutes
                pool=PoolConfig(candidates=72, size=36),
                steps=3,
                prompts_per_step=4,
                group_size=4,
                max_new_tokens=56,
                max_refills=1,
                responses_at_once=16,
            ),
            calibration=CalibrationConfig(max_pairs=280),
            answers=AnswersConfig(max_pairs=160, reasoning_pairs=24, max_new_tokens=56),
        ),
        embedder=EmbedderConfig(
            base="all-minilm-l6-v2",
            sft=ContrastiveConfig(steps=32, max_tokens=64),
            rgrpo=RetrievalGRPOConfig(
                steps=32,
                inner_steps=2,  # as good as fresh batches, and the judge reads half as much
                lr=8e-5,
                refresh_every=8,
                k=10,
                max_queries=128,
                pool_size=1200,
                val_reward_queries=24,
                max_tokens=64,
            ),
            mining=MiningConfig(max_queries=128, depth=10),
            hard=HardNegativeConfig(steps=32, lr=8e-5, max_tokens=64),
            evaluation=RetrievalEvalConfig(judged_queries=24),
        ),
        ablation=JudgeAblationConfig(
            cross_encoder=CrossEncoderConfig(max_pairs=sft_pairs + probe.max_pairs),
            samples=SamplesConfig(prompts=32, max_new_tokens=56),
        ),
    )


def smoke(store: str = "synthetic") -> PipelineConfig:
    """Tiny random models on a tiny store: every stage, no learning to speak of."""
    source = _source(store)
    if store == "synthetic":
        source = SyntheticSource(num_products=300, num_queries=72, judgments_per_query=10)
    fast = OptimiserConfig(lr=3e-3, bf16=False, checkpoint_every=20)
    gentle = fast.model_copy(update={"lr": 1e-4})
    return PipelineConfig(
        name=f"{store}-smoke",
        data=DataConfig(source=source),
        judge=JudgeConfig(
            base="tiny",
            prompt=_prompt(store).model_copy(update={"max_thought_tokens": 96}),
            sft=SftConfig(
                optimiser=fast,
                max_pairs=400,
                epochs=4,
                grade_share=None,
            ),
            probe=ProbeConfig(max_pairs=64, bf16=False),
            pass_at_n=PassAtNConfig(prompts=24, samples=4, max_new_tokens=96),
            dpo=DpoConfig(optimiser=gentle),
            grpo=GrpoConfig(
                optimiser=gentle.model_copy(update={"checkpoint_every": 1}),
                pool=PoolConfig(candidates=60, size=32),
                steps=3,
                prompts_per_step=4,
                group_size=4,
                max_new_tokens=96,
                max_refills=1,
                replay=ReplayConfig(prompts_per_step=2),
            ),
            answers=AnswersConfig(max_pairs=100, reasoning_pairs=16, max_new_tokens=96),
        ),
        embedder=EmbedderConfig(
            base="tiny",
            sft=ContrastiveConfig(steps=20, batch_size=16, global_negatives=16, lr=1e-3),
            rgrpo=RetrievalGRPOConfig(steps=6, refresh_every=3, max_queries=16, k=8),
            mining=MiningConfig(max_queries=16, depth=8, max_good=1.0),
            hard=HardNegativeConfig(steps=6, batch_size=8),
            evaluation=RetrievalEvalConfig(judged_queries=8),
        ),
        ablation=JudgeAblationConfig(
            cross_encoder=CrossEncoderConfig(base=TINY, max_pairs=400, lr=3e-3),
            samples=SamplesConfig(prompts=16, max_new_tokens=96),
        ),
        gate=GateConfig(min_kappa=-1.0),  # a judge of random weights is to teach all the same
    )


def full(store: str = "synthetic") -> PipelineConfig:
    """Qwen3-4B and Qwen3-Embedding-0.6B in bf16 on a GPU; the same code path, larger numbers."""
    budget = OptimiserConfig(lr=1e-5, checkpoint_every=100)
    return PipelineConfig(
        name=store,
        data=DataConfig(source=_source(store)),
        judge=JudgeConfig(
            base="Qwen/Qwen3-4B",
            prompt=_prompt(store).model_copy(
                update={"max_item_chars": 800, "evidence": False, "max_thought_tokens": 256}
            ),
            sft=SftConfig(
                optimiser=budget,
                max_pairs=50_000,
                balance=0.5,
                grade_share=None,
                micro_batch=32,
            ),
            pass_at_n=PassAtNConfig(prompts=4000, max_new_tokens=256),
            dpo=DpoConfig(optimiser=budget.model_copy(update={"lr": 1e-6}), micro_batch=16),
            grpo=GrpoConfig(
                optimiser=GrpoConfig().optimiser.model_copy(update={"checkpoint_every": 25}),
                pool=PoolConfig(candidates=20_000, size=4000),
                steps=200,
                prompts_per_step=64,
                group_size=16,
                max_new_tokens=256,
                responses_at_once=16,  # logits of 16 x 256 tokens, 150,000 words: 2.5 GB
                rollouts_at_once=512,
                replay=ReplayConfig(prompts_per_step=32, capacity=512),
            ),
            calibration=CalibrationConfig(max_pairs=5000),
            answers=AnswersConfig(max_pairs=5000, reasoning_pairs=500, max_new_tokens=256),
        ),
        embedder=EmbedderConfig(
            base="Qwen/Qwen3-Embedding-0.6B",
            sft=ContrastiveConfig(
                steps=None,
                epochs=1,
                batch_size=512,
                global_negatives=1024,
                chunk=64,
                max_pairs=None,
            ),
            rgrpo=RetrievalGRPOConfig(
                steps=500, batch_queries=64, k=64, max_queries=None, pool_size=None, chunk=64
            ),
            mining=MiningConfig(max_queries=None, depth=64),
            hard=HardNegativeConfig(steps=500, batch_size=64),
            evaluation=RetrievalEvalConfig(judged_queries=500),
        ),
        ablation=JudgeAblationConfig(
            cross_encoder=CrossEncoderConfig(max_pairs=50_000, batch_size=64),
            samples=SamplesConfig(prompts=500, max_new_tokens=256),
        ),
    )


RECIPES: dict[str, Callable[[str], PipelineConfig]] = {
    "smoke": smoke,
    "small": small,
    "full": full,
}


def recipe(name: str, store: str, changes: Sequence[str] = ()) -> PipelineConfig:
    """The recipe `name` for `store` with `key=value` changes on top.

    Raises:
        ConfigError: an unknown recipe, store or key, or a value its field refuses.
    """
    if name not in RECIPES:
        raise ConfigError(explain(f"recipe {name!r}", f"one of {', '.join(RECIPES)}", "fix it"))
    return with_settings(RECIPES[name](store), changes)


def with_settings(config: PipelineConfig, changes: Sequence[str]) -> PipelineConfig:
    """`config` with dotted `key=value` changes; values are JSON, bare words are text.

    >>> with_settings(small(), ["judge.dpo.beta=0.2"]).judge.dpo.beta
    0.2
    """
    body = config.model_dump(mode="json")
    for change in changes:
        key, found, value = change.partition("=")
        if not found:
            raise ConfigError(
                explain(f"--set {change!r}", "key=value", "write e.g. judge.dpo.beta=0.2")
            )
        *path, leaf = key.strip().split(".")
        node: Any = body
        for part in path:
            node = node[part] if isinstance(node, dict) and part in node else None
        if not isinstance(node, dict) or leaf not in node:
            raise ConfigError(explain(f"--set key {key!r}", _nearest(body, path), "fix the key"))
        node[leaf] = _value(key, value)
    try:
        return PipelineConfig.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if isinstance(said := first.get("ctx", {}).get("error"), ConfigError):
            raise said from None
        where = _place(body, first["loc"])
        raise ConfigError(
            explain(f"{where} = {first['input']!r}", first["msg"].lower(), "change --set")
        ) from None


def delta_settings(changes: Sequence[str]) -> tuple[RefreshConfig, str]:
    """How a products delta is applied, and the encoding of its CSV: of `relearn run`'s settings
    those that `relearn refresh` reads, with `key=value` changes.

    >>> delta_settings(["refresh.keep=5", "data.source.encoding=latin-1"])[1]
    'latin-1'

    Raises:
        ConfigError: a key that it does not read, or a value its field refuses.
    """
    for change in changes:
        key = change.partition("=")[0].strip()
        if key in DELTA_KEYS:
            continue
        do = "fix the key, or leave it out"
        if key == "refresh.max_deleted":
            do = "leave it out: a delta names what it deletes, so nothing limits it"
        known = f"what a delta is applied with: one of {', '.join(DELTA_KEYS)}"
        raise ConfigError(explain(f"--set key {key!r}", known, do))
    config = with_settings(small("tables"), changes)
    return config.refresh, csv_encoding(config.data.source)


def csv_encoding(source: SourceConfig) -> str:
    """Encoding of the CSV files of a store's owner; published data sets come without any."""
    return source.encoding if isinstance(source, TablesSource) else "utf-8"


def _value(key: str, text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] in ("{", "["):
            got = f"--set {key.strip()}={text}, which is no JSON ({error})"
            raise ConfigError(
                explain(got, "JSON", "put names and texts in double quotes")
            ) from None
        return text


def _place(body: Any, loc: Sequence[Any]) -> str:
    """The key of a setting from pydantic's place, which names the variant of a union as well."""
    node, parts = body, []
    for at, part in enumerate(loc):
        last = at == len(loc) - 1
        if "[" in str(part) or (isinstance(node, dict) and part not in node and not last):
            continue
        parts.append(str(part))
        node = node.get(part) if isinstance(node, dict) else None
    return ".".join(parts)


def _nearest(body: Any, path: Sequence[str]) -> str:
    """The keys at the deepest part of `path` that exists."""
    node, known = body, []
    for part in path:
        if not isinstance(node, dict) or not isinstance(node.get(part), dict):
            break
        node = node[part]
        known.append(part)
    prefix = ".".join(known)
    return f"one of {', '.join(sorted(node))}" + (f" under {prefix}" if prefix else "")
