"""The offline teacher: writes the five steps from the pair, its gold grade and the rules.

Consumes a Pair -> produces a response text. Where the store knows the gold step verdicts they are
used; elsewhere verdicts are derived from the evidence and made consistent with the gold grade
under the rule table (ours: the paper's teacher is DeepSeek-R1 given grade and rules [TaoSR1 s3.1]).
"""

from __future__ import annotations

from models.rules.evidence import Evidence, gather
from models.rules.table import leading_to
from models.teacher.check import known_verdicts
from models.teacher.response import Order, each_once, render_response
from models.text import plain_line
from models.types import Category, Pair, Verdicts

MAX_STEP_WORDS = 4
"""Words in the query and item steps: CPU judges decode every one of them."""
MAX_ATTRIBUTES = 4


def gold_verdicts(pair: Pair) -> Verdicts:
    """The pair's verdicts, gold or derived; never in contradiction with its grade.

    Gold ones that contradict it are passed over. Derived: grade 1 -> category mismatch; otherwise
    match, one attribute a query word (found -> yes, missing -> no), corrected where the rule table
    forbids the grade: a grade 4 or 3 item whose words are missing is read as a synonym (yes), a
    grade 2 item with all words found is a related kind of thing.
    """
    known = known_verdicts(pair)
    if known is not None:
        return known
    if pair.grade == 1:
        return Verdicts(Category.MISMATCH)
    evidence = gather(pair.query, pair.product)
    return leading_to(pair.grade, Verdicts(Category.MATCH, _attributes(evidence)))


def _attributes(evidence: Evidence) -> tuple[tuple[str, bool], ...]:
    wishes = [(w, True) for w in evidence.found] + [(w, False) for w in evidence.missing]
    wishes += [(f"not {w}", not present) for w, present in evidence.excluded]
    if evidence.price_ok is not None:
        wishes.append(("price", evidence.price_ok))
    once = each_once(wishes)  # a word of the query may be called price
    failed = [w for w in once if not w[1]]
    held = [w for w in once if w[1]]
    return tuple((failed[: MAX_ATTRIBUTES - 1] + held)[:MAX_ATTRIBUTES])


def write(pair: Pair, order: Order) -> str:
    """The teacher's response for one pair, in the configured order."""
    item = pair.product.category.split(">")[-1].strip() or pair.product.title
    item = plain_line(item).replace("|", " ").lower()
    query_step, item_step = _step(plain_line(pair.query.text)), _step(item)
    return render_response(query_step, item_step, gold_verdicts(pair), pair.grade, order)


def _step(text: str) -> str:
    return " ".join(text.split()[:MAX_STEP_WORDS]) or "unnamed"
