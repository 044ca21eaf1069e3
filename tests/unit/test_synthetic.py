"""The embedded store: seeded, complete, graded by its rule table, and hard for word matching."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from models.sources import Loaded, SyntheticSource, load, vocabulary
from models.sources.synthetic import Oracle, grade_of
from models.store import Store
from models.text import normalise, product_text, terms
from models.types import SEGMENTS, Category, Verdicts


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(SyntheticSource(), None)


@pytest.fixture(scope="module")
def store(loaded: Loaded) -> Store:
    return loaded.store


def verdicts(category: Category, **attributes: bool) -> Verdicts:
    return Verdicts(category, tuple(attributes.items()))


@pytest.mark.parametrize(
    ("found", "grade"),
    [
        (verdicts(Category.MISMATCH, colour=True), 1),
        (verdicts(Category.RELATED, colour=True), 2),
        (verdicts(Category.MATCH), 4),
        (verdicts(Category.MATCH, colour=True, price=True), 4),
        (verdicts(Category.MATCH, colour=False, price=True), 3),
        (verdicts(Category.MATCH, colour=True, price=False), 2),
        (verdicts(Category.MATCH, colour=False, size=False, price=True), 2),
    ],
)
def test_the_rule_table(found: Verdicts, grade: int) -> None:
    assert grade_of(found, hard={"price"}) == grade


def test_sizes_and_nothing_refused(loaded: Loaded) -> None:
    store = loaded.store
    assert (len(store.products), len(store.queries), len(store.judgments)) == (3000, 360, 360 * 16)
    assert len(store.interactions) > 5000
    assert len(loaded.quarantine) == 0


def test_every_segment_has_its_share_and_no_query_repeats(store: Store) -> None:
    assert Counter(store.queries["segment"].to_pylist()) == {s: 360 // 6 for s in SEGMENTS}
    texts = [normalise(text) for text in store.queries["text"].to_pylist()]
    assert len(set(texts)) == len(texts)


def test_same_seed_same_store_and_another_seed_another() -> None:
    small = SyntheticSource(num_products=300, num_queries=30)
    first, second = load(small, None).store, load(small, None).store
    other = load(small.model_copy(update={"seed": 1}), None).store
    for name in ("products", "queries", "judgments", "interactions"):
        assert getattr(first, name).equals(getattr(second, name))
        assert not getattr(first, name).equals(getattr(other, name))


def test_more_queries_leave_the_catalogue_and_the_first_queries_alone() -> None:
    few = load(SyntheticSource(num_products=300, num_queries=30), None).store
    many = load(SyntheticSource(num_products=300, num_queries=60), None).store
    assert few.products.equals(many.products)
    assert few.queries.equals(many.queries.slice(0, 30))


@pytest.mark.parametrize("num_products", [100, 20_000])
def test_it_scales(num_products: int) -> None:
    source = SyntheticSource(num_products=num_products, num_queries=120, judgments_per_query=12)
    store = load(source, None).store
    assert (len(store.products), len(store.judgments)) == (num_products, 120 * 12)
    assert all(4 in grades.values() for grades in _graded(store).values())


def test_grades_follow_the_verdicts_and_the_oracle_agrees(store: Store) -> None:
    oracle = Oracle(SyntheticSource())
    for pair in store.pairs()[::7]:
        assert pair.verdicts is not None
        hard = oracle.hard(pair.query.query_id)
        assert grade_of(pair.verdicts, hard) == pair.grade
        found = oracle.grade(pair.query.query_id, pair.product.product_id)
        assert found == (pair.grade, pair.verdicts)


def test_the_verdicts_can_be_read_off_the_product(store: Store) -> None:
    """Material and price verdicts against the words a judge sees, on the plainest queries."""
    checked = 0
    for pair in store.pairs():
        text = product_text(pair.product).lower()
        for name, holds in pair.verdicts.attributes if pair.verdicts else ():
            if name.startswith("not ") and name != "not leather":
                present = name.removeprefix("not ") in terms_of(text)
                assert holds or present, (pair.query.text, text)
                checked += 1
            if name == "price" and "$" in pair.query.text:
                limit = float(pair.query.text.rsplit("$", 1)[1].split()[0])
                assert pair.product.price is not None
                assert holds == (pair.product.price < limit)
                checked += 1
    assert checked > 500


def terms_of(text: str) -> set[str]:
    return set(text.replace(",", " ").replace("|", " ").split())


def test_the_grades_are_about_balanced(store: Store) -> None:
    share = Counter(store.judgments["grade"].to_pylist())
    aimed = {4: 0.30, 3: 0.20, 2: 0.25, 1: 0.25}
    for grade, expected in aimed.items():
        assert share[grade] / len(store.judgments) == pytest.approx(expected, abs=0.07)


def test_every_query_has_an_excellent_product_and_few_of_them(store: Store) -> None:
    oracle = Oracle(SyntheticSource())
    products = list(store.product_by_id)
    for query_id in list(store.query_by_id)[:48:2]:
        excellent = sum(oracle.grade(query_id, p)[0] == 4 for p in products[::10])
        assert excellent <= 12  # about 120 in the catalogue at the very most
    for grades in _graded(store).values():
        assert 4 in grades.values() and min(grades.values()) < 4


def test_the_order_of_judgments_does_not_tell_the_grade(store: Store) -> None:
    grades = np.array(store.judgments["grade"].to_pylist()).reshape(360, 16)
    assert abs(grades[:, :8].mean() - grades[:, 8:].mean()) < 0.15


def test_queries_use_other_words_than_titles() -> None:
    for leaf in vocabulary.LEAVES:
        titles = {word for title in leaf.titles for word in terms(title)}
        assert any(not titles & set(terms(ask)) for ask in leaf.asks), leaf.key
    asks = [ask for leaf in vocabulary.LEAVES for ask in leaf.asks]
    assert len(set(asks)) == len(asks), "one ask must not mean two types"


def test_needs_can_be_met() -> None:
    leaves = {leaf.key: leaf for leaf in vocabulary.LEAVES}
    for need in (*vocabulary.QUESTIONS, *vocabulary.WISHES):
        for key in need.keys:
            for attribute in ("feature", "use", "material"):
                value = getattr(need, attribute)
                assert not value or value in getattr(leaves[key], attribute), need


def test_overlap_and_bm25_leave_room(store: Store) -> None:
    """nDCG@10 of BM25 over the judged pool, gain 2^(grade-1) - 1, stays well below 1."""
    import bm25s
    from scipy.stats import spearmanr

    texts = {p: list(terms(product_text(v))) for p, v in store.product_by_id.items()}
    overlap, grades = [], []
    for pair in store.pairs():
        asked = set(terms(pair.query.text))
        overlap.append(len(asked & set(texts[pair.product.product_id])) / max(len(asked), 1))
        grades.append(pair.grade)
    assert spearmanr(overlap, grades).statistic < 0.5
    index = bm25s.BM25()
    index.index(list(texts.values()), show_progress=False)
    row = {p: i for i, p in enumerate(texts)}
    values = []
    for query_id, graded in _graded(store).items():
        score = index.get_scores(list(terms(store.query_by_id[query_id].text)))
        ranked = sorted(graded, key=lambda p: -score[row[p]])
        ideal = sorted(graded.values(), reverse=True)
        values.append(_dcg([graded[p] for p in ranked]) / _dcg(ideal))
    assert 0.5 < np.mean(values) <= 0.8


def test_interactions_follow_grade_and_quality(store: Store) -> None:
    pairs = {(p.query.query_id, p.product.product_id): p.grade for p in store.pairs()}
    per_grade = Counter(pairs.values())
    clicks: Counter[int] = Counter()
    events = Counter(store.interactions["event"].to_pylist())
    rows = store.interactions.select(["query_id", "product_id", "event"]).to_pylist()
    for row in rows:
        grade = pairs.get((row["query_id"], row["product_id"]))
        if grade and row["event"] == "click":
            clicks[grade] += 1
    rate = {g: clicks[g] / per_grade[g] for g in (1, 2, 3, 4)}
    assert rate[4] > 1.5 * rate[3] > 3 * rate[2] > 3 * rate[1] > 0
    assert events["click"] > events["cart"] > events["purchase"] > 0
    assert len(rows) > sum(clicks.values()), "unjudged products are clicked, too"


def test_accessories_are_irrelevant_whatever_they_hold(store: Store) -> None:
    accessories = {leaf.path for leaf, _ in vocabulary.TRAPS}
    seen = [p for p in store.pairs() if p.product.category in accessories]
    assert len(seen) > 200
    assert {p.grade for p in seen} == {1}


def _graded(store: Store) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = defaultdict(dict)
    columns = ("query_id", "product_id", "grade")
    for q, p, g in zip(*(store.judgments[c].to_pylist() for c in columns), strict=True):
        out[q][p] = g
    return out


def _dcg(grades: list[int]) -> float:
    return sum((2.0 ** (g - 1) - 1) / np.log2(i + 2) for i, g in enumerate(grades[:10]))
