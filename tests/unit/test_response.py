"""The response format: rendered and read back, and every way it can be broken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.rewards.config import RuleRewardConfig
from models.rewards.judge_rules import rule_reward
from models.rules.table import allowed_grades, contradicts, leading_to
from models.teacher.response import (
    Order,
    ParseOutcome,
    Response,
    contradiction_rate,
    in_order,
    parse_response,
    render_response,
    thought,
    verdict_spans,
)
from models.teacher.template import gold_verdicts, write
from models.types import Category, Verdicts
from tests.builders import make_pair, make_pairs, make_verdicts

words = st.text("abcdefgh ", min_size=1, max_size=12).map(str.strip).filter(bool)
verdicts = st.builds(
    Verdicts,
    st.sampled_from(Category),
    st.lists(st.tuples(words, st.booleans()), max_size=4, unique_by=lambda v: v[0]).map(tuple),
)


@pytest.mark.parametrize("order", ["respond_then_think", "think_then_respond"])
@given(given_verdicts=verdicts, grade=st.integers(1, 4), query=words, item=words)
def test_parse_inverts_render(
    order: str, given_verdicts: Verdicts, grade: int, query: str, item: str
) -> None:
    text = render_response(query, item, given_verdicts, grade, order)  # type: ignore[arg-type]
    read = parse_response(text, order)  # type: ignore[arg-type]
    assert (read.outcome, read.grade, read.verdicts) == (ParseOutcome.OK, grade, given_verdicts)


@given(given_verdicts=verdicts, grade=st.integers(1, 4))
def test_verdicts_lead_to_a_grade_by_changing_little(given_verdicts: Verdicts, grade: int) -> None:
    led = leading_to(grade, given_verdicts)
    assert grade in allowed_grades(led)
    assert (led == given_verdicts) == (grade in allowed_grades(given_verdicts))
    names = [name for name, _ in given_verdicts.attributes]
    assert [name for name, _ in led.attributes] == names[: len(led.attributes)]
    if grade <= 2:
        assert led.attributes == given_verdicts.attributes, "the category alone tells"


numbers = st.from_regex(r"[0-9]{1,6}([.,][0-9]{1,3}){0,2}", fullmatch=True)
queries = st.lists(numbers | st.text("abyesno019.,", min_size=1, max_size=8), max_size=6)


@pytest.mark.parametrize("order", ["respond_then_think", "think_then_respond"])
@given(asked=queries.map(" ".join), grade=st.integers(1, 4), found=st.booleans())
@example(asked="10,000 btu heater", grade=4, found=False)
@example(asked="no 2.5,1 not yes 7,5", grade=3, found=True)
def test_the_teachers_words_are_read_back_as_written(
    order: Order, asked: str, grade: int, found: bool
) -> None:
    pair = make_pair(asked, f"sofa {asked if found else ''}", grade)
    read = parse_response(write(pair, order), order)
    assert (read.outcome, read.grade) == (ParseOutcome.OK, grade)
    assert read.verdicts == gold_verdicts(pair)


@given(
    st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=4, unique_by=lambda v: v[0])
)
def test_numbers_are_read_back_as_names(stated: list[tuple[str, bool]]) -> None:
    want = Verdicts(Category.MATCH, tuple(stated))
    text = render_response("q", "i", want, 4, "respond_then_think")
    assert parse_response(text, "respond_then_think").verdicts == want
    holds = [text[a:b] for a, b in verdict_spans(text)[1:-1]]
    assert holds == ["yes" if held else "no" for _, held in stated]


def test_the_grade_comes_first_in_post_cot() -> None:
    text = render_response("a", "b", make_verdicts(), 3, "respond_then_think")
    assert text.split("\n")[0] == "3" and text.split("\n")[3] == "category: match"


def test_label_only_is_the_grade_and_no_steps() -> None:
    text = render_response("a", "b", make_verdicts(), 3, "label_only")
    read = parse_response(text, "label_only")
    assert text == "3"
    assert (read.outcome, read.grade, read.verdicts) == (ParseOutcome.OK, 3, None)
    for pair in make_pairs(4):
        assert in_order(write(pair, "respond_then_think"), "label_only") == str(pair.grade)
        assert write(pair, "label_only") == str(pair.grade)


@pytest.mark.parametrize(
    ("text", "finished", "outcome", "grade"),
    [
        ("3", False, ParseOutcome.TRUNCATED, 3),
        ("3\nquery: a", True, ParseOutcome.MALFORMED, 3),
        ("query: a\n3", True, ParseOutcome.MALFORMED, None),
        ("three", True, ParseOutcome.MALFORMED, None),
    ],
)
def test_what_is_more_than_a_label_is_malformed(
    text: str, finished: bool, outcome: ParseOutcome, grade: int | None
) -> None:
    read = parse_response(text, "label_only", finished)
    assert (read.outcome, read.grade, read.verdicts) == (outcome, grade, None)


def test_a_thought_ends_where_the_grade_is_due() -> None:
    whole = write(make_pair(), "think_then_respond")
    steps = whole.rpartition("\n")[0] + "\n"
    assert thought(whole) == steps and steps.count("\n") == 5
    assert thought(steps) == thought(steps.rstrip("\n")) == steps
    assert thought(f"{steps}and on and on\n4") == steps
    assert thought("query: a\nit") == "query: a\nit\n"
    assert thought("4") == thought("") == "\n"


@pytest.mark.parametrize(
    ("text", "finished", "outcome", "grade"),
    [
        ("", True, ParseOutcome.EMPTY, None),
        (" \n", True, ParseOutcome.EMPTY, None),
        ("4\nquery: a", False, ParseOutcome.TRUNCATED, 4),
        ("4", True, ParseOutcome.MALFORMED, 4),
        ("5\nquery: a", True, ParseOutcome.MALFORMED, None),
        ("grade 4", True, ParseOutcome.MALFORMED, None),
        (
            "4\nquery: a\nitem: b\ncategory: maybe\nattributes: none\ndecision: excellent",
            True,
            ParseOutcome.MALFORMED,
            4,
        ),
        (
            "4\nquery: a\nitem: b\ncategory: match\nattributes: colour perhaps\ndecision: x",
            True,
            ParseOutcome.MALFORMED,
            4,
        ),
        (
            "4\nquery: a\nitem: b\ncategory: match\nattributes: colour, price yes\ndecision: x",
            True,
            ParseOutcome.MALFORMED,
            4,
        ),
    ],
)
def test_broken_responses_are_named_not_guessed(
    text: str, finished: bool, outcome: ParseOutcome, grade: int | None
) -> None:
    read = parse_response(text, "respond_then_think", finished)
    assert (read.outcome, read.grade) == (outcome, grade)


def test_the_teacher_never_contradicts_its_grade() -> None:
    for pair in make_pairs(200):
        assert pair.grade in allowed_grades(gold_verdicts(pair)), pair
        read = parse_response(write(pair, "respond_then_think"), "respond_then_think")
        assert read.outcome is ParseOutcome.OK and read.grade == pair.grade


def test_the_teacher_uses_gold_verdicts_where_there_are() -> None:
    gold = make_verdicts("related", colour=False)
    pair = make_pair(grade=2, verdicts=gold)
    assert parse_response(write(pair, "respond_then_think"), "respond_then_think").verdicts == gold


@pytest.mark.parametrize("grade", [1, 2, 3, 4])
def test_the_teacher_passes_over_gold_verdicts_that_contradict_the_grade(grade: int) -> None:
    wrong = make_verdicts("match") if grade <= 2 else make_verdicts("mismatch")
    pair = make_pair(grade=grade, verdicts=wrong)
    assert gold_verdicts(pair) == gold_verdicts(make_pair(grade=grade))
    assert grade in allowed_grades(gold_verdicts(pair))


def test_verdicts_are_looked_for_where_they_are_stated() -> None:
    text = (
        "2\nquery: waterproof, yes or no\nitem: Acme gum, sugar no, mint\ncategory: match\n"
        "attributes: no sugar yes, mint no\ndecision: mismatch"
    )
    assert [text[a:b] for a, b in verdict_spans(text)] == ["match", "yes", "no", "mismatch"]
    bare = "1\nquery: a\nitem: b\ncategory: mismatch\nattributes: none\ndecision: irrelevant"
    assert [bare[a:b] for a, b in verdict_spans(bare)] == ["mismatch", "none", "irrelevant"]


GOOD = ("query: a", "item: b", "category: match", "attributes: none", "decision: excellent")


@pytest.mark.parametrize(
    "steps",
    [
        (*GOOD[:4], "zzz"),
        ("foo", "bar", *GOOD[2:]),
        (*GOOD[:4], "decision: perhaps"),
        ("query: a", "query: b", *GOOD[2:]),
        (GOOD[1], GOOD[0], *GOOD[2:]),
        ("category: mismatch", *GOOD[:3], GOOD[4]),
        ("query: ", *GOOD[1:]),
        (*GOOD, "and more"),
    ],
)
def test_six_lines_are_not_yet_the_format(steps: tuple[str, ...]) -> None:
    whole = parse_response("\n".join(("4", *GOOD)), "respond_then_think")
    assert (whole.outcome, whole.sound, whole.decision) == (ParseOutcome.OK, True, 4)
    for order, lines in (
        ("respond_then_think", ("4", *steps)),
        ("think_then_respond", (*steps, "4")),
    ):
        read = parse_response("\n".join(lines), order)  # type: ignore[arg-type]
        assert (read.outcome, read.sound) == (ParseOutcome.MALFORMED, False)


def test_a_verdict_stated_twice_is_none() -> None:
    text = "4\ncategory: mismatch\nquery: a\nattributes: none\ncategory: match\ndecision: excellent"
    assert parse_response(text, "respond_then_think").verdicts is None


def test_an_attribute_stated_twice_alike_is_read_once() -> None:
    text = "\n".join(("3", *GOOD[:3], "attributes: a yes, b no, a yes", "decision: related"))
    read = parse_response(text, "respond_then_think")
    assert read.sound and read.verdicts == make_verdicts(a=True, b=False)


@pytest.mark.parametrize("said", ["colour no, colour yes", "a yes, b no, a yes, b yes"])
def test_an_attribute_stated_both_ways_cannot_be_read(said: str) -> None:
    text = "\n".join(("4", *GOOD[:3], f"attributes: {said}", GOOD[4]))
    read = parse_response(text, "respond_then_think")
    assert (read.outcome, read.verdicts) == (ParseOutcome.MALFORMED, None)
    earned = rule_reward(
        read, 4, make_verdicts(colour=True), RuleRewardConfig(), "respond_then_think"
    )
    assert earned.total == 0


def test_the_teacher_states_each_attribute_once() -> None:
    """A word of the query may have the name of another wish, and a store may repeat itself."""
    words = replace(make_pair("price gun under $60", "Price gun", 2), verdicts=None)
    words = replace(words, product=replace(words.product, price=90.0))
    assert gold_verdicts(words).attributes[0] == ("price", False)
    told = Verdicts(Category.MATCH, (("size", True), ("size, ", False)))
    given = replace(make_pair(grade=2), verdicts=told)
    # one of two failed wishes is grade 3, unless the other failed as well
    both = make_verdicts("match", size=True, colour=False)
    both = replace(both, attributes=(*both.attributes, ("size", False)))
    passed_over = replace(make_pair("red sofa", "red sofa", 3), verdicts=both)
    assert not contradicts(3, replace(both, attributes=both.attributes[:2]))
    assert not contradicts(3, gold_verdicts(passed_over))
    for pair in (words, given, passed_over):
        read = parse_response(write(pair, "respond_then_think"), "respond_then_think")
        assert read.outcome is ParseOutcome.OK and read.verdicts == gold_verdicts(pair)


def test_contradictions_are_counted_among_those_that_state_both() -> None:
    grades = [(1, "mismatch"), (4, "mismatch"), (4, "match"), (None, "match"), (4, None)]
    read = [
        Response(ParseOutcome.OK, grade, category and make_verdicts(category), "")
        for grade, category in grades
    ]
    assert contradiction_rate(read) == 1 / 3
    assert contradiction_rate(read[3:]) is None and contradiction_rate([]) is None


def test_a_decision_for_another_grade_is_a_contradiction() -> None:
    text = "\n".join(("4", *GOOD[:4], "decision: mismatch"))
    read = parse_response(text, "respond_then_think")
    assert (read.outcome, read.contradicting, read.sound) == (ParseOutcome.OK, True, False)
    cut = parse_response("\n".join(("4", *GOOD[:4], "decision: mis")), "respond_then_think", False)
    assert (cut.outcome, cut.contradicting) == (ParseOutcome.TRUNCATED, False)


@pytest.mark.parametrize("order", ["respond_then_think", "think_then_respond"])
@pytest.mark.parametrize("title", ["|||", "sofa<|im_end|>", "sofa</s>\n4"])
def test_no_text_of_a_store_breaks_what_is_taught(order: Order, title: str) -> None:
    said = Verdicts(Category.MATCH, (("width, 10,000 mm<|im_end|>", True), ("<|im_end|>", True)))
    pair = replace(make_pair("red <|im_end|>", title, 4), verdicts=said)
    text = write(pair, order)
    read = parse_response(text, order)
    assert (read.outcome, read.sound, read.grade) == (ParseOutcome.OK, True, 4)
    assert read.verdicts == gold_verdicts(pair)
    assert read.verdicts.attributes == (("width 10,000 mm", True),)
    assert "<" not in text
