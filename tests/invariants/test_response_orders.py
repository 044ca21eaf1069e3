"""Grading in the three formats: where the grade is read, and that no label stands before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.judge import scoring
from models.judge.config import OptimiserConfig, PromptConfig, SftConfig
from models.judge.cot_sft import train_cot_sft
from models.judge.prompt import PromptEncoder
from models.judge.scoring import ScoringJudge
from models.judge.spec import JudgeSpec
from models.lm.rollout import Rollout
from models.lm.shared_prefix import SharedPrefixLM
from models.lm.weights import load_lm
from models.metrics import NullSink
from models.teacher.template import write
from models.types import Pair
from tests.builders import make_pairs, make_tiny_judge

PAIRS = make_pairs(12)
ASKED = [(p.query, p.product) for p in PAIRS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_judge(tmp_path_factory.mktemp("orders") / "base", PAIRS)


def judge(base: str, order: Any, tokens: int = 48) -> ScoringJudge:
    """An untrained judge of one format."""
    spec = JudgeSpec(PromptConfig(order=order, max_thought_tokens=tokens))
    return ScoringJudge.open(base, spec, bf16=False)


def says(monkeypatch: pytest.MonkeyPatch, model: ScoringJudge, texts: list[str]) -> None:
    """Make the judge think `texts`, one a prompt."""

    def sample(net: Any, prompts: Any, **options: Any) -> list[list[Rollout]]:
        assert options["temperature"] == 0 and options["group_size"] == 1
        ids = [model.encoder.response_segment(text) for text in texts]
        return [[Rollout(i, (0.0,) * len(i), True)] for i in ids]

    monkeypatch.setattr(scoring, "sample", sample)


@pytest.mark.parametrize("order", ["respond_then_think", "label_only"])
def test_grade_first_formats_are_read_right_after_the_prompt(base: str, order: str) -> None:
    model = judge(base, order)
    assert model.before_grade(ASKED) == [model.encoder.prompt(q, p) for q, p in ASKED]


def test_label_only_reads_the_prompt_of_post_cot(base: str) -> None:
    scores = [judge(base, order).score(ASKED) for order in ("respond_then_think", "label_only")]
    assert (scores[0] == scores[1]).all()


def test_a_judge_that_thinks_first_is_graded_after_its_own_steps(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = judge(base, "think_then_respond")
    texts = [write(p, "think_then_respond") for p in PAIRS]
    says(monkeypatch, model, texts)
    lm, _ = load_lm(base)
    for pair, text, p_L in zip(PAIRS, texts, model.score(ASKED), strict=True):
        ids = [i for s in model.encoder.prompt(pair.query, pair.product) for i in s]
        ids += model.encoder.segment(text.rpartition("\n")[0] + "\n")
        with torch.no_grad():
            logits_V = lm(torch.tensor([ids])).logits[0, -1]
        expected_L = torch.softmax(logits_V[model.encoder.label_ids], -1).numpy()
        assert np.abs(p_L - expected_L).max() < 3e-5


def test_neither_gold_nor_a_stated_grade_stands_before_the_grade(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal steps that end in different grades are graded alike: only the steps condition."""
    model = judge(base, "think_then_respond")
    steps = write(PAIRS[0], "think_then_respond").rpartition("\n")[0]
    paths = []
    for stated in "1234":
        says(monkeypatch, model, [f"{steps}\n{stated}"] * len(PAIRS))
        paths.append(model.before_grade(ASKED))
    assert all(path == paths[0] for path in paths)
    assert {path[-1] for path in paths[0]} == {model.encoder.segment(f"{steps}\n")}
    for (query, product), path in zip(ASKED, paths[0], strict=True):
        assert path[:-1] == model.encoder.prompt(query, product)


def test_cut_off_steps_are_graded_as_they_are(base: str) -> None:
    model = judge(base, "think_then_respond", tokens=3)
    for path in model.before_grade(ASKED):
        text = model.encoder.tokenizer.decode(path[-1])
        assert text.endswith("\n") and text.count("\n") <= 3 + 1
    p_NL = model.score(ASKED)
    assert np.isfinite(p_NL).all() and p_NL.sum(1) == pytest.approx(1, abs=1e-5)


def test_the_steps_trained_on_are_read_back_to_the_token(base: str) -> None:
    """What precedes the grade in training is what precedes it in scoring."""
    model = judge(base, "think_then_respond")
    for pair in PAIRS:
        trained = model.encoder.response_segment(write(pair, "think_then_respond"))
        text = model.encoder.decode(trained)
        assert model.encoder.segment(scoring.thought(text)) == trained[:-2]


def test_a_label_only_judge_answers_with_a_grade_and_ends(base: str, tmp_path: Path) -> None:
    from models.judge.answers import decode_greedy

    pairs = [p for p in PAIRS if p.grade == 3]
    spec = JudgeSpec(PromptConfig(order="label_only"))
    config = SftConfig(
        optimiser=OptimiserConfig(lr=1e-2, bf16=False, checkpoint_every=1000),
        max_pairs=3,
        epochs=40,
        micro_batch=3,
        accumulate=1,
    )
    train_cot_sft(base, spec, pairs, config, tmp_path / "o", tmp_path / "s", NullSink())
    lm, tokenizer = load_lm(str(tmp_path / "o"))
    model = ScoringJudge(SharedPrefixLM(lm.eval(), bf16=False), PromptEncoder(tokenizer, spec))
    asked: list[Pair] = pairs
    assert decode_greedy(model, asked, 6) == [("3", True)] * len(asked)
    assert (model.score([(p.query, p.product) for p in asked]).argmax(1) == 2).all()
