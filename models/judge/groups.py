"""A prompt's sampled responses, read and rewarded: what plain sampling and guided replay share.

Consumes prompts and labelled pairs -> produces judged responses and, from a group of them, members
to train on. Every response gets a defined reward: an empty one 0, a truncated or malformed one what
its readable parts earn, 0 where its verdicts are not among them (rewards/judge_rules.py), and the
three kinds are counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from models.judge.config import GrpoConfig
from models.judge.prompt import PromptEncoder
from models.lm.rollout import Rollout, sample
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import Segment, SharedPrefixLM
from models.objectives.advantages import group_advantages
from models.rewards.judge_rules import RewardParts, rule_reward
from models.teacher.response import ParseOutcome, Response, contradiction_rate, parse_response
from models.teacher.template import gold_verdicts
from models.types import Pair


@dataclass(frozen=True)
class Judged:
    """One sampled response, read: what it states, its reward, and whether its grade is gold."""

    rollout: Rollout
    response: Response
    parts: RewardParts
    correct: bool

    @property
    def sound(self) -> bool:
        """The gold grade, well formed, and in agreement with its own verdicts."""
        return self.correct and self.response.sound


@dataclass(frozen=True)
class Member:
    """One response ready to train on. `forced`: what it was made to begin with, not trained on."""

    prompt_index: int
    ids: tuple[int, ...]
    old_logps: tuple[float, ...]
    advantage: float
    counted: bool
    forced: tuple[int, ...] = ()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Member:
        """Inverse of `dataclasses.asdict` through JSON."""
        lists = {k: tuple(state[k]) for k in ("ids", "old_logps", "forced")}
        return cls(**{**state, **lists})


class GroupDraw:
    """Samples the policy on the pool's prompts and judges what comes back."""

    def __init__(
        self,
        model: SharedPrefixLM,
        encoder: PromptEncoder,
        pairs: Sequence[Pair],
        config: GrpoConfig,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.pairs = pairs
        self.config = config
        self.prompts: list[TokenPath] = [encoder.prompt(p.query, p.product) for p in pairs]
        self.gold = [gold_verdicts(p) for p in pairs]

    def rollouts(
        self, prompts: Sequence[TokenPath], count: int, generator: torch.Generator
    ) -> list[list[Rollout]]:
        """`count` responses for each prompt, at the stage's temperature and limits."""
        config = self.config
        return sample(
            self.model,
            prompts,
            group_size=count,
            max_new_tokens=config.max_new_tokens,
            end_id=self.encoder.end_id,
            generator=generator,
            temperature=config.temperature,
            top_k=config.top_k,
            rows_at_once=config.rollouts_at_once,
        )

    def judge(self, index: int, rollout: Rollout, forced: Segment = ()) -> Judged:
        """Read and reward one response to prompt `index`, its forced beginning included."""
        text = self.encoder.decode((*forced, *rollout.ids))
        order = self.encoder.config.order
        response = parse_response(text, order, rollout.finished)
        grade = self.pairs[index].grade
        parts = rule_reward(response, grade, self.gold[index], self.config.reward, order)
        return Judged(rollout, response, parts, response.grade == grade)


def share_correct(judged: Sequence[Judged]) -> float:
    """Share of a group whose grade is gold."""
    return sum(j.correct for j in judged) / len(judged)


def largest_grade_share(judged: Sequence[Judged]) -> float:
    """Share of the responses that state the grade most of them state, unread ones in the count.

    On a class-balanced pool a judge that has collapsed onto one grade is at 1.
    """
    stated = Counter(j.response.grade for j in judged if j.response.grade is not None)
    return max(stated.values(), default=0) / len(judged)


def group_members(
    index: int,
    judged: Sequence[Judged],
    config: GrpoConfig,
    trained_from: int = 0,
    forced: Segment = (),
) -> list[Member]:
    """Responses `trained_from`.. of a group, advantages over the whole group.

    Empty where there is nothing to learn: the rewards of the group are all the same (std under the
    floor), or each of these responses is truncated and so left out of the loss.
    """
    rewards_BG = torch.tensor([[j.parts.total for j in judged]])
    advantages_BG, kept_B = group_advantages(
        rewards_BG, floor=config.std_floor, scale=config.scale_rewards
    )
    if not bool(kept_B[0]):
        return []
    bound = config.max_advantage
    advantages = advantages_BG[0].clamp(-bound, bound).tolist()
    members = [
        Member(index, r.ids, r.logps, a, r.finished or not config.mask_truncated, forced)
        for a, r in zip(
            advantages[trained_from:], (j.rollout for j in judged[trained_from:]), strict=True
        )
    ]
    return members if any(m.counted for m in members) else []


def parts_of(
    members: Sequence[Member], config: GrpoConfig
) -> Iterator[tuple[Sequence[Member], float]]:
    """Members in parts that fit one forward, with the share of each in the whole mean."""
    tokens = sum(len(m.ids) for m in members)
    for start in range(0, len(members), config.responses_at_once):
        part = members[start : start + config.responses_at_once]
        share = len(part) / len(members)
        if config.loss == "dapo":
            share = sum(len(m.ids) for m in part) / tokens
        yield part, share


def response_metrics(judged: Sequence[Judged]) -> dict[str, float]:
    """Reward parts, accuracy, contradictions, lengths and the broken kinds, as shares of `judged`,
    contradictions of those that state grade and verdicts.

    Lengths are in tokens; names are TRL's where TRL has one.
    """
    count = len(judged)
    lengths = [len(j.rollout.ids) for j in judged]
    ended = [len(j.rollout.ids) for j in judged if j.rollout.finished]
    out = {
        f"rewards/{f.name}/mean": sum(getattr(j.parts, f.name) for j in judged) / count
        for f in fields(RewardParts)
    }
    for kind in (ParseOutcome.EMPTY, ParseOutcome.TRUNCATED, ParseOutcome.MALFORMED):
        out[f"completions/{kind}"] = sum(j.response.outcome is kind for j in judged) / count
    if (rate := contradiction_rate(j.response for j in judged)) is not None:
        out["contradiction_rate"] = rate
    return out | {
        "accuracy": share_correct(judged),
        "grades/largest_share": largest_grade_share(judged),
        "completions/mean_length": sum(lengths) / count,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended) if ended else 0.0,
        "completions/clipped_ratio": (count - len(ended)) / count,
    }


def old_logps(part: Sequence[Member], like_PT: torch.Tensor) -> torch.Tensor:
    """The sampler's log-probs, padded with 0 to the shape of `like_PT`."""
    old_PT = torch.zeros_like(like_PT)
    for row, member in enumerate(part):
        old_PT[row, : len(member.ids)] = torch.tensor(member.old_logps, device=like_PT.device)
    return old_PT
