"""The gate as a pure function: each rule, each edge, and that being better is never held."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ArtifactError
from models.evaluation.gate import Contender, Decision, GateConfig, Outcome, Reason, decide
from models.evaluation.outcomes import Outcomes, judge_outcomes, retrieval_outcomes
from models.evaluation.retrieval import ndcg
from models.evaluation.tiers import CumPT

CONFIG = GateConfig(bootstrap_samples=200)
UNITS = 60
NUMBERS = {"kappa": 0.5, "macro_f1": 0.4, "ndcg@10": 0.3}


def make_outcomes(
    values: list[float], evaluation_set: str = "set", segments: str = "ab", **numbers: float
) -> Outcomes:
    """One unit a value; the segments take turns."""
    units = [f"u{i:03d}" for i in range(len(values))]
    return Outcomes(
        evaluation_set,
        dict(zip(units, values, strict=True)),
        {u: segments[i % len(segments)] for i, u in enumerate(units)},
        NUMBERS | numbers,
    )


def make_contender(
    name: str, judge: list[float], retrieval: list[float], **changes: Any
) -> Contender:
    """A healthy release with these values."""
    outcomes = {"judge": make_outcomes(judge), "retrieval": make_outcomes(retrieval)}
    labels = {role: f"{role}@{name}" for role in ("judge", "embedder", "index")}
    return replace(Contender(labels, outcomes, index_recall=0.99), **changes)


HALF = [0.5] * UNITS
BETTER = [0.6] * UNITS
CHAMPION = make_contender("old", HALF, HALF)
WINNER = make_contender("new", HALF, BETTER)


def test_pairs_of_one_query_are_one_draw() -> None:
    """Eight queries better and five worse, ten pairs each: many pairs, few draws."""
    values = [1.0] * 80 + [0.0] * 50 + [0.5] * 170
    queries = {f"u{i:03d}": f"q{i // 10}" for i in range(300)}
    alone = [make_contender(n, v, [0.5] * 300) for n, v in (("n", values), ("o", [0.5] * 300))]
    pairs = [with_outcomes(contender, "judge", queries=queries) for contender in alone]

    def judge_note(contenders: list[Contender]) -> tuple[float, float, Any]:
        rows = {r.name: r for r in decide(*contenders, GateConfig()).reasons}
        note = rows["judge accuracy, all"].note
        low, high = note.split("[")[1].split("]")[0].split(", ")
        return float(low), float(high), rows["judge: queries"].candidate

    low, high, count = judge_note(alone)
    low_q, high_q, count_q = judge_note(pairs)
    assert (count, count_q) == (300, 30)
    assert low > 0 > low_q and high_q - low_q > 2 * (high - low)


def with_outcomes(contender: Contender, role: str, **changes: Any) -> Contender:
    """`contender` with other outcomes of one role."""
    changed = replace(contender.outcomes[role], **changes)
    return replace(contender, outcomes={**contender.outcomes, role: changed})


def failed(decision: Decision) -> list[str]:
    """Names of the failed checks."""
    return [r.name for r in decision.failed]


def test_a_clear_win_is_promoted_with_every_check_in_a_row() -> None:
    decision = decide(WINNER, CHAMPION, CONFIG)
    assert (decision.outcome, failed(decision)) == (Outcome.PROMOTE, [])
    assert [r.name for r in decision.reasons] == [
        "parts belong together",
        "nothing withdrawn",
        "judge kappa",
        "judge macro-F1",
        "retrieval nDCG@10",
        "index recall@10",
        "judge: same evaluation set",
        "judge: queries",
        "judge accuracy, all",
        "judge accuracy, a",
        "judge accuracy, b",
        "retrieval: same evaluation set",
        "retrieval: queries",
        "retrieval nDCG@10, all",
        "retrieval nDCG@10, a",
        "retrieval nDCG@10, b",
        "a clear gain",
    ]
    gain = decision.reasons[-1]
    assert gain.candidate == pytest.approx(0.1 / 0.5) and gain.bound == CONFIG.min_gain
    (kappa,) = (r for r in decision.reasons if r.name == "judge kappa")
    assert (kappa.candidate, kappa.champion, kappa.bound) == (0.5, 0.5, 0.2)
    assert "retrieval +20.0 % (significant)" in decision.summary


def test_the_decision_does_not_depend_on_the_order_of_units() -> None:
    """Not even the ends of the bootstrap's interval."""
    new = make_contender("new", HALF, [0.45 + 0.01 * (i % 17) for i in range(UNITS)])
    values = new.outcomes["retrieval"].values
    turned = with_outcomes(new, "retrieval", values=dict(reversed(values.items())))
    assert decide(turned, CHAMPION, CONFIG) == decide(new, CHAMPION, CONFIG)


# floors


FLOORS: Mapping[str, Callable[[float | None], Contender]] = {
    "judge kappa": lambda v: _number("judge", "kappa", v),
    "judge macro-F1": lambda v: _number("judge", "macro_f1", v),
    "retrieval nDCG@10": lambda v: _number("retrieval", "ndcg@10", v),
    "index recall@10": lambda v: replace(WINNER, index_recall=v),
}


def _number(role: str, name: str, value: float | None) -> Contender:
    numbers = dict(NUMBERS)
    del numbers[name]
    if value is not None:
        numbers[name] = value
    return with_outcomes(WINNER, role, numbers=numbers)


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_low_or_nan_or_missing_holds(name: str, value: float | None) -> None:
    decision = decide(FLOORS[name](value), CHAMPION, CONFIG)
    assert (decision.outcome, failed(decision)) == (Outcome.HOLD, [name])
    assert name in decision.summary


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_that_is_reached_exactly_is_reached(name: str) -> None:
    (bound,) = (r.bound for r in decide(WINNER, CHAMPION, CONFIG).reasons if r.name == name)
    assert isinstance(bound, float)
    assert decide(FLOORS[name](bound), CHAMPION, CONFIG).outcome is Outcome.PROMOTE
    assert decide(FLOORS[name](bound - 1e-6), CHAMPION, CONFIG).outcome is Outcome.HOLD


# first, same, withdrawn, foreign


def test_the_first_is_promoted_and_its_failed_floors_are_noted() -> None:
    weak = _number("judge", "kappa", 0.0)
    decision = decide(weak, None, CONFIG)
    assert decision.outcome is Outcome.PROMOTE and failed(decision) == ["judge kappa"]
    assert "noted" in decision.as_markdown() and "first" in decision.summary


def test_nothing_to_do_where_the_candidate_is_the_champion() -> None:
    decision = decide(CHAMPION, CHAMPION, CONFIG)
    assert decision.outcome is Outcome.HOLD and len(decision.reasons) == 1
    assert "nothing to do" in decision.summary


def test_a_withdrawn_part_or_teacher_holds_a_winner() -> None:
    decision = decide(replace(WINNER, withdrawn=("judge 3",)), CHAMPION, CONFIG)
    assert (decision.outcome, failed(decision)) == (Outcome.HOLD, ["nothing withdrawn"])
    assert "judge 3" in decision.summary


def test_parts_that_do_not_belong_together_hold() -> None:
    decision = decide(replace(WINNER, broken_lineage="no teacher"), CHAMPION, CONFIG)
    assert (decision.outcome, failed(decision)) == (Outcome.HOLD, ["parts belong together"])


@pytest.mark.parametrize("role", ["judge", "retrieval"])
def test_another_evaluation_set_is_not_compared(role: str) -> None:
    other = with_outcomes(CHAMPION, role, evaluation_set="another")
    decision = decide(WINNER, other, CONFIG)
    assert (decision.outcome, failed(decision)) == (
        Outcome.HOLD,
        [f"{role}: same evaluation set"],
    )
    assert not any(r.name.startswith(f"{role} ") and "," in r.name for r in decision.reasons)
    how = replace(other, not_comparable="its files are gone; do this: force")
    assert "do this: force" in decide(WINNER, how, CONFIG).summary


@pytest.mark.parametrize("role", ["judge", "retrieval"])
@pytest.mark.parametrize("side", ["candidate", "champion"])
def test_what_was_not_measured_holds(role: str, side: str) -> None:
    def without(contender: Contender) -> Contender:
        rest = {k: v for k, v in contender.outcomes.items() if k != role}
        return replace(contender, outcomes=rest)

    pair = (without(WINNER), CHAMPION) if side == "candidate" else (WINNER, without(CHAMPION))
    decision = decide(*pair, CONFIG)
    assert decision.outcome is Outcome.HOLD
    assert f"{role}: same evaluation set" in failed(decision)


@pytest.mark.parametrize("values", [{}, {"u000": 0.5}, {"u000": math.nan}])
def test_no_units_other_units_and_nan_units_hold(values: dict[str, float]) -> None:
    decision = decide(with_outcomes(WINNER, "judge", values=values), CHAMPION, CONFIG)
    assert (decision.outcome, failed(decision)) == (Outcome.HOLD, ["judge: same evaluation set"])


def test_a_nan_unit_of_both_and_no_unit_of_both_hold() -> None:
    for values, said in (({"u": math.nan}, "finite"), ({}, "no units")):
        pair = (with_outcomes(c, "judge", values=values) for c in (WINNER, CHAMPION))
        decision = decide(*pair, CONFIG)
        assert decision.outcome is Outcome.HOLD and said in decision.summary


# gains and drops


def test_no_gain_holds_and_a_small_or_unsure_gain_asks() -> None:
    same = make_contender("new", HALF, HALF)
    assert failed(decide(same, CHAMPION, CONFIG)) == ["a clear gain"]
    assert decide(same, CHAMPION, CONFIG).outcome is Outcome.HOLD
    small = make_contender("new", HALF, [0.5 * 1.005] * UNITS)
    assert decide(small, CHAMPION, CONFIG).outcome is Outcome.ASK
    spread = [0.5 + (0.3 if i % 4 < 2 else -0.27) for i in range(UNITS)]
    unsure = decide(make_contender("new", HALF, spread), CHAMPION, CONFIG)
    assert unsure.outcome is Outcome.ASK and failed(unsure) == ["a clear gain"]
    assert "not significant" in unsure.summary


def test_a_judge_that_gains_pays_for_an_equal_retriever_and_not_for_a_worse_one() -> None:
    assert decide(make_contender("new", BETTER, HALF), CHAMPION, CONFIG).outcome is Outcome.PROMOTE
    worse = decide(make_contender("new", BETTER, [0.45] * UNITS), CHAMPION, CONFIG)
    assert worse.outcome is Outcome.HOLD and "retrieval nDCG@10, all" in failed(worse)
    little = decide(make_contender("new", BETTER, [0.495] * UNITS), CHAMPION, CONFIG)
    assert little.outcome is Outcome.PROMOTE


def test_a_slice_that_drops_holds_although_the_whole_gains() -> None:
    uneven = [0.9 if i % 2 else 0.4 for i in range(UNITS)]
    decision = decide(make_contender("new", HALF, uneven), CHAMPION, CONFIG)
    assert (decision.outcome, failed(decision)) == (Outcome.HOLD, ["retrieval nDCG@10, a"])
    within = [0.9 if i % 2 else 0.46 for i in range(UNITS)]
    assert decide(make_contender("new", HALF, within), CHAMPION, CONFIG).outcome is Outcome.PROMOTE


def test_a_slice_that_may_have_dropped_by_chance_asks() -> None:
    """Segment a loses .065 on average: half of it rises by .4, half falls by .53."""
    change = {0: 0.4, 2: -0.53}
    values = [1.0 if i % 2 else 0.5 + change[i % 4] for i in range(UNITS)]
    champion = make_contender("old", HALF, [0.5] * UNITS)
    decision = decide(make_contender("new", HALF, values), champion, CONFIG)
    (row,) = (r for r in decision.reasons if r.name == "retrieval nDCG@10, a")
    assert row.candidate == pytest.approx(0.5 + (0.4 - 0.53) / 2)
    assert (decision.outcome, failed(decision)) == (Outcome.ASK, [row.name])
    assert f"15 better, 15 worse of {UNITS // 2}" in row.note


def test_a_slice_of_few_units_is_shown_and_not_decided_on() -> None:
    values = [0.0 if i < 5 else 0.7 for i in range(UNITS)]
    segments = {f"u{i:03d}": "few" if i < 5 else "many" for i in range(UNITS)}
    new = with_outcomes(make_contender("new", HALF, values), "retrieval", segments=segments)
    decision = decide(new, CHAMPION, CONFIG)
    assert decision.outcome is Outcome.PROMOTE
    (row,) = (r for r in decision.reasons if r.name == "retrieval nDCG@10, few")
    assert row.passed and "too few" in row.note and "of 5" in row.note
    strict = CONFIG.model_copy(update={"min_slice_units": 5})
    assert decide(new, CHAMPION, strict).outcome is Outcome.HOLD


@pytest.mark.parametrize(("units", "outcome"), [(1, Outcome.ASK), (29, Outcome.ASK), (30, None)])
def test_a_tiny_set_asks(units: int, outcome: Outcome | None) -> None:
    old, new = (make_contender(n, [v] * units, [v] * units) for n, v in (("o", 0.5), ("n", 0.9)))
    decision = decide(new, old, CONFIG)
    assert decision.outcome is (outcome or Outcome.PROMOTE)
    assert failed(decision) == (["judge: queries", "retrieval: queries"] if outcome else [])


def test_a_gain_over_a_champion_that_found_nothing() -> None:
    nothing = make_contender("old", [0.0] * UNITS, [0.0] * UNITS)
    decision = decide(make_contender("new", [0.0] * UNITS, HALF), nothing, CONFIG)
    assert decision.outcome is Outcome.PROMOTE and decision.reasons[-1].candidate == math.inf
    assert json.loads(json.dumps(decision.as_json(), allow_nan=False))["outcome"] == "promote"


VALUE = st.floats(0.0, 0.9)
GAIN = st.floats(1e-6, 0.1)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 45), st.sampled_from(["a", "ab", "abc"]))
def test_better_everywhere_is_never_held(data: st.DataObject, units: int, segments: str) -> None:
    """On relative grounds: the floors are passed by construction."""

    def outcomes(values: list[float]) -> Outcomes:
        return make_outcomes(values, segments=segments)

    before = data.draw(st.lists(VALUE, min_size=units, max_size=units))
    gains = data.draw(st.lists(GAIN, min_size=units, max_size=units))
    after = [b + g for b, g in zip(before, gains, strict=True)]
    old, new = (
        replace(c, outcomes={"judge": outcomes(v), "retrieval": outcomes(v)})
        for c, v in ((CHAMPION, before), (WINNER, after))
    )
    decision = decide(new, old, CONFIG)
    assert decision.outcome is not Outcome.HOLD
    relative = np.mean(gains) / np.mean(before) if np.mean(before) else math.inf
    if units >= CONFIG.min_units and relative >= CONFIG.min_gain:
        assert decision.outcome is Outcome.PROMOTE
    assert decide(old, new, CONFIG).outcome is Outcome.HOLD


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(VALUE, VALUE), min_size=30, max_size=45), st.integers(0, 29))
def test_raising_a_unit_never_makes_the_decision_worse_for_the_gain(
    pairs: list[tuple[float, float]], unit: int
) -> None:
    """One unit more in favour of the candidate does not lower the gain, nor any slice's mean."""
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    raised = list(after)
    raised[unit] += 0.1
    old = make_contender("old", before, before)
    rows, more = (decide(make_contender("new", v, v), old, CONFIG).reasons for v in (after, raised))
    for less, greater in zip(rows, more, strict=True):
        if "," in less.name or less.name == "a clear gain":
            assert greater.candidate >= less.candidate  # type: ignore[operator]


# the values themselves


def test_the_most_careful_failure_decides() -> None:
    def row(passed: bool, otherwise: Outcome) -> Reason:
        return Reason("x", None, None, None, passed, otherwise)

    promote, ask, hold = Outcome.PROMOTE, Outcome.ASK, Outcome.HOLD
    assert Decision.of([]).outcome is promote
    assert Decision.of([row(True, hold)]).outcome is promote
    assert Decision.of([row(False, promote), row(False, ask)]).outcome is ask
    assert Decision.of([row(False, hold), row(False, ask)]).outcome is hold
    assert Decision.of([row(False, ask)]).but(row(False, hold)).outcome is hold


def test_markdown_has_one_row_a_check_and_keeps_its_columns() -> None:
    decision = Decision.of([Reason("a|b", 0.12345678, None, 1.0, False, Outcome.ASK, "x | y")])
    lines = decision.as_markdown().splitlines()
    assert lines[0] == "# Decision: ask"
    assert lines[-1] == "| a\\|b | 0.1235 | - | 1 | no: ask | x \\| y |"


# what the stages keep


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """A small store of the embedded source."""
    from models.sources import SyntheticSource, load

    return load(
        SyntheticSource(num_products=100, num_queries=12, judgments_per_query=6), None
    ).store


def test_judge_outcomes_are_the_served_grades(store: Any) -> None:
    pairs = store.pairs()[:20]
    answers = [
        {
            "query_id": p.query.query_id,
            "product_id": p.product.product_id,
            "grade": p.grade,
            "rating": p.rating,
            "p": [float(g == (p.grade if i % 4 else 1)) for g in (1, 2, 3, 4)],
        }
        for i, p in enumerate(pairs)
    ]
    made = judge_outcomes(answers, store, CumPT(0.5))
    right = [float(bool(i % 4) or p.grade == 1) for i, p in enumerate(pairs)]
    assert list(made.values.values()) == right
    assert made.numbers["accuracy"] == pytest.approx(sum(right) / 20)
    assert list(made.segments.values()) == [p.query.segment for p in pairs]
    turned = judge_outcomes(answers[::-1], store, CumPT(0.5))
    assert turned.evaluation_set == made.evaluation_set
    relabelled = [answers[0] | {"grade": 5 - answers[0]["grade"]}, *answers[1:]]
    others = (answers[:-1], relabelled)
    assert made.evaluation_set not in {
        judge_outcomes(a, store, CumPT(0.5)).evaluation_set for a in others
    }


def test_retrieval_outcomes_leave_out_what_cannot_be_measured(store: Any) -> None:
    queries, products = list(store.query_by_id)[:3], list(store.product_by_id)
    qrels = {
        queries[0]: {products[0]: 4},
        queries[1]: {products[1]: 1},
        queries[2]: {products[2]: 3, products[3]: 4},
    }
    run = {queries[0]: [products[5], products[0]], queries[2]: products[:10]}
    made = retrieval_outcomes(run, qrels, store)
    assert made.values == {q: ndcg(run[q], qrels[q]) for q in (queries[0], queries[2])}
    assert made.values[queries[0]] == pytest.approx(1 / math.log2(3))
    assert made.numbers["ndcg@10"] == pytest.approx(sum(made.values.values()) / 2)
    assert retrieval_outcomes({}, qrels, store).evaluation_set == made.evaluation_set
    fewer = replace(store, products=store.products.slice(0, 90))
    relabelled = {**qrels, queries[0]: {products[0]: 3}}
    assert retrieval_outcomes(run, qrels, fewer).evaluation_set != made.evaluation_set
    assert retrieval_outcomes(run, relabelled, store).evaluation_set != made.evaluation_set
    assert retrieval_outcomes({}, {queries[1]: {products[1]: 1}}, store).numbers == {}


def test_outcomes_survive_the_disk(tmp_path: Path) -> None:
    made = make_outcomes([0.25, 1.0])
    made.write(tmp_path)
    assert Outcomes.read(tmp_path) == made
    with pytest.raises(ArtifactError, match="do this"):
        Outcomes.read(tmp_path / "absent")
