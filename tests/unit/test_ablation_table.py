"""The ablation's numbers: equal to the plain metrics, resampled by query, averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from models.errors import DataContractError
from models.evaluation import tiers
from models.evaluation.ablation import Answered, Row, ablation_rows, majority_row
from models.evaluation.ablation_report import figure, markdown, wide
from models.evaluation.judge import grade_metrics, probability_metrics
from models.evaluation.query_bootstrap import (
    grade_metrics_under,
    query_weights,
    ratio_under,
    spearman_under,
)

RNG = np.random.default_rng(3)
QUERY_N = np.repeat(np.arange(12), 5)
GOLD_N = RNG.integers(1, 5, len(QUERY_N))
P_NL = RNG.dirichlet(np.ones(4), len(QUERY_N)).round(1) + 0.01  # rounded: ties in the ranks
SAID_N = P_NL.argmax(1) + 1
EXPECTED_N = P_NL @ np.arange(1, 5)


def repeated(weights_Q: np.ndarray) -> np.ndarray:
    """Places of the pairs, each as often as its query weighs."""
    return np.repeat(np.arange(len(QUERY_N)), weights_Q[QUERY_N].astype(int))


def test_a_weighted_metric_is_the_plain_one_on_repeated_pairs() -> None:
    weights_BQ = query_weights(12, 20, seed=1)
    assert (weights_BQ[0] == 1).all() and (weights_BQ.sum(1) == 12).all()
    found = grade_metrics_under(GOLD_N, SAID_N, QUERY_N, weights_BQ)
    rho_B = spearman_under(EXPECTED_N, GOLD_N, QUERY_N, weights_BQ)
    for b, weights_Q in enumerate(weights_BQ):
        at = repeated(weights_Q)
        plain = grade_metrics(GOLD_N[at], SAID_N[at])
        assert {k: found[k][b] for k in plain} == pytest.approx(plain)
        plain = probability_metrics(GOLD_N[at], P_NL[at], GOLD_N[at])
        assert rho_B[b] == pytest.approx(plain["spearman"])


def test_a_grade_that_gold_lacks_is_in_no_mean() -> None:
    """One prediction of it in 160 does not add a fourth class of F1 0; all three places agree."""
    gold_N = np.tile([1, 2, 3], 54)[:160]
    said_N = gold_N.copy()
    said_N[0] = 4
    query_N, weights_BQ = np.arange(160) // 8, query_weights(20, 30, seed=2)
    plain = grade_metrics(gold_N, said_N)
    assert "f1_4" not in plain and plain["macro_f1"] == pytest.approx((2 + 2 * 53 / 107) / 3)
    found = grade_metrics_under(gold_N, said_N, query_N, weights_BQ)
    assert found["macro_f1"][0] == pytest.approx(plain["macro_f1"])
    certain_NL = np.eye(4)[said_N - 1]
    assert tiers.calibrate(certain_NL, gold_N)[1] == pytest.approx(plain["macro_f1"])
    assert np.isnan(found["f1_4"]).all()
    for b, weights_Q in enumerate(weights_BQ):
        at = np.repeat(np.arange(160), weights_Q[query_N].astype(int))
        assert found["macro_f1"][b] == pytest.approx(
            grade_metrics(gold_N[at], said_N[at])["macro_f1"]
        )


def test_resamples_are_averaged_over_the_grades_of_the_full_set() -> None:
    """Query 1 alone holds grade 4. Without it the wrong 4 of query 0 still counts as its F1, 0."""
    gold_N, said_N, query_N = np.array([1, 1, 2, 4]), np.array([1, 4, 2, 4]), np.array([0, 0, 0, 1])
    weights_BQ = np.array([[1, 1], [2, 0]])
    found = grade_metrics_under(gold_N, said_N, query_N, weights_BQ)["macro_f1"]
    assert found.tolist() == pytest.approx([(2 / 3 + 1 + 2 / 3) / 3, (2 / 3 + 1 + 0) / 3])


def test_degenerate_judges_have_kappa_and_rho_zero() -> None:
    weights_BQ, same_N = query_weights(12, 5, seed=0), np.full(len(GOLD_N), 2)
    assert grade_metrics_under(GOLD_N, same_N, QUERY_N, weights_BQ)["kappa"] == pytest.approx(0)
    both = grade_metrics_under(same_N, same_N, QUERY_N, weights_BQ)
    assert both["macro_f1"] == pytest.approx(1) and both["kappa"] == pytest.approx(0)
    assert np.isnan(both["f1_1"]).all()
    assert spearman_under(np.zeros(len(GOLD_N)), GOLD_N, QUERY_N, weights_BQ).tolist() == [0] * 6


def test_a_ratio_is_pooled_over_queries() -> None:
    weights_BQ = np.array([[1, 1], [2, 0], [0, 0]])
    found = ratio_under(np.array([1, 0, 1]), np.ones(3), np.array([0, 0, 1]), weights_BQ)
    assert found[:2].tolist() == pytest.approx([2 / 3, 1 / 2]) and np.isnan(found[2])


def answers(grades: Sequence[int], said: Sequence[int], **more: Any) -> list[dict[str, Any]]:
    """Answers of two pairs a query; all the probability on what is said."""
    return [
        {
            "query_id": f"q{i // 2}",
            "product_id": f"p{i}",
            "grade": g,
            "rating": float(g),
            "p": [float(s == k) for k in (1, 2, 3, 4)],
            **more,
        }
        for i, (g, s) in enumerate(zip(grades, said, strict=True))
    ]


GRADES = [1, 2, 3, 4, 1, 2, 3, 4]
WRONG = [1, 2, 3, 1, 1, 2, 3, 1]


def value(records: list[dict[str, Any]], judge: str, metric: str) -> dict[str, Any]:
    """The one record of a judge and metric."""
    (found,) = [r for r in records if (r["judge"], r["metric"]) == (judge, metric)]
    return found


def test_means_spread_and_gain_over_seeds() -> None:
    worse = Row("worse", "label_only", [Answered(answers(GRADES, WRONG))])
    mixed = Row(
        "mixed",
        "label_only",
        [Answered(answers(GRADES, GRADES)), Answered(answers(GRADES, WRONG))],
    )
    records = ablation_rows([worse, mixed], num_samples=200)
    accuracy = value(records, "mixed", "accuracy")
    assert accuracy["mean"] == pytest.approx((1 + 6 / 8) / 2)
    assert accuracy["spread"] == pytest.approx(0.25 / np.sqrt(2))
    assert (accuracy["seeds"], accuracy["n"]) == (2, 8)
    assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
    assert value(records, "worse", "accuracy")["spread"] is None
    gain = value(records, "mixed", "macro_f1_gain")
    both = [value(records, name, "macro_f1")["mean"] for name in ("worse", "mixed")]
    assert gain["mean"] == pytest.approx(both[1] - both[0])
    assert gain["low"] >= 0, "better or equal on every query, so never worse on a resample"
    assert not any(r["judge"] == "worse" and r["metric"].endswith("gain") for r in records)


def test_the_median_of_the_probabilities_is_read_beside_the_most_likely_grade() -> None:
    given = answers(GRADES, WRONG)
    for row in given:
        if row["grade"] == 2:
            row["p"] = [0.4, 0.15, 0.1, 0.35]  # 1 is likeliest, 2 the middle
    records = ablation_rows([Row("a", "label_only", [Answered(given)])], num_samples=20)
    read = {name: value(records, "a", name)["mean"] for name in ("macro_f1", "median_macro_f1")}
    gold_N = np.array(GRADES)
    assert read["median_macro_f1"] == grade_metrics(gold_N, np.array(WRONG))["macro_f1"]
    assert read["macro_f1"] < read["median_macro_f1"]
    kappa = grade_metrics(gold_N, np.array(WRONG))["kappa"]
    assert value(records, "a", "median_kappa")["mean"] == pytest.approx(kappa)
    headings, _ = wide(records)
    assert {"F1 median", "kappa median"} <= set(headings)


def test_a_gain_is_that_of_seed_with_seed() -> None:
    """Seeds that move both rows alike move no gain."""
    good, bad = Answered(answers(GRADES, GRADES)), Answered(answers(GRADES, WRONG))
    rows = [Row(name, "label_only", [good, bad]) for name in "ab"]
    records = ablation_rows(rows, num_samples=200)
    assert value(records, "b", "macro_f1")["spread"] > 0.1
    assert value(records, "b", "macro_f1_gain")["spread"] == 0
    crossed = [rows[0], Row("b", "label_only", [bad, good])]
    gain = value(ablation_rows(crossed, num_samples=200), "b", "macro_f1_gain")
    assert gain["mean"] == pytest.approx(0) and gain["spread"] > 0.2
    headings, lines = wide(ablation_rows(crossed, num_samples=200))
    assert "] ± " in lines[1][headings.index("gain [95 %]")]


def test_equal_judges_have_no_gain_on_any_resample() -> None:
    rows = [Row(name, "label_only", [Answered(answers(GRADES, WRONG))]) for name in "ab"]
    gain = value(ablation_rows(rows, num_samples=200), "b", "macro_f1_gain")
    assert (gain["mean"], gain["low"], gain["high"]) == (0, 0, 0)


def test_steps_and_samples_are_read_where_there_are_some() -> None:
    steps = "query: a\nitem: b\ncategory: {}\nattributes: none\ndecision: excellent"
    given = answers(GRADES, GRADES)
    for row, kind in zip(given, ("match", "mismatch", "match"), strict=False):
        row |= {"response": f"4\n{steps.format(kind)}", "finished": True}
    given[2]["finished"] = False
    counts = zip(range(2), (5, 2), strict=True)
    samples = [{"query_id": f"q{i}", "product_id": "p", "n": 5, "correct": c} for i, c in counts]
    records = ablation_rows([Row("a", "respond_then_think", [Answered(given, samples)])], 100)
    adherence = value(records, "a", "rule_adherence")
    assert (adherence["mean"], adherence["n"]) == (pytest.approx(1 / 3), 3)
    contradictions = value(records, "a", "contradiction_rate")
    assert (contradictions["mean"], contradictions["n"]) == (pytest.approx(1 / 3), 3)
    assert value(records, "a", "pass@1")["mean"] == pytest.approx((1 + 2 / 5) / 2)
    assert value(records, "a", "pass@5")["n"] == 2
    label = ablation_rows([Row("a", "label_only", [Answered(given)])], 100)
    assert {r["metric"] for r in label} >= {"spearman"}
    assert not {r["metric"] for r in label} & {"rule_adherence", "pass@1", "contradiction_rate"}


def test_rows_about_other_pairs_are_refused() -> None:
    rows = [
        Row("a", "label_only", [Answered(answers(GRADES, GRADES))]),
        Row("b", "label_only", [Answered(answers(GRADES[::-1], GRADES))]),
    ]
    with pytest.raises(DataContractError, match="other pairs in 'b'"):
        ablation_rows(rows)


def test_the_report_has_a_line_and_a_point_a_judge() -> None:
    good = answers(GRADES, GRADES)
    rows = [
        majority_row(good, 2),
        Row("SFT", "label_only", [Answered(good), Answered(answers(GRADES, WRONG))]),
    ]
    records = ablation_rows(rows, 100)
    headings, lines = wide(records)
    assert headings[:4] == ["judge", "macro-F1 [95 %]", "± seeds", "gain [95 %]"]
    assert [line[0] for line in lines] == ["majority", "SFT"]
    cells = dict(zip(headings, lines[0], strict=True))
    assert (
        cells["acc"] == "25.0" and cells["rho"] == cells["± seeds"] == cells["gain [95 %]"] == "-"
    )
    text = markdown(records, "caption")
    assert text.startswith("caption\n\n| judge |") and text.count("\n| ") == 4
    (axes,) = figure(records, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["majority", "SFT"]
    means = [100 * value(records, n, "macro_f1")["mean"] for n in ("majority", "SFT")]
    assert axes.lines[0].get_xdata().tolist() == pytest.approx(means)
