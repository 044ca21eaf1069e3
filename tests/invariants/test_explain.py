"""Explanations of a served grade: they begin with it, and one that agrees is preferred."""

from __future__ import annotations

from typing import Any

import pytest

from models.judge import answers
from models.judge.answers import explain
from models.judge.config import PromptConfig
from models.judge.prompt import PromptEncoder
from models.judge.scoring import ScoringJudge
from models.judge.spec import JudgeSpec
from models.lm.rollout import Rollout
from models.lm.shared_prefix import SharedPrefixLM
from models.lm.weights import load_lm
from models.types import GRADES
from tests.builders import make_pair, make_pairs, make_tiny_judge

PAIR = make_pair("red sofa", "Acme red sofa", 4)
AGREES = "\nquery: red sofa\nitem: sofa\ncategory: match\nattributes: red yes\ndecision: excellent"
ALSO = "\nquery: red sofa\nitem: acme\ncategory: match\nattributes: red yes\ndecision: excellent"
WRONG = "\nquery: red sofa\nitem: sofa\ncategory: mismatch\nattributes: none\ndecision: excellent"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    pairs = [*make_pairs(24), PAIR]
    return make_tiny_judge(tmp_path_factory.mktemp("base") / "lm", pairs)


def open_judge(base: str, order: Any = "respond_then_think") -> ScoringJudge:
    lm, tokenizer = load_lm(base)
    spec = JudgeSpec(PromptConfig(order=order))
    return ScoringJudge(SharedPrefixLM(lm.eval(), bf16=False), PromptEncoder(tokenizer, spec))


@pytest.mark.parametrize("grade", GRADES)
def test_an_explanation_begins_with_the_served_grade(base: str, grade: int) -> None:
    model = open_judge(base)
    said = explain(model, PAIR.query, PAIR.product, grade, 12, tries=4)
    assert said.text.startswith(str(grade)) and not said.agrees, "random weights explain nothing"
    assert explain(model, PAIR.query, PAIR.product, grade, 12, tries=4) == said


def scripted(
    judge: ScoringJudge,
    monkeypatch: pytest.MonkeyPatch,
    greedy: str,
    drawn: list[tuple[str, float]],
) -> list[tuple[int, float]]:
    """`explain` draws these texts, each at its log-prob; returns (how many, temperature)."""
    asked: list[tuple[int, float]] = []
    encoder = judge.encoder

    def sample(_: Any, prompts: list[Any], **how: Any) -> list[list[Rollout]]:
        asked.append((how["group_size"], how["temperature"]))
        assert prompts[0][-1][-1] == encoder.label_ids[3], "the grade is the prompt's last token"
        texts = [(greedy, -1.0)] if how["temperature"] == 0 else drawn
        return [[Rollout(encoder.response_segment(t), (logp,), True) for t, logp in texts]]

    monkeypatch.setattr(answers, "sample", sample)
    return asked


def test_a_greedy_explanation_that_agrees_is_the_only_one_drawn(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_judge(base)
    asked = scripted(model, monkeypatch, AGREES, [])
    said = explain(model, PAIR.query, PAIR.product, 4, 40)
    assert said.agrees and said.text == "4" + AGREES and asked == [(1, 0.0)]


def test_the_likeliest_that_agrees_is_taken_and_else_the_greedy_one(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_judge(base)
    drawn = [(WRONG, -1.0), (ALSO, -3.0), (AGREES, -2.0)]
    asked = scripted(model, monkeypatch, WRONG, drawn)
    said = explain(model, PAIR.query, PAIR.product, 4, 40, tries=4)
    assert said.agrees and said.text == "4" + AGREES and asked == [(1, 0.0), (3, 1.0)]
    scripted(model, monkeypatch, WRONG, [(WRONG, -1.0)] * 3)
    said = explain(model, PAIR.query, PAIR.product, 4, 40, tries=4)
    assert not said.agrees and said.text == "4" + WRONG


def test_other_orders_are_explained_too(base: str) -> None:
    label = explain(open_judge(base, "label_only"), PAIR.query, PAIR.product, 2, 4, tries=2)
    assert label.text.startswith("2")
    first = explain(open_judge(base, "think_then_respond"), PAIR.query, PAIR.product, 2, 4, tries=2)
    assert not first.agrees
