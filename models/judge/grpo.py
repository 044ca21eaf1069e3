"""GRPO with difficulty-based dynamic sampling and, if set, guided replay [TaoSR1 s3.3].

Consumes a judge (policy and frozen reference) and a pool of labelled pairs -> produces a judge.

A step takes the kept groups of the sampler (sampler.py) and makes one clipped policy-gradient step
with a KL term to the reference; guided responses (replay.py) are added as a loss of their own. Old
log-probs are those the sampler drew with, so the off-policy correction is always on.

Departures: the reward is rule-aware (rewards/judge_rules.py) unless `reward.shaped` is off;
advantages use the population standard deviation with a floor; a step whose refills never fill the
batch trains on what it has, and is counted.

Tensor legend: P responses of one part, T tokens.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from models.judge.config import GrpoConfig
from models.judge.groups import Member, old_logps, parts_of
from models.judge.prompt import PromptEncoder
from models.judge.replay import replay_update
from models.judge.sampler import GroupSampler
from models.judge.spec import JudgeSpec
from models.judge.trainer import JudgeTrainer, make_trainable, save_whole
from models.lm.shared_prefix import SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.objectives.kl import k3
from models.objectives.surrogate import clipped_surrogate, reduce_objective
from models.types import MetricSink, Pair


def train_grpo(
    base: str,
    spec: JudgeSpec,
    pool: Sequence[Pair],
    config: GrpoConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Train `base` by GRPO on `pool`; writes a transformers folder and difficulty.json to `out`.

    Raises:
        DivergenceError: a loss that is not finite.
    """
    lm, tokenizer = load_lm(base, device=device)
    encoder = PromptEncoder(tokenizer, spec)
    reference = None
    if config.beta > 0 and config.optimiser.lora is None:
        reference = SharedPrefixLM(copy.deepcopy(lm).eval(), bf16=config.optimiser.bf16)
        reference.requires_grad_(False)
    model = SharedPrefixLM(make_trainable(lm, config.optimiser), bf16=config.optimiser.bf16)
    sampler = GroupSampler(model, encoder, pool, config)

    def stage_loss(
        net: SharedPrefixLM, step: int
    ) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        def only(metrics: dict[str, float]) -> tuple[torch.Tensor, dict[str, float]]:
            return torch.zeros((), device=model.device, requires_grad=True), metrics

        started = time.monotonic()
        if step % config.inner_steps == 0:
            yield only(sampler.refresh())
        sampled = time.monotonic()
        yield from _update(net, reference, sampler, config)
        if sampler.replay is not None:
            yield from replay_update(net, sampler.replay, config)
        ended = time.monotonic()
        tokens = sum(len(m.ids) for m in sampler.members if m.counted)
        yield only(
            {
                "step_time": ended - started,
                "rollout_share": (sampled - started) / (ended - started),
                "update_tokens_per_s": tokens / (ended - sampled),
            }
        )

    trainer = JudgeTrainer(
        model,
        range(config.steps * config.inner_steps),
        stage_loss,
        stage="grpo",
        config=config.optimiser,
        accumulate=1,
        scratch=scratch,
        sink=sink,
        sampler_state=sampler,
    )
    trainer.run()
    save_whole(model.lm, tokenizer, out)
    spec.write(out)
    passes = sampler.pool.passes
    table = [
        {"query_id": p.query.query_id, "product_id": p.product.product_id, "pass_rates": passes[i]}
        for i, p in enumerate(pool)
        if i in passes
    ]
    (out / "difficulty.json").write_text(json.dumps(table))
    replayed = {} if sampler.replay is None else sampler.replay.totals
    return {
        "prompts_seen": len(passes),
        "pool_epochs": sampler.pool.epochs,
        **{f"replay/{name}": count for name, count in replayed.items()},
    }


def _update(
    model: SharedPrefixLM,
    reference: SharedPrefixLM | None,
    sampler: GroupSampler,
    config: GrpoConfig,
) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
    """-J over the kept groups, in parts that fit; the parts add up to the whole step's mean."""
    members = [m for m in sampler.members if m.counted]
    for part, share in parts_of(members, config):
        loss, metrics = _part_loss(model, reference, sampler, part, config)
        yield share * loss, metrics


def _part_loss(
    model: SharedPrefixLM,
    reference: SharedPrefixLM | None,
    sampler: GroupSampler,
    part: Sequence[Member],
    config: GrpoConfig,
) -> tuple[torch.Tensor, dict[str, float]]:
    tree = build_tree([(*sampler.prompts[m.prompt_index], m.ids) for m in part]).to(model.device)
    logps = model(tree, temperature=config.temperature, with_entropy=True)
    mask_PT = logps.mask_PT
    old_PT = old_logps(part, logps.logp_PT)
    advantage_P1 = torch.tensor([[m.advantage] for m in part], device=model.device)
    now_PT, then_PT = logps.logp_PT, old_PT
    if config.importance_sampling_level == "sequence":
        now_PT, then_PT = (_mean_everywhere(x_PT, mask_PT) for x_PT in (now_PT, then_PT))
    surrogate_PT, clipped_PT = clipped_surrogate(
        now_PT, then_PT, advantage_P1, config.clip_low, config.clip_high
    )
    low_PT = clipped_PT & (advantage_P1 < 0)
    gap_M = (logps.logp_PT - old_PT).detach()[mask_PT]
    assert logps.entropy_PT is not None
    metrics = {
        "clip_ratio/region_mean": clipped_PT[mask_PT].float().mean().item(),
        "clip_ratio/low_mean": low_PT[mask_PT].float().mean().item(),
        "clip_ratio/high_mean": (clipped_PT & ~low_PT)[mask_PT].float().mean().item(),
        "sampler_logp_gap": gap_M.abs().mean().item(),
        "entropy": logps.entropy_PT[mask_PT].mean().item(),
    }
    objective_PT = surrogate_PT
    if config.beta > 0:
        ref_PT = _reference_logps(model, reference, tree, config.temperature)
        kl_PT = k3(logps.logp_PT, ref_PT)
        metrics["kl"] = kl_PT[mask_PT].mean().item()
        objective_PT = surrogate_PT - config.beta * kl_PT
    loss = -reduce_objective(objective_PT, mask_PT, config.loss, config.max_new_tokens)
    return loss, metrics


def _mean_everywhere(logp_PT: torch.Tensor, mask_PT: torch.Tensor) -> torch.Tensor:
    """The mean over a response's tokens, at each of them: what GSPO takes ratios of."""
    mean_P1 = (logp_PT * mask_PT).sum(1, keepdim=True) / mask_PT.sum(1, keepdim=True).clamp(min=1)
    return mean_P1.expand_as(logp_PT)


@torch.no_grad()
def _reference_logps(
    model: SharedPrefixLM, reference: SharedPrefixLM | None, tree: Any, temperature: float
) -> torch.Tensor:
    """Log-probs under the stage's input: the frozen copy, or the policy with adapters off."""
    if reference is not None:
        return reference(tree, temperature=temperature).logp_PT
    inner: Any = getattr(model, "module", model)
    with inner.lm.disable_adapter():
        return inner(tree, temperature=temperature).logp_PT
