"""Judge metrics under resampled queries, many resamples at once.

Consumes one judge's grades on labelled pairs and integer weights of their queries -> produces each
metric for each row of weights. Weight 1 everywhere gives the metric itself; multinomial weights
give its bootstrap distribution. Pairs of a query stay together: they are not independent.

Shapes: B resamples, Q queries, N pairs, L grades.
"""

from __future__ import annotations

import numpy as np

from models.types import GRADES


def query_weights(num_queries: int, num_samples: int, seed: int) -> np.ndarray:
    """[1 + B, Q]: ones, then how often each query is drawn in B draws of Q with replacement."""
    rng = np.random.default_rng(seed)
    drawn_BQ = rng.multinomial(num_queries, np.full(num_queries, 1 / num_queries), num_samples)
    return np.vstack([np.ones((1, num_queries)), drawn_BQ])


def grade_metrics_under(
    gold_N: np.ndarray, predicted_N: np.ndarray, query_N: np.ndarray, weights_BQ: np.ndarray
) -> dict[str, np.ndarray]:
    """`grade_metrics` for every row of weights, each [B].

    As there: a grade absent from gold has no F1 (NaN here) and is left out of the mean, and kappa
    of a constant prediction is 0. Gold is that of all pairs, so that resamples are averaged over
    the same grades; one that a resample neither holds nor predicts has no F1 in it.
    """
    count = len(GRADES)
    cells_QLL = np.zeros((weights_BQ.shape[1], count, count))
    np.add.at(cells_QLL, (query_N, gold_N - 1, predicted_N - 1), 1.0)
    cells_BLL = np.tensordot(weights_BQ, cells_QLL, axes=1)
    total_B = cells_BLL.sum((1, 2))
    hit_BL = np.diagonal(cells_BLL, axis1=1, axis2=2)
    gold_BL, said_BL = cells_BLL.sum(2), cells_BLL.sum(1)
    grades = np.array(GRADES)
    cost_LL = (grades[:, None] - grades[None, :]) ** 2.0
    with np.errstate(invalid="ignore", divide="ignore"):
        f1_BL = 2 * hit_BL / (gold_BL + said_BL)
        f1_BL[:, cells_QLL.sum((0, 2)) == 0] = np.nan
        chance_B = np.einsum("bi,ij,bj->b", gold_BL, cost_LL, said_BL) / total_B
        kappa_B = 1 - (cells_BLL * cost_LL).sum((1, 2)) / chance_B
        accuracy_B = hit_BL.sum(1) / total_B
    out = {"macro_f1": np.nanmean(f1_BL, axis=1), "accuracy": accuracy_B}
    out |= {f"f1_{g}": f1_BL[:, g - 1] for g in GRADES}
    return out | {"kappa": np.where(np.isfinite(kappa_B), kappa_B, 0.0)}


def spearman_under(
    x_N: np.ndarray, y_N: np.ndarray, query_N: np.ndarray, weights_BQ: np.ndarray
) -> np.ndarray:
    """Spearman's rho for every row of weights, [B]; 0 where x or y is constant.

    A pair of weight w counts as w equal pairs: mid-ranks among all of them, then Pearson's r.
    """
    weight_BN = weights_BQ[:, query_N]
    total_B1 = weight_BN.sum(1, keepdims=True)
    rank_x_BN, rank_y_BN = _midranks(x_N, weight_BN), _midranks(y_N, weight_BN)
    mean_B1 = (total_B1 + 1) / 2
    dx_BN, dy_BN = rank_x_BN - mean_B1, rank_y_BN - mean_B1
    covariance_B = (weight_BN * dx_BN * dy_BN).sum(1)
    spread_B = np.sqrt((weight_BN * dx_BN**2).sum(1) * (weight_BN * dy_BN**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho_B = covariance_B / spread_B
    return np.where(spread_B > 1e-9, rho_B, 0.0)


def _midranks(x_N: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
    """Mid-rank of each value among the weighted ones, [B, N]."""
    _, group_N = np.unique(x_N, return_inverse=True)
    order_N = np.argsort(group_N, kind="stable")
    starts = np.flatnonzero(np.diff(group_N[order_N], prepend=-1))
    weight_BG = np.add.reduceat(weight_BN[:, order_N], starts, axis=1)
    before_BG = np.cumsum(weight_BG, axis=1) - weight_BG
    ranks_BG = before_BG + (weight_BG + 1) / 2
    return ranks_BG[:, group_N]


def ratio_under(
    part_M: np.ndarray, whole_M: np.ndarray, query_M: np.ndarray, weights_BQ: np.ndarray
) -> np.ndarray:
    """sum part / sum whole for every row of weights, [B]; NaN where the whole is 0.

    M items of any number a query: decoded responses, sampled prompts.
    """
    count = weights_BQ.shape[1]
    part_Q = np.bincount(query_M, part_M, count)
    whole_Q = np.bincount(query_M, whole_M, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights_BQ @ part_Q) / (weights_BQ @ whole_Q)
