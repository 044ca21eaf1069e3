"""What a query asks for: words, words that must not be there, a price limit.

Consumes a query's text -> produces its wishes, read by fixed English patterns. What says how a wish
is meant ("without", "under $60", "cheaper alternative to") is not itself a wish.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from models.text import terms

NOT = "not|no|without|except|non"
ANY_BUT = r"any(?:thing| \w+)? but"
"""Patterns of what comes before a thing that is not wanted."""
HYPHEN = "\u2010\u2011\u2013-"
_THEN = rf"[ {HYPHEN}]+(?:in |made of |from )?"
_EXCLUDED = re.compile(
    rf"\b(?:{NOT}|{ANY_BUT}(?! +(?:not|no|without|under|below)\b)){_THEN}(\w+)", re.I
)
_ANY = re.compile(r"\bany (?:brand|colou?r|finish|material|shade|size) but\b", re.I)
"""Names what may be anything, so none of its words is asked for."""
ALTERNATIVE = re.compile(
    r"\b(?:alternatives?|dupes?|substitutes?|instead of|(?:affordable|budget|cheaper) version of"
    r"|like\b.+\bbut)\b",
    re.I,
)
"""The brand that is named is the one not wanted."""
_FREE = re.compile(rf"\b(\w+)[{HYPHEN}]free\b", re.I)
_FREE_OF_CHARGE = "standing|shipping|delivery|returns?|gift|with"
_WITHOUT = re.compile(
    rf"\b(?:{NOT}){_THEN}\w+"
    rf"|\b\w+[ {HYPHEN}]free\b(?![ {HYPHEN}]*(?:{_FREE_OF_CHARGE})\b)",
    re.I,
)
"""How an item says what it is without: "non-slip", "no dig", "lead free"; not "oak free-standing".
"""
_NUMBER = r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
_END = r"(?!\w|[.,]\d)"
_BEFORE = r"(?:[$€£]|(?:usd|eur|gbp)\b)\s*"
_AFTER = r"\s*(?:[$€£](?!\s*\d)|(?:dollars?|usd|euros?|eur|gbp)\b)"
_UNIT = (
    r"[\s-]*(?:feet|foot|ft|inch(?:es)?|cm|mm|met(?:er|re)s?|sq|gal(?:lons?)?|lit(?:er|re)s?|ml"
    r"|oz|ounces?|lbs?|pounds?|kg|grams?|gb|tb|mah|watts?|volts?|amps?|years?|months?|hours?)\b"
)
_LIMIT = re.compile(
    rf"\b(?:under|below|less than|max|up to)\s*"
    rf"(?:{_BEFORE}{_NUMBER}(?:{_AFTER})?{_END}|{_NUMBER}{_AFTER})"
    rf"|\b(?:under|below|less than)\s*{_NUMBER}{_END}(?!{_UNIT})",
    re.I,
)
"""A price: "max" and "up to" need a currency, the others just a number without a unit."""
_WORDS = re.compile(r"\d+(?:[.,]\d+)?|[^\W\d_]+")
_MARKERS = frozenset(
    "not no without except non free under below less than max up cheaper cheap affordable budget "
    "alternative alternatives dupe dupes substitute substitutes instead like but any anything "
    "dollars dollar usd".split()
)


@dataclass(frozen=True, slots=True)
class Wishes:
    """words, excluded: (as written, its term); limit: highest price; alternative: to the brand."""

    words: tuple[tuple[str, str], ...]
    excluded: tuple[tuple[str, str], ...]
    limit: float | None
    alternative: bool


@functools.lru_cache(maxsize=20_000)
def wishes_of(text: str) -> Wishes:
    """The wishes of a query's text.

    >>> wishes_of("red sofas without leather under $60")
    Wishes(words=(('red', 'red'), ('sofas', 'sofa')), excluded=(('leather', 'leather'),), \
limit=60.0, alternative=False)
    """
    excluded = {m.lower() for m in _EXCLUDED.findall(text) + _FREE.findall(text)}
    limit = _LIMIT.search(text)
    rest = text if limit is None else f"{text[: limit.start()]} {text[limit.end() :]}"
    words: dict[str, str] = {}
    for word in _WORDS.findall(_ANY.sub(" ", rest.lower())):
        stems = terms(word)
        if stems and word not in _MARKERS and word not in excluded:
            words.setdefault(stems[0], word)
    out = tuple((w, terms(w)[0]) for w in sorted(excluded) if terms(w))
    asked = tuple((w, s) for s, w in words.items())
    return Wishes(asked, out, _number(limit), ALTERNATIVE.search(text) is not None)


def has(item: str) -> tuple[str, ...]:
    """Terms of an item's text but for those of what it says it is without.

    >>> has("Non-Slip Bath Mat, lead free")
    ('bath', 'mat')
    """
    return terms(_WITHOUT.sub(" ", item))


def _number(match: re.Match[str] | None) -> float | None:
    return float(match[match.lastindex or 0].replace(",", "")) if match else None
