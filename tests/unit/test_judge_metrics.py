"""Judge metrics against arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from models.evaluation.judge import (
    expected_calibration_error,
    grade_metrics,
    majority_grade,
    probability_metrics,
    reasoning_metrics,
)
from models.evaluation.judge_table import gold_verdicts
from models.teacher.response import parse_response, render_response
from tests.builders import make_pair, make_verdicts


def test_macro_f1_is_the_mean_of_the_class_f1s() -> None:
    gold, predicted = np.array([1, 1, 2, 4]), np.array([1, 2, 2, 4])
    got = grade_metrics(gold, predicted)
    # grade 1: p 1, r 1/2 -> 2/3; grade 2: p 1/2, r 1 -> 2/3; grade 4: 1; grade 3 absent
    assert got["f1_1"] == pytest.approx(2 / 3) and got["f1_2"] == pytest.approx(2 / 3)
    assert "f1_3" not in got
    assert got["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert got["accuracy"] == pytest.approx(3 / 4)


def test_no_contradiction_rate_where_nothing_states_grade_and_verdicts() -> None:
    got = reasoning_metrics([parse_response("4", "label_only", True)] * 3, [None] * 3)
    assert got == {"rule_adherence": 1.0, "malformed_rate": 0.0}


def test_kappa_of_a_constant_is_zero_and_of_gold_is_one() -> None:
    gold = np.array([1, 2, 3, 4])
    assert grade_metrics(gold, np.full(4, 3))["kappa"] == 0
    assert grade_metrics(gold, gold)["kappa"] == pytest.approx(1)


def test_probability_metrics_of_a_certain_judge() -> None:
    gold = np.array([1, 2, 3, 4])
    got = probability_metrics(gold, np.eye(4), gold)
    assert got["spearman"] == pytest.approx(1)
    assert got["nll"] == pytest.approx(0) and got["ece"] == pytest.approx(0)


def test_order_is_compared_with_the_raters_mean_and_not_the_rounded_grade() -> None:
    p_NL = np.array([[0.0, 0.0, 0.6, 0.4], [0.0, 0.0, 0.4, 0.6], [1.0, 0.0, 0.0, 0.0]])
    gold = np.array([3, 3, 1])
    assert probability_metrics(gold, p_NL, np.array([3.33, 2.67, 1.0]))["spearman"] == 0.5
    assert probability_metrics(gold, p_NL, np.array([2.67, 3.33, 1.0]))["spearman"] == 1.0


def test_constant_probabilities_have_no_rank_correlation() -> None:
    gold = np.array([1, 4])
    got = probability_metrics(gold, np.full((2, 4), 0.25), gold)
    assert got["spearman"] == 0
    assert got["nll"] == pytest.approx(np.log(4))


def test_ece_is_the_gap_between_confidence_and_accuracy() -> None:
    # one bin: confidence 0.95, half right -> |0.5 - 0.95|
    assert expected_calibration_error(
        np.full(4, 0.95), np.array([True, True, False, False])
    ) == pytest.approx(0.45)


def test_reasoning_metrics_count_contradictions_and_broken_responses() -> None:
    good = render_response("q", "i", make_verdicts("match"), 4, "respond_then_think")
    bad = render_response("q", "i", make_verdicts("mismatch"), 4, "respond_then_think")
    responses = [parse_response(t, "respond_then_think") for t in (good, bad, "???", good)]
    gold = [make_verdicts("match"), make_verdicts("match"), None, make_verdicts("related")]
    got = reasoning_metrics(responses, gold)
    assert got["rule_adherence"] == pytest.approx(2 / 4)
    assert got["contradiction_rate"] == pytest.approx(1 / 3)
    assert got["malformed_rate"] == pytest.approx(1 / 4)
    assert got["category_accuracy"] == pytest.approx(1 / 3)


def test_verdicts_of_a_store_that_contradict_its_grade_are_no_gold() -> None:
    right = make_pair("red sofa", grade=4, verdicts=make_verdicts("match"))
    wrong = make_pair("blue sofa", grade=4, verdicts=make_verdicts("mismatch"))
    store = SimpleNamespace(pairs=lambda split: [right, wrong, make_pair("sofa")])
    assert gold_verdicts(store) == {right.key: right.verdicts}  # type: ignore[arg-type]


def test_majority_prefers_the_smaller_grade_on_a_tie() -> None:
    assert majority_grade([4, 4, 2, 2, 1]) == 2
