"""Which kind of product a query asks for, learned from the training queries' relevant products.

Consumes labelled pairs and the catalogue -> produces a lexicon from what queries ask for to
category paths, and for a pair the evidence `same`, `sibling` or `other`. It bridges synonyms
("couch" -> Sofas) that word overlap cannot see and that a small judge has too few labels to learn;
words that no training query has used are known from the titles of a category's products. Stores
without categories get no such line.

A training query's own labels are left out when its own pairs are read (leave one query out), so
that the evidence is as good in training as it will be on new queries, no better.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from models.rules.wishes import wishes_of
from models.rules.words import MAX_WORDS
from models.text import normalise, terms
from models.types import RELEVANT_GRADE, Pair, Product, Query

KIND_WORD_SHARE = 0.5
"""A term names a kind when one category holds at least this share of its (smoothed) mass."""
Kind = Literal["same", "sibling", "other"]
SMOOTHING = 0.5
"""Pseudo-queries that every term has seen, spread like the categories overall."""
TITLES = 6.0
"""Pseudo-queries that the titles with a term count for (infra/LOG.md)."""
TITLE_CATEGORIES = 8
"""Categories kept for a term of titles: those it is most typical of."""
REMEMBERED = 20_000
"""Queries whose posterior is kept, as a served judge reads new ones for ever."""
MIN_POSTERIOR = 0.4
"""Below it the lexicon does not say what is asked for."""


@dataclass(frozen=True)
class KindLexicon:
    """Naive Bayes from a query's terms to the category of its relevant products.

    by_text: {normalised text: {category: share of its relevant products}} of the training queries.
    terms_of: {normalised text: terms of what the query asks for}.
    titles: {term: {category: how typical the term is of it among categories, in (0, 1]}}.
    """

    by_text: Mapping[str, Mapping[str, float]]
    terms_of: Mapping[str, Sequence[str]]
    titles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    _counts: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    _prior: dict[str, float] = field(default_factory=dict, repr=False)
    _beliefs: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        prior: dict[str, float] = defaultdict(float)
        for text, shares in self.by_text.items():
            for category, share in shares.items():
                prior[category] += share
                for term in self.terms_of[text]:
                    counts[term][category] += share
        self._counts.update({t: dict(c) for t, c in counts.items()})
        self._prior.update(prior)

    @classmethod
    def fit(cls, pairs: Sequence[Pair], products: Iterable[Product] = ()) -> KindLexicon:
        """Learn from labelled training pairs and the catalogue's titles; products without a
        category teach nothing.
        """
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        terms_of: dict[str, tuple[str, ...]] = {}
        for pair in pairs:
            if pair.grade >= RELEVANT_GRADE and pair.product.category:
                text = normalise(pair.query.text)
                found[text][pair.product.category] += 1
                terms_of[text] = _asked_terms(pair.query)
        shares = {
            q: {c: n / sum(counts.values()) for c, n in counts.items()}
            for q, counts in found.items()
        }
        known = {category for counts in found.values() for category in counts}
        return cls(shares, terms_of, _typical(products, known))

    def asked(self, query: Query) -> str | None:
        """The category path the query asks for, None where the lexicon is not sure."""
        belief = self._belief(query)
        best = max(belief, key=lambda c: belief[c], default=None)
        return best if best is not None and belief[best] >= MIN_POSTERIOR else None

    def belief(self, query: Query, product: Product) -> tuple[float, float] | None:
        """Posterior that the item's category is asked for, and that one with its parent is; None
        where either side is unknown.
        """
        belief = self._belief(query)
        if not belief or not product.category:
            return None
        parent = _parent(product.category)
        beside = sum(p for c, p in belief.items() if _parent(c) == parent)
        return belief.get(product.category, 0.0), beside

    def _belief(self, query: Query) -> dict[str, float]:
        """Posterior of every category that has a hundredth of it; empty where no term is known.

        posterior(c) ~ prior(c) * prod_t (n(t, c) + a prior(c)) / ((n(t) + a) prior(c)), over the
        terms of what is asked for; n(t, c) with TITLES for titles; terms never seen say nothing.
        """
        key = normalise(query.text)
        if key not in self._beliefs:
            if len(self._beliefs) >= REMEMBERED:
                self._beliefs.clear()
            self._beliefs[key] = self._infer(query)
        return self._beliefs[key]

    def compare(self, query: Query, product: Product) -> Kind | None:
        """same category, sibling (same parent) or other; None where either side is unknown."""
        asked = self.asked(query)
        if asked is None or not product.category:
            return None
        if product.category == asked:
            return "same"
        return "sibling" if _parent(product.category) == _parent(asked) else "other"

    def names_kind(self, query: Query, term: str) -> bool:
        """Whether `term` says what kind of thing is asked for, rather than what it should be like.

        max_c n(t, c) / (n(t) + a) >= KIND_WORD_SHARE; never for a term that was not seen.
        """
        counts = self._others(query, term)
        size = sum(counts.values())
        return size > 0 and max(counts.values()) / (size + SMOOTHING) >= KIND_WORD_SHARE

    def _others(self, query: Query, term: str) -> dict[str, float]:
        """n(t, c) without the query's own contribution."""
        seen = self._counts.get(term, {})
        text = normalise(query.text)
        if term not in self.terms_of.get(text, ()):
            return seen
        own = self.by_text[text]
        left = {c: n - own.get(c, 0.0) for c, n in seen.items()}
        return {c: n for c, n in left.items() if n > 1e-9}

    def _infer(self, query: Query) -> dict[str, float]:
        own = self.by_text.get(normalise(query.text), {})
        prior = {c: p - own.get(c, 0.0) for c, p in self._prior.items()}
        total = sum(prior.values())
        if total <= 1e-9:
            return {}
        prior = {c: p / total for c, p in prior.items() if p > 1e-9}
        scores = {c: math.log(p) for c, p in prior.items()}
        informative = False
        for term in _asked_terms(query):
            counts = Counter(self._others(query, term))
            counts.update({c: TITLES * share for c, share in self.titles.get(term, {}).items()})
            size = sum(counts.values())
            if size <= 1e-9:
                continue
            informative = True
            for c in scores:
                smooth = counts[c] + SMOOTHING * prior[c]
                scores[c] += math.log(smooth / (size + SMOOTHING) / prior[c])
        if not informative:
            return {}
        top = max(scores.values())
        odds = {c: math.exp(score - top) for c, score in scores.items()}
        whole = sum(odds.values())
        return {c: o / whole for c, o in odds.items() if o >= 0.01 * whole}

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {
            "by_text": {q: dict(c) for q, c in self.by_text.items()},
            "terms_of": {q: list(t) for q, t in self.terms_of.items()},
            "titles": {t: dict(c) for t, c in self.titles.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> KindLexicon:
        """Inverse of `to_json`."""
        return cls(body["by_text"], body["terms_of"], body["titles"])


def _asked_terms(query: Query) -> tuple[str, ...]:
    return tuple(stem for _, stem in wishes_of(query.text).words)


def _typical(
    products: Iterable[Product], categories: Container[str]
) -> dict[str, dict[str, float]]:
    """{term: {category: share of the category's products with the term, over that of all}}.

    The MAX_WORDS terms in most titles, ties by the term.
    """
    size: Counter[str] = Counter()
    having: dict[str, Counter[str]] = defaultdict(Counter)
    for product in products:
        if product.category in categories:
            size[product.category] += 1
            for term in terms(product.title):
                having[term][product.category] += 1
    typical = {}
    for term in sorted(having, key=lambda t: (-having[t].total(), t))[:MAX_WORDS]:
        shares = Counter({c: n / size[c] for c, n in having[term].items()})
        whole = sum(shares.values())
        typical[term] = {c: s / whole for c, s in shares.most_common(TITLE_CATEGORIES)}
    return typical


def _parent(category: str) -> str:
    return category.rpartition(">")[0].strip() or category
