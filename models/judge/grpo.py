"""GRPO with difficulty-based dynamic sampling [TaoSR1 s3.3].

Consumes a judge (policy and frozen reference) and a pool of labelled pairs -> produces a judge.

A step takes fresh prompts from the class-balanced pool, samples a group of G responses each, keeps
the groups with 0 < #correct < gamma, refills until the batch is full (bounded), and takes one
clipped policy-gradient step with a KL term to the reference. Old log-probs are those the sampler
drew with, so the off-policy correction is always on.

Departures: gamma defaults to G, the paper's "minimal rejection"; the reward is rule-aware
(rewards/judge_rules.py) unless `reward.shaped` is off; advantages use the population standard
deviation with a floor; a step whose refills never fill the batch trains on what it has, and is
counted.

Tensor legend: P responses of one part, T tokens.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from models.judge.config import GrpoConfig
from models.judge.pool import PromptPool
from models.judge.prompt import PromptEncoder
from models.judge.spec import JudgeSpec
from models.judge.trainer import JudgeTrainer, make_trainable, save_whole
from models.lm.rollout import Rollout, sample
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.objectives.advantages import group_advantages
from models.objectives.kl import k3
from models.objectives.surrogate import (
    clipped_surrogate,
    reduce_dapo,
    reduce_dr_grpo,
    reduce_grpo,
)
from models.rewards.judge_rules import RewardParts, rule_reward
from models.rules.table import contradicts
from models.teacher.response import parse_response
from models.teacher.template import gold_verdicts
from models.types import MetricSink, Pair

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One response of a kept group, ready to train on."""

    prompt_index: int
    ids: tuple[int, ...]
    old_logps: tuple[float, ...]
    advantage: float
    counted: bool


class GroupSampler:
    """Rollouts, rewards, dynamic sampling; its state is what the checkpoint keeps."""

    def __init__(
        self,
        model: SharedPrefixLM,
        encoder: PromptEncoder,
        pool: Sequence[Pair],
        config: GrpoConfig,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.pairs = pool
        self.config = config
        self.pool = PromptPool(len(pool), config.optimiser.seed)
        self.generator = torch.Generator(device=model.device).manual_seed(config.optimiser.seed)
        self.members: list[Member] = []
        self.prompts: list[TokenPath] = [encoder.prompt(p.query, p.product) for p in pool]
        self.gold = [gold_verdicts(p) for p in pool]

    def refresh(self) -> dict[str, float]:
        """Fill `members` with kept groups for one step; returns what happened as metrics."""
        config, started = self.config, time.monotonic()
        gamma = config.gamma or config.group_size
        kept: list[Member] = []
        seen: list[tuple[float, RewardParts, Rollout, bool]] = []
        groups_kept = groups_seen = rounds = 0
        while groups_kept < config.prompts_per_step and rounds <= config.max_refills:
            indices = self.pool.take(config.prompts_per_step - groups_kept)
            for index, rollouts in zip(indices, self._sample(indices), strict=True):
                judged = [self._judge(index, r) for r in rollouts]
                seen += judged
                correct = sum(right for right, *_ in judged)
                self.pool.record(index, correct / len(judged))
                groups_seen += 1
                if 0 < correct < gamma:
                    members = self._members(index, judged)
                    groups_kept += bool(members)
                    kept += members
            rounds += 1
        self.members = kept
        return self._metrics(seen, groups_seen, groups_kept, rounds, time.monotonic() - started)

    def _sample(self, indices: Sequence[int]) -> list[list[Rollout]]:
        config = self.config
        return sample(
            self.model,
            [self.prompts[i] for i in indices],
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            end_id=self.encoder.end_id,
            generator=self.generator,
            temperature=config.temperature,
            top_k=config.top_k,
        )

    def _judge(self, index: int, rollout: Rollout) -> tuple[float, RewardParts, Rollout, bool]:
        text = self.encoder.decode(rollout.ids)
        response = parse_response(text, self.encoder.config.order, rollout.finished)
        grade = self.pairs[index].grade
        parts = rule_reward(response, grade, self.gold[index], self.config.reward)
        stated = response.grade is not None and response.verdicts is not None
        bad = stated and contradicts(response.grade, response.verdicts)  # type: ignore[arg-type]
        return float(response.grade == grade), parts, rollout, bool(bad)

    def _members(
        self, index: int, judged: Sequence[tuple[float, RewardParts, Rollout, bool]]
    ) -> list[Member]:
        """The group with advantages, or nothing when its rewards are all the same."""
        rewards_BG = torch.tensor([[parts.total for _, parts, _, _ in judged]])
        advantages_BG, kept_B = group_advantages(rewards_BG, floor=self.config.std_floor)
        if not bool(kept_B[0]):
            return []
        bound = self.config.max_advantage
        advantages = advantages_BG[0].clamp(-bound, bound).tolist()
        return [
            Member(index, r.ids, r.logps, a, r.finished or not self.config.mask_truncated)
            for a, (_, _, r, _) in zip(advantages, judged, strict=True)
        ]

    def _metrics(
        self,
        seen: Sequence[tuple[float, RewardParts, Rollout, bool]],
        groups_seen: int,
        groups_kept: int,
        rounds: int,
        seconds: float,
    ) -> dict[str, float]:
        size = self.config.group_size
        totals = torch.tensor([parts.total for _, parts, _, _ in seen]).view(-1, size)
        count = len(seen)
        out = {
            f"rewards/{f.name}/mean": sum(getattr(p, f.name) for _, p, _, _ in seen) / count
            for f in fields(RewardParts)
        }
        new_tokens = sum(len(r.ids) for _, _, r, _ in seen)
        return out | {
            "reward": totals.mean().item(),
            "reward_std": totals.std(1, correction=0).mean().item(),
            "frac_reward_zero_std": (totals.std(1, correction=0) < 1e-3).float().mean().item(),
            "accuracy": sum(right for right, *_ in seen) / count,
            "groups/kept_share": groups_kept / groups_seen,
            "groups/refill_rounds": rounds - 1,
            "groups/short": float(groups_kept < self.config.prompts_per_step),
            "contradiction_rate": sum(bad for *_, bad in seen) / count,
            "completions/mean_length": new_tokens / count,
            "completions/clipped_ratio": sum(not r.finished for _, _, r, _ in seen) / count,
            "rollout_tokens_per_s": new_tokens / max(seconds, 1e-9),
        }

    def state(self) -> dict[str, Any]:
        """Pool, generator and the current batch of rollouts."""
        return {
            "pool": self.pool.state(),
            "generator": self.generator.get_state().tolist(),
            "members": [asdict(m) for m in self.members],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.pool.restore(state["pool"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.members = [
            Member(**{**m, "ids": tuple(m["ids"]), "old_logps": tuple(m["old_logps"])})
            for m in state["members"]
        ]


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
        if step % config.inner_steps == 0:
            metrics = sampler.refresh()
            yield torch.zeros((), device=model.device, requires_grad=True), metrics
        yield from _update(net, reference, sampler, config)

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
    return {"prompts_seen": len(passes), "pool_epochs": sampler.pool.epochs}


def _update(
    model: SharedPrefixLM,
    reference: SharedPrefixLM | None,
    sampler: GroupSampler,
    config: GrpoConfig,
) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
    """-J over the kept groups, in parts that fit; the parts add up to the whole step's mean."""
    members = [m for m in sampler.members if m.counted]
    tokens = sum(len(m.ids) for m in members)
    for start in range(0, len(members), config.responses_at_once):
        part = members[start : start + config.responses_at_once]
        share = len(part) / len(members)
        if config.loss == "dapo":
            share = sum(len(m.ids) for m in part) / tokens
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
    old_PT = torch.zeros_like(logps.logp_PT)
    for row, member in enumerate(part):
        old_PT[row, : len(member.ids)] = torch.tensor(member.old_logps, device=model.device)
    advantage_P1 = torch.tensor([[m.advantage] for m in part], device=model.device)
    surrogate_PT, clipped_PT = clipped_surrogate(
        logps.logp_PT, old_PT, advantage_P1, config.clip_low, config.clip_high
    )
    metrics = {"clip_ratio": clipped_PT[mask_PT].float().mean().item()}
    ratio_PT = (logps.logp_PT - old_PT).detach()[mask_PT]
    metrics["sampler_logp_gap"] = ratio_PT.abs().mean().item()
    assert logps.entropy_PT is not None
    metrics["entropy"] = logps.entropy_PT[mask_PT].mean().item()
    objective_PT = surrogate_PT
    if config.beta > 0:
        ref_PT = _reference_logps(model, reference, tree, config.temperature)
        kl_PT = k3(logps.logp_PT, ref_PT)
        metrics["kl"] = kl_PT[mask_PT].mean().item()
        objective_PT = surrogate_PT - config.beta * kl_PT
    if config.loss == "dapo":
        return -reduce_dapo(objective_PT, mask_PT), metrics
    if config.loss == "dr_grpo":
        return -reduce_dr_grpo(objective_PT, mask_PT, config.max_new_tokens), metrics
    return -reduce_grpo(objective_PT, mask_PT), metrics


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
