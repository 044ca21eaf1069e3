"""How much a word of a query weighs, and how close two words are.

Consumes a catalogue -> produces inverse document frequencies; a pair of terms -> a similarity.
On Home Depot's human labels, weighted fuzzy coverage orders pairs better than counts of words found
and missing (Spearman .44 against .38, infra/LOG.md): rare words say what is meant, and catalogues
and shoppers spell and join words differently.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.text import product_text, terms
from models.types import Product

MAX_WORDS = 50_000
"""Words kept, the most frequent first; the others weigh as much as one never seen."""


@dataclass(frozen=True)
class WordWeights:
    """Inverse document frequencies of a catalogue's stemmed terms.

    documents: products read. counts: {term: products that hold it}.
    """

    documents: int
    counts: Mapping[str, int]

    @classmethod
    def fit(cls, products: Iterable[Product]) -> WordWeights:
        """Count the terms of every product's line."""
        counts: Counter[str] = Counter()
        documents = 0
        for product in products:
            counts.update(terms(product_text(product)))
            documents += 1
        return cls(documents, dict(counts.most_common(MAX_WORDS)))

    def weight(self, term: str) -> float:
        """log((N + 1) / (n(term) + 1)), nats; never negative.

        >>> round(WordWeights(99, {"red": 9}).weight("red"), 2)
        2.3
        """
        return math.log((self.documents + 1) / (self.counts.get(term, 0) + 1))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {"documents": self.documents, "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> WordWeights:
        """Inverse of `to_json`."""
        return cls(body["documents"], body["counts"])


@functools.lru_cache(maxsize=200_000)
def _trigrams(term: str) -> frozenset[str]:
    padded = f"^{term}$"
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2))


def closeness(a: str, b: str) -> float:
    """Dice coefficient of two terms' character trigrams, in [0, 1]; numbers: equal or 0.

    >>> closeness("leather", "lether"), closeness("12", "120"), closeness("red", "blue")
    (0.6153846153846154, 0.0, 0.0)
    """
    if a == b:
        return 1.0
    if a[0].isdigit() or b[0].isdigit():
        return 0.0
    left, right = _trigrams(a), _trigrams(b)
    return 2 * len(left & right) / (len(left) + len(right))
