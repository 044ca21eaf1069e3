"""The first estimate of the grade from words alone."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from models.judge.config import PromptConfig
from models.judge.prompt import PromptEncoder
from models.judge.spec import JudgeSpec
from models.lm.weights import load_tokenizer
from models.rules import estimate as module
from models.rules.association import WordAssociations
from models.rules.estimate import (
    FOLDS,
    AdditiveModel,
    GradeEstimate,
    _basis,
    _fold,
    _quantiles,
    _ridge,
)
from models.rules.evidence import NUM_FEATURES, Evidence, gather
from models.rules.words import WordWeights
from models.types import Pair, Product, Query
from tests.builders import WORDS, make_pairs, make_tiny_judge

WEIGHTS = WordWeights(1, {})


def read(pair: Pair) -> Evidence:
    """The evidence of a store whose words weigh alike."""
    return gather(pair.query, pair.product, weights=WEIGHTS)


def graded_by_words(count: int, seed: int = 0, query: str = "q{}") -> list[Pair]:
    """Pairs whose grade is one more than the query's words found, of three."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        words = rng.sample(WORDS, 6)
        grade = rng.randint(1, 4)
        title = words[: grade - 1] + words[3 : 3 + 4 - grade]
        asked = Query(query.format(i), " ".join(words[:3]))
        out.append(Pair(asked, Product(str(i), " ".join(title)), grade))
    return out


def test_it_learns_what_words_say_and_orders_new_queries_by_it() -> None:
    estimate = GradeEstimate.fit(graded_by_words(200), read)
    assert estimate is not None
    new = graded_by_words(200, seed=1, query="new{}")
    values = [estimate(p.query, p.product, read(p)) for p in new]
    assert all(1.0 <= v <= 4.0 for v in values)
    assert spearmanr(values, [p.grade for p in new]).statistic > 0.9
    assert np.mean([round(v) == p.grade for v, p in zip(values, new, strict=True)]) > 0.75


def test_raters_are_finer_than_the_grade() -> None:
    pairs = graded_by_words(100)
    finer = [replace(p, raters=p.grade - 0.3 * (i % 2)) for i, p in enumerate(pairs)]
    plain, fine = GradeEstimate.fit(pairs, read), GradeEstimate.fit(finer, read)
    assert plain is not None and fine is not None
    assert plain.models[0] != fine.models[0]


@pytest.mark.parametrize("bent_from", [10, 1000])
def test_a_training_query_is_read_without_its_own_labels(
    bent_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even through the words it shares with the queries that are read, or through the knots."""
    monkeypatch.setattr(module, "BENT_FROM", bent_from)
    pairs = graded_by_words(60)
    lying = [replace(p, grade=1) if p.query.query_id == "q0" else p for p in pairs]
    truth, lie = GradeEstimate.fit(pairs, read), GradeEstimate.fit(lying, read)
    assert truth is not None and lie is not None
    row = 1 + _fold(pairs[0].query, FOLDS)
    assert truth.models[row] == lie.models[row]
    asked = (pairs[0].query, pairs[0].product, read(pairs[0]))
    assert pairs[0].grade != 1 and truth(*asked) == lie(*asked)
    twin = replace(pairs[0].query, query_id="new", text=pairs[0].query.text.upper()), *asked[1:]
    assert truth(*twin) == lie(*twin), "the same text under another id"
    new = replace(pairs[0].query, text=f"{pairs[0].query.text} zzz"), *asked[1:]
    assert truth(*new) != lie(*new)


def test_new_and_training_queries_are_read_with_different_models() -> None:
    pairs = graded_by_words(60)
    estimate = GradeEstimate.fit(pairs, read)
    assert estimate is not None
    product, evidence = pairs[0].product, read(pairs[0])
    own = replace(estimate, trained=frozenset())
    assert estimate(pairs[0].query, product, evidence) != own(pairs[0].query, product, evidence)
    other = Query("never", "x")
    assert estimate(other, product, evidence) == own(other, product, evidence)


def test_ridge_leaves_the_constant_free_and_shrinks_the_rest() -> None:
    x_NF = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    y_N = np.array([2.0, 4.0, 2.0, 4.0])
    slope, constant = _ridge(x_NF, y_N, 0.03)
    # unit variance: x / .5, so the slope is 2 / (1 + penalty), about the mean 3
    assert slope == pytest.approx(2 / 1.03)
    assert constant + slope * 0.5 == pytest.approx(3.0)
    assert _ridge(x_NF[:0], y_N[:0], 0.03).tolist() == [0.0, 2.5]


def test_curves_bend_where_a_store_has_the_queries_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grades that rise and fall again with the words found: no line says that."""
    rng = random.Random(0)
    pairs = []
    for i in range(300):
        words = rng.sample(WORDS, 8)
        found = rng.randint(0, 4)
        title = words[:found] + words[4 : 8 - found] + ["x", "y"]
        grade = (1, 3, 4, 3, 1)[found]
        asked = Query(f"q{i}", " ".join(words[:4]))
        pairs.append(Pair(asked, Product(str(i), " ".join(title)), grade))
    found_rho = {}
    queries = len({p.query.text for p in pairs})
    assert queries > 200
    for bent_from in (queries - 1, queries + 1):
        monkeypatch.setattr(module, "BENT_FROM", bent_from)
        estimate = GradeEstimate.fit(pairs[:], read)
        assert estimate is not None
        assert any(map(len, estimate.models[0].bends)) == (bent_from < queries)
        # a hump needs curves once the products of overlaps are taken away
        flat = [
            AdditiveModel(m.associations, m.bends, _without_products(m), m.knots)
            for m in estimate.models
        ]
        bare = replace(estimate, models=flat)
        values = [bare(p.query, p.product, read(p)) for p in pairs]
        found_rho[bent_from] = spearmanr(values, [p.grade for p in pairs]).statistic
    assert found_rho[queries - 1] > found_rho[queries + 1] + 0.2


def _without_products(model: AdditiveModel) -> list[float]:
    """The model's weights with those of the products of overlaps set to 0."""
    weights = np.array(model.weights)
    products = NUM_FEATURES * (NUM_FEATURES + 1) // 2
    weights[-1 - products : -1] = 0.0
    return weights.tolist()


def test_a_hat_is_one_at_its_bend_and_a_curve_is_level_outside() -> None:
    x_NF = np.zeros((4, NUM_FEATURES))
    x_NF[:, 0] = [-5.0, 0.0, 1.5, 9.0]
    bends: list[list[float]] = [[0.0, 1.0, 2.0], *([[]] * (NUM_FEATURES - 1))]
    hats_N3 = _basis(x_NF, bends)[:, NUM_FEATURES : NUM_FEATURES + 3]
    assert hats_N3.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0, 1]]


def test_quantiles_weigh_the_pairs() -> None:
    value_N = np.array([3.0, 1.0, 2.0])
    knots = _quantiles(value_N, np.array([1.0, 1.0, 2.0]))
    assert np.all(np.diff(knots) >= 0)
    assert knots[-1] == 3.0 and knots[24] == pytest.approx(2.0)  # three quarters lie at or below 2


def test_round_trip_and_no_pairs() -> None:
    pairs = graded_by_words(40)
    estimate = GradeEstimate.fit(pairs, read)
    assert estimate is not None
    again = GradeEstimate.from_json(json.loads(json.dumps(estimate.to_json())))
    for pair in pairs:
        asked = (pair.query, pair.product, read(pair))
        assert again(*asked) == estimate(*asked)
    assert GradeEstimate.fit([], read) is None


def test_one_query_teaches_nothing_of_the_others() -> None:
    """Its own fold is all there is: the middle of the grades, and no knot to prefer a side."""
    one = [replace(p, grade=3) for p in graded_by_words(5, query="same")]
    estimate = GradeEstimate.fit(one, read)
    assert estimate is not None
    assert estimate(one[0].query, one[0].product, read(one[0])) == 2.5


def test_where_knots_coincide_their_middle_counts() -> None:
    model = AdditiveModel(WordAssociations({}), [], [], [1.0, 2.0, 2.0, 3.0])
    assert [model.grade(v) for v in (0.0, 2.0, 2.5, 9.0)] == [1.0, 2.5, 3.25, 4.0]


def test_the_prompt_ends_with_the_estimate(tmp_path: Path) -> None:
    pairs: list[Pair] = make_pairs(40)
    spec = JudgeSpec.fit(PromptConfig(), pairs, [p.product for p in pairs])
    tokenizer = load_tokenizer(make_tiny_judge(tmp_path, pairs))
    encoder = PromptEncoder(tokenizer, spec)
    pair = pairs[0]
    evidence = gather(pair.query, pair.product, spec.kinds, spec.weights)
    assert spec.estimate is not None
    said = f"words say {spec.estimate(pair.query, pair.product, evidence):.1f}"
    text = tokenizer.decode(encoder.item_segment(pair.query, pair.product))
    assert "".join(text.split()).endswith("".join(said.split()))
