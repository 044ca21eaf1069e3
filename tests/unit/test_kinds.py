"""The kind lexicon: synonyms bridged, a training query's own labels left out."""

from __future__ import annotations

import json

from models.rules.evidence import gather
from models.rules.kinds import KindLexicon
from models.types import Pair, Product, Query

SOFA = "Home > Seating > Sofas"
CHAIR = "Home > Seating > Chairs"
LAMP = "Home > Light > Lamps"


def pair(query_id: str, text: str, category: str, grade: int = 4) -> Pair:
    return Pair(
        Query(query_id, text), Product(f"{query_id}-{category}", "x", category=category), grade
    )


def lexicon() -> KindLexicon:
    pairs = [pair(f"s{i}", f"couch {word}", SOFA) for i, word in enumerate(["red", "blue", "oak"])]
    pairs += [pair(f"l{i}", f"lamp {word}", LAMP) for i, word in enumerate(["red", "blue", "oak"])]
    pairs += [pair("c0", "chair red", CHAIR), pair("c1", "chair oak", CHAIR)]
    pairs += [pair("s0", "couch red", LAMP, grade=1)]
    return KindLexicon.fit(pairs)


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


def test_irrelevant_products_teach_nothing() -> None:
    assert KindLexicon.fit([pair("q", "couch", LAMP, grade=2)]).by_query == {}


def test_a_training_query_does_not_see_its_own_labels() -> None:
    only = KindLexicon.fit([pair("q", "couch", SOFA), pair("r", "lamp", LAMP)])
    assert only.asked(Query("other", "couch")) == SOFA
    assert only.asked(Query("q", "couch")) is None


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
    for text in ("green couch", "lamp", "zzz"):
        assert again.asked(Query("new", text)) == kinds.asked(Query("new", text))


def test_an_unsure_lexicon_is_silent() -> None:
    kinds = KindLexicon.fit([pair(c, f"red {c}", f"Home > {c}") for c in "wxyz"])
    assert kinds.asked(Query("new", "w")) == "Home > w"
    assert kinds.asked(Query("new", "red")) is None
