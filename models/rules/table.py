"""The rule table: which grades a set of verdicts allows [TaoSR-AGRL s3.rrs, ours].

Consumes verdicts -> produces the set of grades that do not contradict them. The hard gate of the
rewards, the contradiction rate and the teacher all read this one table.
"""

from __future__ import annotations

import re

from models.types import Category, Verdicts

FIRM = re.compile(r"(?:not|no|without)\s.*|other brand|price|audience", re.I)
"""Names of firm wishes: exclusions, another brand, price limits, for whom. An item that fails one
has grade 2 at most, as rules N1, B1, P1, A1 and HX say in the prompts of the stores with such."""


def is_firm(attribute: str) -> bool:
    """Whether an item that fails this wish is a mismatch whatever else it has.

    >>> [is_firm(name) for name in ("not leather", "price", "colour", "notebook", "no-rust")]
    [True, True, False, False, False]
    """
    return FIRM.fullmatch(attribute) is not None


def allowed_grades(verdicts: Verdicts) -> frozenset[int]:
    """Grades consistent with the stated verdicts.

    mismatch -> {1}; related -> {1, 2}; match and every attribute holds (or none is asked) ->
    {3, 4}; match and some attribute fails -> {2, 3}; match and a firm one or all of several fail ->
    {2}.

    >>> sorted(allowed_grades(Verdicts(Category.MATCH, (("colour", True), ("size", False)))))
    [2, 3]
    >>> sorted(allowed_grades(Verdicts(Category.MISMATCH)))
    [1]
    """
    if verdicts.category is Category.MISMATCH:
        return frozenset({1})
    if verdicts.category is Category.RELATED:
        return frozenset({1, 2})
    share = verdicts.share_holding
    if share is None or share == 1.0:
        return frozenset({3, 4})
    firm = any(is_firm(name) for name, holds in verdicts.attributes if not holds)
    if firm or (share == 0.0 and len(verdicts.attributes) > 1):
        return frozenset({2})
    return frozenset({2, 3})


def leading_to(grade: int, verdicts: Verdicts) -> Verdicts:
    """`verdicts`, changed only as far as `grade` demands.

    Grade 1 makes the category a mismatch and grade 2 a sibling's; 3 and 4 make it match, and where
    attributes still forbid the grade, 4 has all of them hold and 3 drops the firm ones that fail,
    then keeps the first alone.

    >>> str(leading_to(4, Verdicts(Category.RELATED, (("colour", False),))).category)
    'match'
    >>> leading_to(4, Verdicts(Category.MATCH, (("colour", False),))).attributes
    (('colour', True),)
    """
    if not contradicts(grade, verdicts):
        return verdicts
    if grade <= 2:
        category = Category.MISMATCH if grade == 1 else Category.RELATED
        return Verdicts(category, verdicts.attributes)
    matching = Verdicts(Category.MATCH, verdicts.attributes)
    if not contradicts(grade, matching):
        return matching
    if grade == 3:
        soft = tuple(
            (name, holds) for name, holds in verdicts.attributes if holds or not is_firm(name)
        )
        shorter = Verdicts(Category.MATCH, soft)
        return Verdicts(Category.MATCH, soft[:1]) if contradicts(grade, shorter) else shorter
    return Verdicts(Category.MATCH, tuple((name, True) for name, _ in verdicts.attributes))


def contradicts(grade: int, verdicts: Verdicts) -> bool:
    """Whether `grade` breaks the table: the "discriminative hallucination" of [TaoSR1 s4.4]."""
    return grade not in allowed_grades(verdicts)
