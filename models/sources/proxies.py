"""Stand-ins for what a published store does not tell: the segment of a query, a product's quality.

Consumes texts and judged pairs -> produces segments, query ids and a `sales` column. Each proxy is
named in the store's notes, so that every report can say that it is one.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd

from models.split import SplitConfig
from models.text import normalise, terms

LONG_TAIL_TERMS = 4
"""A query with at least so many distinct terms counts as long tail (ours)."""

JUDGED_POPULARITY_NOTE = (
    "proxy: sales = log(1 + distinct training queries that the product was shown to raters for)"
)
SEGMENT_NOTE = f"proxy: long_tail = at least {LONG_TAIL_TERMS} distinct terms, else general"


def query_id(text: str) -> str:
    """An id of the normalised text: the same query twice is one query."""
    return "q" + hashlib.sha1(normalise(text).encode()).hexdigest()[:12]


def segment(text: str) -> str:
    """`long_tail` from LONG_TAIL_TERMS distinct terms on, else `general`.

    >>> segment("deck over"), segment("white outdoor ceiling fan")
    ('general', 'long_tail')
    """
    return "long_tail" if len(terms(text)) >= LONG_TAIL_TERMS else "general"


def queries(texts: pd.Series) -> pd.DataFrame:
    """One row a distinct normalised text: query_id, text, segment, frequency 1; blanks stay."""
    frame = pd.DataFrame({"text": texts.drop_duplicates()})
    frame["query_id"] = ids(frame["text"])
    frame = frame.drop_duplicates("query_id").reset_index(drop=True)
    frame["segment"] = [segment(t) if isinstance(t, str) else None for t in frame["text"]]
    return frame


def ids(texts: pd.Series) -> pd.Series:
    """`query_id` of every text, hashed once a distinct text; a missing text has a missing id."""
    known = {t: query_id(t) for t in texts.dropna().unique()}
    return texts.map(known)


def judged_popularity(texts: pd.Series, product_ids: pd.Series, split: SplitConfig) -> pd.Series:
    """log(1 + distinct queries) a product, indexed by product id (natural log, no unit).

    Being shown to raters goes with being relevant, so queries that are held out count for nothing.
    A product shown for them alone counts one query, like most: its value must not tell that either.
    """
    pairs = pd.DataFrame({"query": ids(texts).to_numpy(), "product": product_ids.to_numpy()})
    held_out = {t: isinstance(t, str) and split.holds_out(t) for t in texts.unique()}
    pairs = pairs[~texts.map(held_out).to_numpy(dtype=bool)]
    counts = pairs.drop_duplicates().groupby("product")["query"].size()
    return np.log1p(counts.reindex(product_ids.unique(), fill_value=1).astype(float))
