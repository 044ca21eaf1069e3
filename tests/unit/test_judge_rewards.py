"""Rule-aware rewards: the parts, the gate, and broken responses."""

from __future__ import annotations

import pytest

from models.rewards.config import RuleRewardConfig
from models.rewards.judge_rules import rule_reward, share_right
from models.teacher.response import parse_response, render_response
from models.types import Verdicts
from tests.builders import make_verdicts

GOLD = make_verdicts("match", colour=True, price=False)
CONFIG = RuleRewardConfig(grade=1.0, category=0.2, attributes=0.4, format=0.1)


def respond(grade: int, verdicts: Verdicts, finished: bool = True):
    text = render_response("q", "i", verdicts, grade, "respond_then_think")
    return parse_response(text, "respond_then_think", finished)


def test_a_perfect_response_gets_every_part() -> None:
    parts = rule_reward(respond(3, GOLD), 3, GOLD, CONFIG)
    assert parts.total == pytest.approx(1.0 + 0.2 + 0.4 + 0.1)
    assert parts.gate == 1


def test_right_steps_wrong_grade_keep_partial_credit() -> None:
    parts = rule_reward(respond(2, GOLD), 3, GOLD, CONFIG)
    assert parts.total == pytest.approx(0.2 + 0.4 + 0.1)


def test_half_of_the_attributes() -> None:
    stated = make_verdicts("match", colour=True, price=True)
    assert rule_reward(respond(3, stated), 3, GOLD, CONFIG).total == pytest.approx(1.5)


def test_the_gate_zeroes_a_grade_that_contradicts_its_verdicts() -> None:
    stated = make_verdicts("mismatch", colour=True)
    parts = rule_reward(respond(4, stated), 4, GOLD, CONFIG)
    assert (parts.gate, parts.total, parts.grade) == (0, 0, 1)
    open_gate = CONFIG.model_copy(update={"gate": False})
    assert rule_reward(respond(4, stated), 4, GOLD, open_gate).total > 1


def test_outcome_reward_when_not_shaped() -> None:
    plain = CONFIG.model_copy(update={"shaped": False})
    assert rule_reward(respond(3, make_verdicts("mismatch")), 3, GOLD, plain).total == 1
    assert rule_reward(respond(2, GOLD), 3, GOLD, plain).total == 0


@pytest.mark.parametrize("text", ["", "   ", "hello", "7\nquery: a"])
def test_unreadable_responses_get_nothing(text: str) -> None:
    response = parse_response(text, "respond_then_think")
    assert rule_reward(response, 1, GOLD, CONFIG).total == 0


def test_truncated_response_keeps_its_grade_but_no_format() -> None:
    parts = rule_reward(parse_response("3\nquery: a", "respond_then_think", False), 3, GOLD, CONFIG)
    assert (parts.grade, parts.format, parts.total) == (1, 0, 1)


def test_share_right_counts_missing_and_invented_attributes() -> None:
    assert share_right(make_verdicts(colour=True), GOLD) == pytest.approx(1 / 2)
    assert share_right(make_verdicts(colour=True, price=False, size=True), GOLD) == pytest.approx(
        2 / 3
    )
    assert share_right(make_verdicts(), make_verdicts()) == 1
