"""Difficulty-based dynamic sampling [TaoSR1 s3.3].

Consumes the policy and the pool's prompts -> produces the members of one GRPO step, and the state
that the checkpoint keeps.

A step takes fresh prompts from the pool, samples a group of G responses each, keeps the groups of
the right difficulty and refills until the batch is full (bounded, reported). Pass rates of every
group go into the difficulty table. Groups at or below the accuracy threshold go on to guided replay
(replay.py), if that is on.

Departures: gamma defaults to G, the paper's "minimal rejection". Where the reward is shaped, a
group without a right grade (or with nothing but) still ranks its members, so it is kept when the
rewards' standard deviation is above the floor; a gamma that is given stays an upper bound.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from models.judge.config import GrpoConfig
from models.judge.groups import (
    GroupDraw,
    Judged,
    Member,
    group_members,
    response_metrics,
    share_correct,
)
from models.judge.pool import PromptPool
from models.judge.prompt import PromptEncoder
from models.judge.replay import GuidedReplay
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import SharedPrefixLM
from models.types import Pair

log = logging.getLogger(__name__)


COLLAPSED = 0.95
"""Share of one grade among a step's responses from which on a run is warned about."""


class GroupSampler:
    """Rollouts, rewards, dynamic sampling; its state is what the checkpoint keeps."""

    def __init__(
        self,
        model: SharedPrefixLM,
        encoder: PromptEncoder,
        pool: Sequence[Pair],
        config: GrpoConfig,
    ) -> None:
        self.draw = GroupDraw(model, encoder, pool, config)
        self.config = config
        self.pool = PromptPool(len(pool), config.optimiser.seed)
        self.generator = torch.Generator(device=model.device).manual_seed(config.optimiser.seed)
        self.members: list[Member] = []
        self.replay = GuidedReplay(self.draw, config.replay) if config.replay else None
        self.num_tokens = 0
        self._warned = False

    @property
    def prompts(self) -> list[TokenPath]:
        """The un-hinted prompt of every pair of the pool: what the policy is trained on."""
        return self.draw.prompts

    def refresh(self) -> dict[str, float]:
        """Fill `members` with kept groups for one step; returns what happened as metrics."""
        config, started = self.config, time.monotonic()
        kept: list[Member] = []
        groups: dict[int, list[Judged]] = {}
        kept_groups, seen, refilled, rounds = 0, 0, 0, 0
        every: list[Judged] = []
        while kept_groups < config.prompts_per_step and rounds <= config.max_refills:
            indices = self.pool.take(config.prompts_per_step - kept_groups, avoid=groups)
            if not indices:
                break  # every prompt of the pool has been asked in this step
            prompts = [self.prompts[i] for i in indices]
            drawn = self.draw.rollouts(prompts, config.group_size, self.generator)
            for index, rollouts in zip(indices, drawn, strict=True):
                judged = groups[index] = [self.draw.judge(index, r) for r in rollouts]
                every += judged
                length = sum(map(len, self.prompts[index]))
                self.num_tokens += sum(length + len(r.ids) for r in rollouts)
                self.pool.record(index, share_correct(judged))
                members = self._kept(index, judged)
                kept_groups += bool(members)
                kept += members
            seen += len(indices)
            refilled += len(indices) if rounds else 0
            rounds += 1
        self.members = kept
        out = self._metrics(every, time.monotonic() - started) | {
            "groups/kept_share": kept_groups / seen,
            "groups/refilled_share": refilled / seen,
            "groups/refill_rounds": rounds - 1,
            "groups/short": float(kept_groups < config.prompts_per_step),
        }
        self._warn_of_collapse(out["grades/largest_share"], len(every))
        if self.replay is None:
            return out
        guided = self.replay.refresh(groups)
        sampled = seen + guided["replay/groups_from_earlier"]
        return out | guided | {"groups/guided_share": guided["replay/groups"] / sampled}

    def _warn_of_collapse(self, share: float, count: int) -> None:
        """Say once a run that `share` of `count` responses state one grade, whatever is asked."""
        if share < COLLAPSED or self._warned:
            return
        self._warned = True
        log.warning(
            "grpo: %.0f %% of %d responses state one grade: it pays whatever is asked, as where "
            "most honest responses contradict themselves and the gate takes their reward. Lower "
            "judge.grpo.optimiser.lr, raise beta, or teach the steps longer (judge.sft)",
            100 * share,
            count,
        )

    def _kept(self, index: int, judged: Sequence[Judged]) -> list[Member]:
        """The group with advantages, or nothing when it is of the wrong difficulty.

        0 < #correct < gamma, or the std of the rewards is above the floor (`keep_spread`)
        [TaoSR1 s3.3]; a group whose rewards are all the same, or whose responses are all truncated
        and masked, has no gradient and is never kept.
        """
        config = self.config
        correct = sum(j.correct for j in judged)
        if config.spread_kept:
            right = config.gamma is None or correct < config.gamma
        else:
            right = 0 < correct < (config.gamma or config.group_size)
        return group_members(index, judged, config) if right else []

    def _metrics(self, every: Sequence[Judged], seconds: float) -> dict[str, float]:
        totals = torch.tensor([j.parts.total for j in every]).view(-1, self.config.group_size)
        new_tokens = sum(len(j.rollout.ids) for j in every)
        std = totals.std(1, correction=0)
        return response_metrics(every) | {
            "reward": totals.mean().item(),
            "reward_std": std.mean().item(),
            "frac_reward_zero_std": (std < self.config.std_floor).float().mean().item(),
            "num_tokens": self.num_tokens,
            "rollout_tokens_per_s": new_tokens / max(seconds, 1e-9),
        }

    def state(self) -> dict[str, Any]:
        """Pool, generator, the current batch of rollouts and the replay buffer."""
        return {
            "pool": self.pool.state(),
            "generator": self.generator.get_state().tolist(),
            "members": [asdict(m) for m in self.members],
            "num_tokens": self.num_tokens,
            "replay": None if self.replay is None else self.replay.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.pool.restore(state["pool"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.members = [Member.from_state(m) for m in state["members"]]
        self.num_tokens = state["num_tokens"]
        if self.replay is not None:
            self.replay.restore(state["replay"])
