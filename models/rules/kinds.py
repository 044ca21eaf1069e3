"""Which kind of product a query asks for, learned from the training queries' relevant products.

Consumes labelled pairs -> produces a lexicon from query terms to category paths, and for a pair
the evidence `same`, `sibling` or `other`. It bridges synonyms ("couch" -> Sofas) that word overlap
cannot see and that a small judge has too few labels to learn. Stores without categories get no
such line.

A training query's own labels are left out when its own pairs are read (leave one query out), so
that the evidence is as good in training as it will be on new queries, no better.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from models.text import terms
from models.types import RELEVANT_GRADE, Pair, Product, Query

KIND_WORD_SHARE = 0.5
"""A term names a kind when one category holds at least this share of its (smoothed) mass."""
Kind = Literal["same", "sibling", "other"]
SMOOTHING = 0.5
"""Pseudo-queries that every term has seen, spread like the categories overall."""
MIN_POSTERIOR = 0.4
"""Below it the lexicon does not say what is asked for."""


@dataclass(frozen=True)
class KindLexicon:
    """Naive Bayes from a query's terms to the category of its relevant products.

    by_query: {query_id: {category: share of its relevant products}} of the training queries.
    terms_of: {query_id: the query's terms}.
    """

    by_query: Mapping[str, Mapping[str, float]]
    terms_of: Mapping[str, Sequence[str]]
    _counts: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)
    _prior: dict[str, float] = field(default_factory=dict, repr=False)
    _asked: dict[tuple[str, str], str | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        prior: dict[str, float] = defaultdict(float)
        for query_id, shares in self.by_query.items():
            for category, share in shares.items():
                prior[category] += share
                for term in self.terms_of[query_id]:
                    counts[term][category] += share
        self._counts.update({t: dict(c) for t, c in counts.items()})
        self._prior.update(prior)

    @classmethod
    def fit(cls, pairs: Sequence[Pair]) -> KindLexicon:
        """Learn from labelled training pairs; products without a category teach nothing."""
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        terms_of: dict[str, tuple[str, ...]] = {}
        for pair in pairs:
            if pair.grade >= RELEVANT_GRADE and pair.product.category:
                found[pair.query.query_id][pair.product.category] += 1
                terms_of[pair.query.query_id] = terms(pair.query.text)
        shares = {
            q: {c: n / sum(counts.values()) for c, n in counts.items()}
            for q, counts in found.items()
        }
        return cls(shares, terms_of)

    def asked(self, query: Query) -> str | None:
        """The category path the query asks for, None where the lexicon is not sure.

        posterior(c) ~ prior(c) * prod_t (n(t, c) + a prior(c)) / ((n(t) + a) prior(c)); terms never
        seen say nothing.
        """
        key = (query.query_id, query.text)
        if key not in self._asked:
            self._asked[key] = self._infer(query)
        return self._asked[key]

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
        if term not in self.terms_of.get(query.query_id, ()):
            return seen
        own = self.by_query[query.query_id]
        left = {c: n - own.get(c, 0.0) for c, n in seen.items()}
        return {c: n for c, n in left.items() if n > 1e-9}

    def _infer(self, query: Query) -> str | None:
        own = self.by_query.get(query.query_id, {})
        prior = {c: p - own.get(c, 0.0) for c, p in self._prior.items()}
        total = sum(prior.values())
        if total <= 1e-9:
            return None
        prior = {c: p / total for c, p in prior.items() if p > 1e-9}
        scores = {c: math.log(p) for c, p in prior.items()}
        informative = False
        for term in terms(query.text):
            counts = self._others(query, term)
            size = sum(counts.values())
            if size <= 1e-9:
                continue
            informative = True
            for c in scores:
                smooth = counts.get(c, 0.0) + SMOOTHING * prior[c]
                scores[c] += math.log(smooth / (size + SMOOTHING) / prior[c])
        if not informative:
            return None
        top = max(scores.values())
        norm = sum(math.exp(s - top) for s in scores.values())
        best = max(scores, key=lambda c: scores[c])
        return best if 1.0 / norm >= MIN_POSTERIOR else None

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {
            "by_query": {q: dict(c) for q, c in self.by_query.items()},
            "terms_of": {q: list(t) for q, t in self.terms_of.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> KindLexicon:
        """Inverse of `to_json`."""
        return cls(body["by_query"], body["terms_of"])


def _parent(category: str) -> str:
    return category.rpartition(">")[0].strip() or category
