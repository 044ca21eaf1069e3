"""Explanations of a served grade: they begin with it, and their verdicts lead to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.judge import answers
from models.judge.answers import explain
from models.judge.config import PromptConfig
from models.judge.prompt import PromptEncoder
from models.judge.scoring import ScoringJudge
from models.judge.spec import JudgeSpec
from models.lm.rollout import Rollout
from models.lm.shared_prefix import SharedPrefixLM
from models.lm.weights import load_lm
from models.types import GRADES, Category, Verdicts
from tests.builders import make_pair, make_pairs, make_tiny_judge

PAIR = make_pair("red sofa", "Acme red sofa", 4)
AGREES = "\nquery: red sofa\nitem: sofa\ncategory: match\nattributes: red yes\ndecision: excellent"
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
    grade: int = 4,
) -> list[tuple[int, float]]:
    """`explain` draws these texts, each at its log-prob; returns (how many, temperature)."""
    asked: list[tuple[int, float]] = []
    encoder = judge.encoder

    def sample(_: Any, prompts: list[Any], **how: Any) -> list[list[Rollout]]:
        asked.append((how["group_size"], how["temperature"]))
        assert prompts[0][-1][-1] == encoder.label_ids[grade - 1], "the prompt ends with it"
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


def test_verdicts_that_disagree_give_way_to_the_only_ones_that_lead_to_the_grade(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_judge(base)
    asked = scripted(model, monkeypatch, WRONG, [])
    said = explain(model, PAIR.query, PAIR.product, 4, 40)
    assert said.agrees and asked == [(1, 0.0)], "one that can be read is not drawn again"
    assert said.text == "4" + WRONG.replace("mismatch", "match")
    assert said.own == Verdicts(Category.MISMATCH)


def test_of_several_sets_of_verdicts_the_judge_names_the_likeliest(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_judge(base)
    steps = "\nquery: red sofa\nitem: sofa\ncategory: {}\nattributes: {}\ndecision: mismatch"
    greedy = steps.format("match", "red yes, size yes, red yes")
    scripted(model, monkeypatch, greedy, [], grade=2)
    said = explain(model, PAIR.query, PAIR.product, 2, 40)
    assert said.own is not None and said.own.category is Category.MATCH and said.agrees

    lists = [f"red {a}, size {b}" for a in ("yes", "no") for b in ("yes", "no")]
    allowed = ["2" + steps.format("related", these) for these in lists]
    allowed += ["2" + steps.format("match", these) for these in lists if "no" in these]
    prompt = sum(model.encoder.prompt(PAIR.query, PAIR.product), ())

    def likelihood(text: str) -> float:
        """By a forward pass of its own."""
        ids = model.encoder.response_segment(text)
        logits_TV = model.model.lm(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :]
        return float(logits_TV.log_softmax(-1)[range(len(ids)), list(ids)].sum())

    with torch.no_grad():
        by_text = {text: likelihood(text) for text in allowed}
    assert said.text == max(by_text, key=lambda text: by_text[text])


def test_steps_that_cannot_be_read_are_drawn_again(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_judge(base)
    drawn = [("\nno steps", -1.0), (WRONG, -2.0), (AGREES, -3.0)]
    asked = scripted(model, monkeypatch, "\nno steps", drawn)
    said = explain(model, PAIR.query, PAIR.product, 4, 40, tries=4)
    assert said.agrees and asked == [(1, 0.0), (3, 1.0)]
    assert said.text == "4" + WRONG.replace("mismatch", "match"), "the likeliest readable one's"
    scripted(model, monkeypatch, "\nno steps", [("\nnor here", -1.0)] * 3)
    said = explain(model, PAIR.query, PAIR.product, 4, 40, tries=4)
    assert not said.agrees and said.text == "4\nno steps"


def test_other_orders_are_explained_too(base: str) -> None:
    label = explain(open_judge(base, "label_only"), PAIR.query, PAIR.product, 2, 4, tries=2)
    assert label.text.startswith("2")
    first = explain(open_judge(base, "think_then_respond"), PAIR.query, PAIR.product, 2, 4, tries=2)
    assert not first.agrees
