"""Guided replay without a language model: the buffer, fading, hints, and the loss as arithmetic."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.judge.config import GrpoConfig, ReplayConfig
from models.judge.groups import Member
from models.judge.replay import (
    ReplayBuffer,
    Stuck,
    guided_count,
    hint_text,
    replay_update,
)
from models.lm.shared_prefix import PromptTree, ResponseLogps, build_tree
from models.objectives.surrogate import truncated_surrogate
from tests.builders import make_verdicts

# the buffer


def filled(*accuracies: float, capacity: int = 9) -> ReplayBuffer:
    """A buffer with prompt i at the i-th accuracy."""
    buffer = ReplayBuffer(capacity)
    for index, accuracy in enumerate(accuracies):
        buffer.put(Stuck(index, accuracy, 0))
    return buffer


def indices(buffer: ReplayBuffer, count: int = 99) -> list[int]:
    """Prompts in the order in which they would be replayed."""
    return [s.index for s in buffer.next(count)]


def test_equal_scores_are_no_error_and_keep_their_order() -> None:
    """Tiered rewards tie all the time; a heap of (score, dict) raises TypeError then."""
    buffer = filled(0.0, 0.0, 0.0, 0.0)
    assert indices(buffer) == [0, 1, 2, 3]
    buffer.put(buffer.entries[0])  # replayed: behind its equals
    assert indices(buffer) == [1, 2, 3, 0] and indices(buffer, 2) == [1, 2]


def test_the_neediest_come_first_and_the_least_needy_leave_a_full_buffer() -> None:
    assert indices(filled(0.2, 0.0, 0.1, 0.0)) == [1, 3, 2, 0]
    assert indices(filled(0.2, 0.0, 0.1, 0.0, capacity=2)) == [1, 3]
    assert indices(filled(0.0, 0.0, 0.0, capacity=2)) == [0, 1]


def test_the_buffer_goes_on_where_it_stopped() -> None:
    first, second = filled(0.1, 0.0, 0.0), ReplayBuffer(9)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.entries == first.entries
    for buffer in (first, second):
        buffer.put(buffer.next(1)[0])
        buffer.put(Stuck(7, 0.0, 0))
    assert indices(second) == indices(first) == [2, 1, 7, 0]


# fading and hints


def test_guidance_fades_with_accuracy() -> None:
    config = ReplayConfig(guided_share=0.5, fade_accuracy=0.5, max_accuracy=0.25)
    counts = [guided_count(a / 8, 8, config) for a in range(9)]
    # ceil(8 * .5 * (1 - a / 4)) for a of 8 right
    assert counts == [4, 3, 2, 1, 0, 0, 0, 0, 0]
    whole = ReplayConfig(guided_share=0.99)
    assert guided_count(0.0, 4, whole) == 3  # one un-hinted response is always left


def test_a_threshold_above_the_fading_is_refused() -> None:
    with pytest.raises(ValidationError, match="below fade_accuracy"):
        ReplayConfig(max_accuracy=0.5, fade_accuracy=0.5)


def test_a_hint_states_the_verdicts_and_no_grade() -> None:
    hint = hint_text(make_verdicts("related", colour=True, price=False))
    assert hint.splitlines()[1:] == ["category: related", "attributes: colour yes, price no"]
    assert hint.endswith("\n")
    for word in ("decision", "excellent", "irrelevant", "grade", "1", "2", "3", "4"):
        assert word not in hint


# the loss


def test_the_ratio_is_truncated_and_keeps_its_gradient() -> None:
    logp = torch.tensor([0.1, 0.6, 0.6]).log().requires_grad_()
    old = torch.tensor([0.8, 0.2, 0.2]).log()
    advantage = torch.tensor([2.0, 2.0, -1.0])
    value, truncated = truncated_surrogate(logp, old, advantage, max_ratio=1.5)
    want = torch.tensor([2.0 * 0.1 / 0.8, 2.0 * 1.5, -1.0 * 1.5])  # 3 is cut to 1.5
    assert torch.allclose(value, want)
    value.sum().backward()
    assert torch.allclose(logp.grad, want)
    assert truncated.tolist() == [False, True, True]


def test_a_ratio_beyond_the_range_of_floats_is_truncated_too() -> None:
    logp = torch.tensor([-1.0, -200.0]).requires_grad_()
    value, _ = truncated_surrogate(logp, torch.tensor([-200.0, -1.0]), torch.ones(2), 1.0)
    value.sum().backward()
    assert logp.grad.tolist() == [1.0, 0.0] and torch.isfinite(value).all()


PROMPTS = [((1, 2), (3,), (4, 5)), ((1, 2), (3,), (6,))]


class FixedModel:
    """In place of a language model: the log-probs given, row by row, and what it was asked."""

    device = torch.device("cpu")

    def __init__(self, logp_PT: torch.Tensor, mask_PT: torch.Tensor) -> None:
        self.out = ResponseLogps(logp_PT, mask_PT, torch.zeros_like(logp_PT))
        self.asked: list[PromptTree] = []
        self.row = 0

    def __call__(self, tree: PromptTree, **_: Any) -> ResponseLogps:
        self.asked.append(tree)
        rows = slice(self.row, self.row + len(tree.leaf_P))
        cut, self.row = (rows, slice(0, int(tree.tail_N.max()))), rows.stop
        assert self.out.entropy_PT is not None
        return ResponseLogps(self.out.logp_PT[cut], self.out.mask_PT[cut], self.out.entropy_PT[cut])


def make_replay(members: list[Member], config: ReplayConfig, full_size: int) -> Any:
    """What `replay_update` reads of a GuidedReplay."""
    return SimpleNamespace(members=members, config=config, prompts=PROMPTS, full_size=full_size)


def make_case() -> tuple[FixedModel, torch.Tensor, list[Member]]:
    """Two guided responses of 2 and 1 tokens, one of them with a forced beginning."""
    logp = torch.tensor([[0.2, 0.9], [0.5, 1.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    old = [tuple(math.log(p) for p in row) for row in ((0.8, 0.3), (0.25,))]
    members = [
        Member(0, (11, 12), old[0], 2.0, True),
        Member(1, (13,), old[1], -1.0, True, forced=(7, 8)),
        Member(1, (14,), old[1], 5.0, False),  # truncated: not counted
    ]
    return FixedModel(logp, mask), logp, members


def test_the_gradient_of_the_replay_stream_as_arithmetic() -> None:
    model, logp, members = make_case()
    config = GrpoConfig(replay=ReplayConfig(weight=0.5, max_ratio=2.0))
    assert config.replay is not None
    replay = make_replay(members, config.replay, full_size=8)
    ((loss, metrics),) = replay_update(model, replay, config)  # type: ignore[arg-type]
    # ratios .2/.8, .9/.3 -> 2, .5/.25; 1/|o| inside a response, weight/full_size over them
    first, second = (2.0 * (0.2 / 0.8) / 2, 2.0 * 2.0 / 2), -1.0 * (0.5 / 0.25)
    assert loss.item() == pytest.approx(-0.5 / 8 * (sum(first) + second))
    loss.backward()
    want = -0.5 / 8 * torch.tensor([[*first], [second, 0.0]])
    assert torch.allclose(logp.grad, want)
    assert metrics["replay/truncated_share"] == pytest.approx(1 / 3)
    assert metrics["replay/ratio"] == pytest.approx((0.25 + 3 + 2) / 3)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_parts_of_the_replay_stream_add_up(loss: Any) -> None:
    """One forward for all, or one a response: the same loss."""
    totals = []
    for at_once in (1, 8):
        model, _, members = make_case()
        config = GrpoConfig(loss=loss, responses_at_once=at_once, max_new_tokens=4)
        replay = make_replay(members, ReplayConfig(), 8)
        totals.append(sum(part.item() for part, _ in replay_update(model, replay, config)))  # type: ignore[arg-type]
        assert len(model.asked) == (2 if at_once == 1 else 1)
    assert totals[0] == pytest.approx(totals[1]) and abs(totals[0]) > 1e-3


def test_trained_on_the_prompt_without_hint_and_forced_tokens_are_prompt() -> None:
    model, _, members = make_case()
    config = GrpoConfig(replay=ReplayConfig())
    list(replay_update(model, make_replay(members, ReplayConfig(), 8), config))  # type: ignore[arg-type]
    want = build_tree([(*PROMPTS[0], (11, 12)), (*PROMPTS[1][:2], (6, 7, 8), (13,))])
    (got,) = model.asked
    assert [level.ids_NT.tolist() for level in got.levels] == [
        level.ids_NT.tolist() for level in want.levels
    ]
    assert got.tail_N.tolist() == [2, 1]  # only the responses' own tokens are in the loss


@pytest.mark.parametrize("case", ["weight 0", "nobody guided", "all cut off"])
def test_no_stream_where_there_is_nothing_to_learn(case: str) -> None:
    model, _, members = make_case()
    config = ReplayConfig(weight=0.0 if case == "weight 0" else 1.0)
    chosen = {"weight 0": members, "nobody guided": [], "all cut off": members[2:]}[case]
    parts = replay_update(model, make_replay(chosen, config, 8), GrpoConfig())  # type: ignore[arg-type]
    assert list(parts) == [] and model.asked == []
