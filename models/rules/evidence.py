"""Evidence: what a reader would mark in the item before judging it.

Consumes a query and a product -> produces the query's words found, missing, excluded-and-present,
how much of the query the item covers, the state of a stated price limit, and how the item's kind
compares with the one usually meant. It never looks at the pair's own label.
Small judges need it: without these lines a 135M model learned nothing on real pairs (infra/LOG.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from models.rules.kinds import Kind, KindLexicon
from models.rules.wishes import Wishes, has, wishes_of
from models.rules.words import WordWeights, closeness
from models.text import price_text, product_text, terms
from models.types import Product, Query

FOUND = 0.6
"""A word counts as found above this closeness to a word of the item: misspelt, or joined."""
NUM_FEATURES = 11
"""Length of `Overlap.features`."""
EARLY = 1 / 3
"""Share of an item's words that count as its beginning, where titles say what a thing is."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How far an item covers a query's words; shares are in [0, 1].

    coverage: mean closeness of each word to the item's closest word, weighted; mean_coverage: not
    weighted. weakest: the least of those. heaviest_found: whether the rarest word is there.
    item_share: weight of the item's words that the query asks for. jaccard: words in both. pairs:
    share of the query's neighbouring words that are neighbours in the item. numbers: share of its
    numbers found, None where it has none. item_words: how many words the item has. last: where the
    query's last word, which mostly names the thing, stands in the item.
    """

    coverage: float
    mean_coverage: float
    weakest: float
    heaviest_found: bool
    item_share: float
    jaccard: float
    pairs: float
    numbers: float | None
    item_words: int
    last: Literal["early", "late", "close", "missing"]

    def features(self) -> list[float]:
        """Plain numbers, [NUM_FEATURES]."""
        return [
            self.coverage,
            self.mean_coverage,
            self.weakest,
            float(self.heaviest_found),
            self.item_share,
            self.jaccard,
            self.pairs,
            0.0 if self.numbers is None else self.numbers - 1.0,
            min(self.item_words, 40) / 40,
            float(self.last == "early"),
            float(self.last == "late"),
        ]


@dataclass(frozen=True, slots=True)
class Evidence:
    """found, missing: words of the query as written; excluded: (words, present in the item), where
    the item's own brand counts that the query wants an alternative to. belief: that the item's
    category is the one asked for, and that its parent is, in [0, 1].
    """

    found: tuple[str, ...]
    missing: tuple[str, ...]
    excluded: tuple[tuple[str, bool], ...]
    price_limit: float | None
    price_ok: bool | None
    kind: Kind | None = None
    belief: tuple[float, float] | None = None
    overlap: Overlap | None = None

    def lines(self) -> str:
        """The evidence as prompt lines, each ending in a newline; empty ones are left out."""
        out = f"found: {' '.join(self.found) or '-'}\nmissing: {' '.join(self.missing) or '-'}\n"
        for word, present in self.excluded:
            out += f"not {word}: {'present' if present else 'absent'}\n"
        if self.price_limit is not None:
            state = "unknown" if self.price_ok is None else "kept" if self.price_ok else "broken"
            out += f"price limit {price_text(self.price_limit)}: {state}\n"
        return out

    def summary(self, estimate: float | None = None) -> str:
        """The evidence in one short line: wishes met and failed, the kind, a first estimate.

        It opens the judge's turn, right before the grade: a small model learns from what stands
        next to its answer in a tenth of the steps it needs for what stands further up.
        """
        failed = len(self.missing) + sum(present for _, present in self.excluded)
        failed += self.price_ok is False
        met = len(self.found) + sum(not present for _, present in self.excluded)
        met += self.price_ok is True
        words = "" if estimate is None else f", words say {estimate:.1f}"
        return f"{met} met, {failed} failed, kind {self.kind or 'unknown'}{words}\n"


@functools.lru_cache(maxsize=200_000)
def _item_terms(text: str) -> tuple[str, ...]:
    return terms(text)


def gather(
    query: Query,
    product: Product,
    kinds: KindLexicon | None = None,
    weights: WordWeights | None = None,
) -> Evidence:
    """The evidence for one pair. A word that names the kind is not missing: `kind` speaks of it.

    weights: of the catalogue's words; without them there is no `overlap`.

    >>> p = Product("1", "Blue leather sofa", price=80.0)
    >>> e = gather(Query("q", "bleu couch without leather under $60"), p)
    >>> e.found, e.missing, e.excluded, e.price_ok
    ((), ('bleu', 'couch'), (('leather', True),), False)
    """
    wishes = wishes_of(query.text)
    have = _item_terms(product_text(product))
    price_ok = None
    if wishes.limit is not None and product.price is not None:
        price_ok = product.price <= wishes.limit
    kind = None if kinds is None else kinds.compare(query, product)
    avoided = _avoided_brand(wishes, product)
    wanted = [(word, stem) for word, stem in wishes.words if stem not in avoided]
    near = [max((closeness(stem, term) for term in have), default=0.0) for _, stem in wanted]
    asked = [
        (word, stem, close)
        for (word, stem), close in zip(wanted, near, strict=True)
        if close > FOUND or kinds is None or kind is None or not kinds.names_kind(query, stem)
    ]
    overlap = None
    if weights is not None and asked:
        overlap = _overlap([s for _, s, _ in asked], [c for _, _, c in asked], have, weights)
    held = has(product_text(product)) if wishes.excluded else ()
    excluded = [(word, stem in held) for word, stem in wishes.excluded]
    if avoided:
        excluded.append((product.brand.lower(), True))
    return Evidence(
        found=tuple(word for word, _, close in asked if close > FOUND),
        missing=tuple(word for word, _, close in asked if close <= FOUND),
        excluded=tuple(excluded),
        price_limit=wishes.limit,
        price_ok=price_ok,
        kind=kind,
        belief=None if kinds is None else kinds.belief(query, product),
        overlap=overlap,
    )


def _avoided_brand(wishes: Wishes, product: Product) -> frozenset[str]:
    """Terms of the item's brand where the query names it and wants an alternative to it."""
    brand = frozenset(terms(product.brand)) if wishes.alternative and product.brand else frozenset()
    return brand if brand <= {stem for _, stem in wishes.words} else frozenset()


def _overlap(
    stems: Sequence[str], near: Sequence[float], have: Sequence[str], weights: WordWeights
) -> Overlap:
    heavy = [weights.weight(stem) for stem in stems]
    there = set(have)
    both = [stem for stem in dict.fromkeys(stems) if stem in there]  # in order: sums must not vary
    whole = sum(weights.weight(term) for term in have)
    last: Literal["early", "late", "close", "missing"] = "missing"
    if stems[-1] in there:
        last = "early" if have.index(stems[-1]) < EARLY * len(have) else "late"
    elif near[-1] > FOUND:
        last = "close"
    numbers = [close for stem, close in zip(stems, near, strict=True) if stem[0].isdigit()]
    neighbours = set(pairwise(have))
    return Overlap(
        coverage=sum(w * c for w, c in zip(heavy, near, strict=True)) / (sum(heavy) or 1.0),
        mean_coverage=sum(near) / len(near),
        weakest=min(near),
        heaviest_found=near[heavy.index(max(heavy))] > FOUND,
        item_share=sum(weights.weight(s) for s in both) / (whole or 1.0),
        jaccard=len(both) / len(there | set(stems)),
        pairs=sum(p in neighbours for p in pairwise(stems)) / max(1, len(stems) - 1),
        numbers=sum(numbers) / len(numbers) if numbers else None,
        item_words=len(have),
        last=last,
    )
