"""The kind lexicon: synonyms bridged, a training query's own labels left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from models.rules.estimate import features
from models.rules.evidence import gather
from models.rules.kinds import KindLexicon
from models.text import terms
from models.types import Pair, Product, Query

SOFA = "Home > Seating > Sofas"
CHAIR = "Home > Seating > Chairs"
LAMP = "Home > Light > Lamps"


def pair(query_id: str, text: str, category: str, grade: int = 4) -> Pair:
    return Pair(
        Query(query_id, text), Product(f"{query_id}-{category}", "x", category=category), grade
    )


TITLES = [
    Product("1", "Velvet settee", category=SOFA),
    Product("2", "Oak settee", category=SOFA),
    Product("3", "Oak lantern", category=LAMP),
    Product("4", "Settee cover", category="Home > Covers"),
    Product("5", "Settee"),
]


def lexicon() -> KindLexicon:
    pairs = [pair(f"s{i}", f"couch {word}", SOFA) for i, word in enumerate(["red", "blue", "oak"])]
    pairs += [pair(f"l{i}", f"lamp {word}", LAMP) for i, word in enumerate(["red", "blue", "oak"])]
    pairs += [pair("c0", "chair red", CHAIR), pair("c1", "chair oak", CHAIR)]
    pairs += [pair("s0", "couch red", LAMP, grade=1)]
    return KindLexicon.fit(pairs, TITLES)


def test_a_synonym_is_compared_through_the_lexicon() -> None:
    kinds, query = lexicon(), Query("new", "green couch")
    assert kinds.asked(query) == SOFA
    compared = [kinds.compare(query, Product("p", "x", category=c)) for c in (SOFA, CHAIR, LAMP)]
    assert compared == ["same", "sibling", "other"]


def test_unknown_words_and_products_without_category_say_nothing() -> None:
    kinds = lexicon()
    assert kinds.asked(Query("new", "zzz")) is None
    assert kinds.compare(Query("new", "couch"), Product("p", "x")) is None
    assert KindLexicon.fit([]).asked(Query("q", "couch")) is None


def test_titles_know_words_that_no_training_query_used() -> None:
    kinds = lexicon()
    assert kinds.asked(Query("new", "settee")) == SOFA
    assert kinds.asked(Query("new", "lantern")) == LAMP
    # of the kinds that queries ask for: one of two sofas and the only lamp are of oak
    assert kinds.titles["oak"] == {LAMP: 2 / 3, SOFA: 1 / 3}
    assert kinds.titles[terms("settee")[0]] == {SOFA: 1.0}
    without = KindLexicon(kinds.by_text, kinds.terms_of)
    assert without.asked(Query("new", "settee")) is None
    assert without.asked(Query("new", "couch")) == SOFA


def test_what_must_not_be_there_says_nothing_of_the_kind() -> None:
    kinds = lexicon()
    for text in ("lamp without couch", "lamp any colour but couch", "lamp under $60, not couch"):
        assert kinds.asked(Query("new", text)) == LAMP, text
        assert kinds.belief(Query("new", text), TITLES[2]) == kinds.belief(
            Query("new", "lamp"), TITLES[2]
        ), text


def test_belief_is_shared_out_over_categories_and_their_parents() -> None:
    kinds, query = lexicon(), Query("new", "chair")
    sofa, chair, lamp = (
        kinds.belief(query, Product("p", "x", category=c)) for c in (SOFA, CHAIR, LAMP)
    )
    assert sofa and chair and lamp
    assert chair[0] > 0.8 > 0.2 > sofa[0] == lamp[0] > 0
    assert sofa[0] + chair[0] + lamp[0] == pytest.approx(1)
    assert chair[1] == sofa[1] == pytest.approx(sofa[0] + chair[0]) and lamp[1] == lamp[0]
    assert kinds.belief(query, Product("p", "x")) is None
    assert kinds.belief(Query("new", "zzz"), Product("p", "x", category=SOFA)) is None
    assert kinds.belief(query, Product("p", "x", category="Toys > Bricks")) == (0, 0)
    evidence = gather(query, Product("p", "x", category=CHAIR), kinds)
    assert evidence.belief == chair
    unknown = features(replace(evidence, belief=None))
    assert [a - b for a, b in zip(features(evidence), unknown, strict=True) if a != b] == [
        *chair,
        -1,
    ]


def test_irrelevant_products_teach_nothing() -> None:
    assert KindLexicon.fit([pair("q", "couch", LAMP, grade=2)]).by_text == {}


def test_a_training_query_does_not_see_its_own_labels() -> None:
    only = KindLexicon.fit([pair("q", "couch", SOFA), pair("r", "lamp", LAMP)])
    assert only.asked(Query("other", "red couch")) == SOFA
    assert only.asked(Query("q", "couch")) is None


def test_nor_those_of_its_twin_under_another_id() -> None:
    twins = KindLexicon.fit([pair("q", "couch", SOFA), pair("t", "Couch ", SOFA)])
    assert twins.asked(Query("q", "couch")) is None
    assert twins.asked(Query("new", "red couch")) == SOFA


def test_words_that_name_the_kind_are_not_missing() -> None:
    kinds = lexicon()
    assert kinds.names_kind(Query("new", ""), "couch") and not kinds.names_kind(
        Query("new", ""), "red"
    )
    item = Product("p", "Red settee", category=SOFA)
    evidence = gather(Query("new", "red velvet couch"), item, kinds)
    assert (evidence.found, evidence.missing, evidence.kind) == (("red",), ("velvet",), "same")
    assert evidence.summary() == "1 met, 1 failed, kind same\n"


def test_round_trip_through_json() -> None:
    kinds = lexicon()
    again = KindLexicon.from_json(json.loads(json.dumps(kinds.to_json())))
    assert again.titles == kinds.titles
    for text in ("green couch", "lamp", "settee", "zzz"):
        assert again.asked(Query("new", text)) == kinds.asked(Query("new", text))


def test_an_unsure_lexicon_is_silent() -> None:
    kinds = KindLexicon.fit([pair(c, f"red {c}", f"Home > {c}") for c in "wxyz"])
    assert kinds.asked(Query("new", "w")) == "Home > w"
    assert kinds.asked(Query("new", "red")) is None


def test_only_the_most_frequent_terms_of_titles_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lexicon().titles
    assert set(whole) == {"sette", "oak", "velvet", "lantern"}
    monkeypatch.setattr("models.rules.kinds.MAX_WORDS", 3)
    assert lexicon().titles == {t: whole[t] for t in ("oak", "sette", "lantern")}


def test_only_so_many_queries_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.rules.kinds.REMEMBERED", 2)
    kinds = lexicon()
    asked = [kinds.asked(Query(f"n{i}", text)) for i, text in enumerate(["couch", "lamp"] * 3)]
    assert asked == [SOFA, LAMP] * 3 and len(kinds._beliefs) == 2
