"""Adaptive guided replay: prompts the judge does not get right by itself [TaoSR-AGRL s3.agr, ours].

Consumes the judged groups of a GRPO step -> produces guided responses to train the un-guided policy
on, as a loss stream of its own, and the buffer that the checkpoint keeps.

A group at or below the accuracy threshold enters the buffer. A step replays the neediest of it:
part of a prompt's group is sampled with the gold step verdicts as a hint in the prompt (or with the
template's response forced as its beginning), the rest without; advantages are taken over both, and
the guided part trains the policy on the prompt *without* the hint, with the truncated ratio
min(c, pi(o|x) / pi_old(o|x, hint)).

What fades: fewer responses are guided the higher the un-hinted accuracy, none at `fade_accuracy`,
where the prompt leaves the buffer; forced prefixes grow while guidance fails and shrink while it
succeeds, and a prompt weaned off them leaves too. The loss is divided by the full number of guided
responses, so that few of them make a small loss and not a steep one.

Departures (the paper prints neither formulas nor numbers): all of it, after Guide-GRPO (arXiv
2506.13923) and, for prefixes, G2RPO-A (2508.13023; its length follows a ratio of rewards, ours goes
in steps). The stream has no KL term: the estimator of the main loss holds for the policy's own
responses only. Its random numbers are its own, so GRPO's rollouts are the same with and without it.

Tensor legend: P responses of one part, T tokens.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from models.judge.config import GrpoConfig, ReplayConfig
from models.judge.groups import (
    GroupDraw,
    Judged,
    Member,
    group_members,
    old_logps,
    parts_of,
    share_correct,
)
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import Segment, SharedPrefixLM, build_tree
from models.objectives.surrogate import reduce_objective, truncated_surrogate
from models.teacher.response import contradiction_rate, render_verdicts
from models.teacher.template import write
from models.types import Verdicts

log = logging.getLogger(__name__)


def hint_text(gold: Verdicts) -> str:
    """The gold step verdicts as lines of a prompt; the grade itself is not among them."""
    return f"hint: the right steps are\n{render_verdicts(gold)}\n"


def guided_count(accuracy: float, group_size: int, config: ReplayConfig) -> int:
    """ceil(G guided_share (1 - accuracy / fade_accuracy)), at most G - 1, never below 0.

    >>> [guided_count(a, 8, ReplayConfig()) for a in (0.0, 0.125, 0.375, 0.5, 1.0)]
    [4, 3, 1, 0, 0]
    """
    left = max(0.0, 1.0 - accuracy / config.fade_accuracy)
    return min(group_size - 1, math.ceil(group_size * config.guided_share * left - 1e-9))


@dataclass(frozen=True)
class Stuck:
    """A prompt in the buffer. accuracy: the last un-hinted one; turn: its place in the queue."""

    index: int
    accuracy: float
    turn: int
    tries: int = 0
    prefix_share: float = 0.0


class ReplayBuffer:
    """Prompts by need: lowest accuracy first, equal ones in the order they came or last ran."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: dict[int, Stuck] = {}
        self._turns = 0

    def put(self, stuck: Stuck) -> None:
        """Add or replace a prompt at the end of its equals; over capacity the last one leaves."""
        self._turns += 1
        self.entries[stuck.index] = replace(stuck, turn=self._turns)
        if len(self.entries) > self.capacity:
            self.drop(max(self.entries.values(), key=_need).index)

    def note(self, index: int, accuracy: float) -> None:
        """A new accuracy of a prompt in the buffer; its turn stays."""
        self.entries[index] = replace(self.entries[index], accuracy=accuracy)

    def drop(self, index: int) -> None:
        """Forget a prompt."""
        del self.entries[index]

    def next(self, count: int) -> list[Stuck]:
        """The `count` neediest prompts, which stay in the buffer."""
        return heapq.nsmallest(count, self.entries.values(), key=_need)

    def state(self) -> dict[str, Any]:
        """JSON values that `restore` reads."""
        return {"turns": self._turns, "entries": [asdict(s) for s in self.entries.values()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._turns = state["turns"]
        self.entries = {s["index"]: Stuck(**s) for s in state["entries"]}


def _need(stuck: Stuck) -> tuple[float, int]:
    """Sort key; turns are unique, so equal accuracies never compare the entries themselves."""
    return stuck.accuracy, stuck.turn


class GuidedReplay:
    """The buffer, the guided rollouts of the current step, and their random numbers.

    given_up: prompts that guidance did not reach in `max_tries`; they never enter again.
    """

    def __init__(self, draw: GroupDraw, config: ReplayConfig) -> None:
        if config.guidance == "prefix" and draw.encoder.config.order == "respond_then_think":
            log.warning(
                "guided replay: prefixes begin with the gold grade in respond_then_think, so they "
                "teach its steps and never the grade; judge.grpo.replay.guidance=hint teaches both"
            )
        self.draw = draw
        self.config = config
        self.buffer = ReplayBuffer(config.capacity)
        seed = draw.config.optimiser.seed + 1
        self.generator = torch.Generator(device=draw.model.device).manual_seed(seed)
        self.members: list[Member] = []
        self.given_up: set[int] = set()
        self.totals = dict.fromkeys(("entered", "solved", "weaned", "given_up"), 0)

    @property
    def prompts(self) -> list[TokenPath]:
        """Un-hinted prompts: what the guided responses are trained on."""
        return self.draw.prompts

    @property
    def full_size(self) -> int:
        """Guided responses of a step whose prompts are all at accuracy 0."""
        return self.config.prompts_per_step * guided_count(
            0.0, self.draw.config.group_size, self.config
        )

    def refresh(self, groups: Mapping[int, Sequence[Judged]]) -> dict[str, float]:
        """Take in the step's groups, replay the neediest prompts, fill `members`; as metrics."""
        before, size = dict(self.totals), self.draw.config.group_size
        for index, judged in groups.items():
            self._note(index, share_correct(judged))
        batch = self.buffer.next(self.config.prompts_per_step)
        earlier = [s for s in batch if s.index not in groups]
        wanted = [(s, size - guided_count(s.accuracy, size, self.config)) for s in earlier]
        plain = {s.index: groups[s.index] for s in batch if s.index in groups}
        plain |= self._sample([(s.index, self.prompts[s.index], (), n) for s, n in wanted])
        for stuck in earlier:
            self._note(stuck.index, share_correct(plain[stuck.index]))
        batch = [self.buffer.entries[s.index] for s in batch if s.index in self.buffer.entries]
        guided = self._guide(batch, plain)
        moved = {name: self.totals[name] - before[name] for name in before}
        return self._metrics(plain, guided, len(earlier), moved, batch)

    def _note(self, index: int, accuracy: float) -> None:
        """Into, along, or out of the buffer by a fresh un-hinted accuracy."""
        if index in self.buffer.entries:
            self.buffer.note(index, accuracy)
            if accuracy >= self.config.fade_accuracy:
                self.buffer.drop(index)
                self.totals["solved"] += 1
        elif accuracy <= self.config.max_accuracy and index not in self.given_up:
            self.buffer.put(Stuck(index, accuracy, 0, prefix_share=self.config.prefix_share))
            self.totals["entered"] += 1

    def _guide(
        self, batch: Sequence[Stuck], plain: Mapping[int, Sequence[Judged]]
    ) -> dict[int, list[Judged]]:
        """Guided responses of each prompt; fills `members` and moves the prompts on."""
        settings, size = self.draw.config, self.draw.config.group_size
        wanted = []
        for stuck in batch:
            prompt, forced = self._guided_prompt(stuck)
            count = guided_count(stuck.accuracy, size, self.config)
            wanted.append((stuck.index, prompt, forced, count))
        guided = self._sample(wanted)
        self.members = []
        for stuck, (index, _, forced, count) in zip(batch, wanted, strict=True):
            own = plain[index][: size - count]
            group = [*own, *guided[index]]
            self.members += group_members(index, group, settings, len(own), forced)
            self._move_on(stuck, guided[index])
        return guided

    def _guided_prompt(self, stuck: Stuck) -> tuple[TokenPath, Segment]:
        """What the guided sampler reads, and the part of it that is a forced response."""
        pair, encoder = self.draw.pairs[stuck.index], self.draw.encoder
        root, query, item = self.prompts[stuck.index]
        if self.config.guidance == "hint":
            hint = hint_text(self.draw.gold[stuck.index])
            return (root, encoder.query_segment(pair.query, hint), item), ()
        gold = encoder.response_segment(write(pair, encoder.config.order))[:-1]
        length = min(len(gold) - 1, max(1, round(stuck.prefix_share * len(gold))))
        forced = gold[:length]
        return (root, query, item + forced), forced

    def _sample(
        self, wanted: Sequence[tuple[int, TokenPath, Segment, int]]
    ) -> dict[int, list[Judged]]:
        """{prompt: judged responses} for (prompt, path, forced beginning, how many).

        Equal counts are drawn together, so that a prompt's siblings share its prefix.
        """
        out: dict[int, list[Judged]] = {}
        for size in sorted({count for *_, count in wanted}):
            rows = [row for row in wanted if row[3] == size]
            drawn = self.draw.rollouts([path for _, path, _, _ in rows], size, self.generator)
            for (index, _, forced, _), rollouts in zip(rows, drawn, strict=True):
                out[index] = [self.draw.judge(index, r, forced) for r in rollouts]
        return out

    def _move_on(self, stuck: Stuck, guided: Sequence[Judged]) -> None:
        """One try more and a new length of the prefix; out of the buffer at the end of either."""
        sound = sum(j.sound for j in guided)
        step = -self.config.prefix_step if 2 * sound >= len(guided) else self.config.prefix_step
        share = min(1.0, stuck.prefix_share + step)
        if self.config.guidance == "prefix" and share <= 0:
            self.buffer.drop(stuck.index)
            self.totals["weaned"] += 1
        elif stuck.tries + 1 >= self.config.max_tries:
            self.buffer.drop(stuck.index)
            self.given_up.add(stuck.index)
            self.totals["given_up"] += 1
        else:
            self.buffer.put(replace(stuck, tries=stuck.tries + 1, prefix_share=share))

    def _metrics(
        self,
        plain: Mapping[int, Sequence[Judged]],
        guided: Mapping[int, Sequence[Judged]],
        earlier: int,
        moved: Mapping[str, int],
        batch: Sequence[Stuck],
    ) -> dict[str, float]:
        flat = [j for group in guided.values() for j in group]
        out: dict[str, float] = {
            "replay/groups": len(guided),
            "replay/groups_from_earlier": earlier,
            "replay/responses": len(flat),
            "replay/trained_responses": sum(m.counted for m in self.members),
            "replay/buffer_size": len(self.buffer.entries),
            **{f"replay/{name}": count for name, count in moved.items()},
        }
        for name, judged in (
            ("plain", [j for group in plain.values() for j in group]),
            ("guided", flat),
        ):
            if judged:
                out[f"replay/accuracy_{name}"] = share_correct(judged)
                out[f"replay/reward_{name}"] = sum(j.parts.total for j in judged) / len(judged)
        if flat:
            if (rate := contradiction_rate(j.response for j in flat)) is not None:
                out["replay/contradiction_rate"] = rate
            out["replay/clipped_ratio"] = sum(not j.rollout.finished for j in flat) / len(flat)
            if self.config.guidance == "prefix":
                out["replay/prefix_share"] = sum(s.prefix_share for s in batch) / len(batch)
        return out

    def state(self) -> dict[str, Any]:
        """Buffer, prompts given up, generator, totals and the current guided responses."""
        return {
            "buffer": self.buffer.state(),
            "generator": self.generator.get_state().tolist(),
            "members": [asdict(m) for m in self.members],
            "given_up": sorted(self.given_up),
            "totals": self.totals,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.buffer.restore(state["buffer"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self.members = [Member.from_state(m) for m in state["members"]]
        self.given_up = set(state["given_up"])
        self.totals = dict(state["totals"])


def replay_update(
    model: SharedPrefixLM, replay: GuidedReplay, config: GrpoConfig
) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
    """weight / full_size sum_i 1/|o_i| sum_t -min(c, rho_it) A_i, in parts [TaoSR-AGRL s3.agr].

    Nothing where nobody is guided or the weight is 0.
    """
    members = [m for m in replay.members if m.counted]
    if not members or replay.config.weight == 0:
        return
    scale = replay.config.weight * len(members) / replay.full_size
    for part, share in parts_of(members, config):
        loss, metrics = _part_loss(model, replay, part, config)
        yield scale * share * loss, {f"replay/{k}": v for k, v in metrics.items()}


def _part_loss(
    model: SharedPrefixLM, replay: GuidedReplay, part: Sequence[Member], config: GrpoConfig
) -> tuple[torch.Tensor, dict[str, float]]:
    """The truncated surrogate on un-hinted prompts; a forced beginning counts as prompt."""
    paths = []
    for member in part:
        *head, item = replay.prompts[member.prompt_index]
        paths.append((*head, item + member.forced, member.ids))
    tree = build_tree(paths).to(model.device)
    logps = model(tree, temperature=config.temperature, with_entropy=True)
    mask_PT = logps.mask_PT
    old_PT = old_logps(part, logps.logp_PT)
    advantage_P1 = torch.tensor([[m.advantage] for m in part], device=model.device)
    surrogate_PT, truncated_PT = truncated_surrogate(
        logps.logp_PT, old_PT, advantage_P1, replay.config.max_ratio
    )
    loss = -reduce_objective(surrogate_PT, mask_PT, config.loss, config.max_new_tokens)
    assert logps.entropy_PT is not None
    return loss, {
        "loss": loss.item(),
        "ratio": torch.exp((logps.logp_PT.detach() - old_PT)[mask_PT]).mean().item(),
        "truncated_share": truncated_PT[mask_PT].float().mean().item(),
        "entropy": logps.entropy_PT[mask_PT].mean().item(),
    }
