"""How good a judge is: agreement with humans, calibration, and reasoning that fits its grade.

Consumes probabilities or grades and gold labels -> produces one row of plain numbers. N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.teacher.response import ParseOutcome, Response, contradiction_rate
from models.types import GRADES, Verdicts


def class_f1(gold_N: np.ndarray, predicted_N: np.ndarray) -> dict[int, float]:
    """F1 by grade, of the grades in gold; their mean is macro-F1 [TaoSR1 s4].

    A grade absent from gold has no F1 and is left out of the mean, whether it is predicted or not:
    judges of the same pairs are averaged over the same grades.
    """
    from sklearn.metrics import f1_score

    present = [g for g in GRADES if (gold_N == g).any()]
    f1 = f1_score(gold_N, predicted_N, labels=present, average=None, zero_division=0)
    return {g: float(v) for g, v in zip(present, f1, strict=True)}


def grade_metrics(gold_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """Macro-F1, each `class_f1`, accuracy and quadratic kappa [TaoSR1 s4].

    Kappa of a constant prediction is 0.
    """
    from sklearn.metrics import cohen_kappa_score

    f1 = class_f1(gold_N, predicted_N)
    out = {
        "macro_f1": float(np.mean(list(f1.values()))),
        "accuracy": float(np.mean(gold_N == predicted_N)),
    }
    out |= {f"f1_{g}": v for g, v in f1.items()}
    kappa = cohen_kappa_score(gold_N, predicted_N, weights="quadratic", labels=list(GRADES))
    out["kappa"] = 0.0 if np.isnan(kappa) else float(kappa)
    return out


def probability_metrics(
    gold_N: np.ndarray, probabilities_NL: np.ndarray, rating_N: np.ndarray
) -> dict[str, float]:
    """Spearman of the expected grade with the rating, NLL (nats), ECE (10 bins).

    rating_N: `Pair.rating`, finer than the grade where several raters were asked.
    """
    from scipy.stats import spearmanr

    expected_N = probabilities_NL @ np.array(GRADES)
    constant = np.ptp(expected_N) < 1e-9 or np.ptp(rating_N) == 0
    rho = 0.0 if constant else float(spearmanr(expected_N, rating_N).statistic)
    picked_N = probabilities_NL[np.arange(len(gold_N)), gold_N - 1]
    confidence_N = probabilities_NL.max(1)
    right_N = probabilities_NL.argmax(1) + 1 == gold_N
    return {
        "spearman": rho,
        "nll": float(-np.log(np.clip(picked_N, 1e-9, 1)).mean()),
        "ece": expected_calibration_error(confidence_N, right_N),
    }


def expected_calibration_error(
    confidence_N: np.ndarray, right_N: np.ndarray, bins: int = 10
) -> float:
    """sum_b n_b / N |accuracy_b - confidence_b| over equal-width bins of confidence in [0, 1]."""
    which_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gaps = [
        abs(right_N[which_N == b].mean() - confidence_N[which_N == b].mean())
        * (which_N == b).mean()
        for b in range(bins)
        if (which_N == b).any()
    ]
    return float(sum(gaps))


def reasoning_metrics(
    responses: Sequence[Response], gold: Sequence[Verdicts | None]
) -> dict[str, float]:
    """Of decoded responses: rule_adherence, contradiction_rate, verdict accuracy, malformed_rate.

    rule_adherence: share that is well formed and whose grade its own verdicts allow.
    contradiction_rate: left out where no response states both. category_accuracy: share, of pairs
    with gold verdicts, whose category verdict is right.
    """
    if not responses:
        return {}
    well = sum(r.outcome is ParseOutcome.OK for r in responses)
    known = [(r, g) for r, g in zip(responses, gold, strict=True) if g is not None]
    out = {
        "rule_adherence": sum(r.sound for r in responses) / len(responses),
        "malformed_rate": 1 - well / len(responses),
    }
    if (rate := contradiction_rate(responses)) is not None:
        out["contradiction_rate"] = rate
    if known:
        right = sum(r.verdicts is not None and r.verdicts.category == g.category for r, g in known)
        out["category_accuracy"] = right / len(known)
    return out


def majority_grade(grades: Sequence[int]) -> int:
    """The most frequent grade of the training split; the smaller one on a tie."""
    return min(GRADES, key=lambda g: (-sum(x == g for x in grades), g))
