"""Rule-aware rewards: the parts, the gate, and broken responses."""

from __future__ import annotations

import pytest

from models.rewards.config import RuleRewardConfig
from models.rewards.judge_rules import rule_reward, share_right
from models.teacher.response import Order, parse_response, render_response
from models.types import Verdicts
from tests.builders import make_verdicts

GOLD = make_verdicts("match", colour=True, size=False)
CONFIG = RuleRewardConfig(grade=1.0, category=0.2, attributes=0.4, format=0.1)
POST_COT: Order = "respond_then_think"


def respond(grade: int, verdicts: Verdicts, finished: bool = True):
    text = render_response("q", "i", verdicts, grade, POST_COT)
    return parse_response(text, POST_COT, finished)


def test_a_perfect_response_gets_every_part() -> None:
    parts = rule_reward(respond(3, GOLD), 3, GOLD, CONFIG, POST_COT)
    assert parts.total == pytest.approx(1.0 + 0.2 + 0.4 + 0.1)
    assert parts.gate == 1


def test_right_steps_wrong_grade_keep_partial_credit() -> None:
    parts = rule_reward(respond(2, GOLD), 3, GOLD, CONFIG, POST_COT)
    assert parts.total == pytest.approx(0.2 + 0.4 + 0.1)


@pytest.mark.parametrize(("wish", "gate"), [("not leather", 0), ("price", 0), ("colour", 1)])
def test_the_gate_knows_firm_wishes(wish: str, gate: int) -> None:
    """What fails an exclusion or a price limit is a mismatch: the rules say so in the prompt."""
    stated = make_verdicts("match", **{"sofa": True, wish: False})
    assert rule_reward(respond(3, stated), 2, stated, CONFIG, POST_COT).gate == gate
    assert rule_reward(respond(2, stated), 2, stated, CONFIG, POST_COT).gate == 1


def test_half_of_the_attributes() -> None:
    stated = make_verdicts("match", colour=True, size=True)
    assert rule_reward(respond(3, stated), 3, GOLD, CONFIG, POST_COT).total == pytest.approx(1.5)


def test_the_gate_zeroes_a_grade_that_contradicts_its_verdicts() -> None:
    stated = make_verdicts("mismatch", colour=True)
    parts = rule_reward(respond(4, stated), 4, GOLD, CONFIG, POST_COT)
    assert (parts.gate, parts.total, parts.grade) == (0, 0, 1)
    open_gate = CONFIG.model_copy(update={"gate": False})
    assert rule_reward(respond(4, stated), 4, GOLD, open_gate, POST_COT).total > 1


def test_outcome_reward_when_not_shaped() -> None:
    plain = CONFIG.model_copy(update={"shaped": False})
    assert rule_reward(respond(3, make_verdicts("mismatch")), 3, GOLD, plain, POST_COT).total == 1
    assert rule_reward(respond(2, GOLD), 3, GOLD, plain, POST_COT).total == 0


@pytest.mark.parametrize("text", ["", "   ", "hello", "7\nquery: a"])
def test_unreadable_responses_get_nothing(text: str) -> None:
    response = parse_response(text, POST_COT)
    assert rule_reward(response, 1, GOLD, CONFIG, POST_COT).total == 0


def test_a_cut_response_keeps_what_it_states_but_its_form() -> None:
    text = render_response("q", "i", GOLD, 3, POST_COT).rpartition("\n")[0]
    for finished in (True, False):
        parts = rule_reward(parse_response(text, POST_COT, finished), 3, GOLD, CONFIG, POST_COT)
        assert (parts.gate, parts.format) == (1, 0)
        assert parts.total == pytest.approx(1.0 + 0.2 + 0.4)


@pytest.mark.parametrize("order", ["respond_then_think", "think_then_respond"])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("steps", ["", "query: a\nitem: b", "category: maybe\nattributes: none"])
def test_breaking_the_form_does_not_pay(order: Order, finished: bool, steps: str) -> None:
    """The right grade without readable verdicts earns no more than with contradicting ones."""
    lines = ["3", steps] if order == "respond_then_think" else [steps, "3"]
    response = parse_response("\n".join(filter(None, lines)), order, finished)
    parts = rule_reward(response, 3, GOLD, CONFIG, order)
    assert (parts.grade, parts.gate, parts.total) == (1, 0, 0)
    open_gate = CONFIG.model_copy(update={"gate": False})
    assert rule_reward(response, 3, GOLD, open_gate, order).total == 1


def test_a_label_alone_is_whole_where_no_steps_are_due() -> None:
    response = parse_response("3", "label_only")
    parts = rule_reward(response, 3, GOLD, CONFIG, "label_only")
    assert parts.gate == 1 and parts.total == pytest.approx(1.0 + 0.1)
    assert rule_reward(response, 2, GOLD, CONFIG, "label_only").total == pytest.approx(0.1)


def test_share_right_counts_missing_and_invented_attributes() -> None:
    assert share_right(make_verdicts(colour=True), GOLD) == pytest.approx(1 / 2)
    assert share_right(make_verdicts(colour=True, size=False, use=True), GOLD) == pytest.approx(
        2 / 3
    )
    assert share_right(make_verdicts(), make_verdicts()) == 1
