"""The rule table: which grades a set of verdicts allows [TaoSR-AGRL s3.rrs, ours].

Consumes verdicts -> produces the set of grades that do not contradict them. The hard gate of the
rewards, the contradiction rate and the teacher all read this one table.
"""

from __future__ import annotations

from models.types import Category, Verdicts


def allowed_grades(verdicts: Verdicts) -> frozenset[int]:
    """Grades consistent with the stated verdicts.

    mismatch -> {1}; related -> {1, 2}; match and every attribute holds (or none is asked) ->
    {3, 4}; match and some attribute fails -> {2, 3}; match and all of several fail -> {2}.

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
    if share == 0.0 and len(verdicts.attributes) > 1:
        return frozenset({2})
    return frozenset({2, 3})


def contradicts(grade: int, verdicts: Verdicts) -> bool:
    """Whether `grade` breaks the table: the "discriminative hallucination" of [TaoSR1 s4.4]."""
    return grade not in allowed_grades(verdicts)
