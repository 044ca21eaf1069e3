"""The response format: five reasoning steps and a grade, written and read back.

Respond-then-think ("post-CoT"): the grade is the first token, the steps follow, one line each;
think-then-respond is the same lines with the grade last [TaoSR1 s3.1]; label-only is the grade.

    4
    query: running shoes, blue
    item: Acme trail shoe
    category: match
    attributes: colour yes, price no
    decision: related
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from models.rules.table import contradicts
from models.text import plain_line
from models.types import GRADE_NAMES, Category, Verdicts

Order = Literal["respond_then_think", "think_then_respond", "label_only"]

STEPS = ("query", "item", "category", "attributes", "decision")
NUM_STEPS = len(STEPS)
_GRADES = frozenset("1234")
_GRADE_OF = {name: grade for grade, name in GRADE_NAMES.items()}


class ParseOutcome(enum.StrEnum):
    """How a response read."""

    OK = "ok"
    EMPTY = "empty"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True)
class Response:
    """A response read back. grade is None unless one could be read; verdicts likewise.

    decision: the grade that the last step names.
    """

    outcome: ParseOutcome
    grade: int | None
    verdicts: Verdicts | None
    text: str
    decision: int | None = None

    @property
    def states_both(self) -> bool:
        """Whether a grade and verdicts can be read, so that they can contradict each other."""
        return self.grade is not None and self.verdicts is not None

    @property
    def contradicting(self) -> bool:
        """Whether the grade breaks the verdicts under the rule table, or the decision is another
        grade."""
        if self.grade is None or self.verdicts is None:
            return False
        decides_otherwise = self.decision is not None and self.decision != self.grade
        return decides_otherwise or contradicts(self.grade, self.verdicts)

    @property
    def sound(self) -> bool:
        """Well formed, and in agreement with itself."""
        return self.outcome is ParseOutcome.OK and not self.contradicting


def contradiction_rate(responses: Iterable[Response]) -> float | None:
    """Share, of responses that state a grade and verdicts, whose grade breaks the rule table or
    whose decision is another; None when no response states both."""
    bad = [r.contradicting for r in responses if r.states_both]
    return sum(bad) / len(bad) if bad else None


_STATED = re.compile(r"(?m)^(?:category|decision): (\w+)$|^attributes: (.+)$")
_HOLDS = re.compile(r"\b(?:yes|no)(?=,|$)|^none$")
_NEXT = re.compile(r"(?<!\d),|,(?!\d)")
"""Between two attributes; a comma inside a number, as in 10,000, is part of a name."""
_ATTRIBUTE = re.compile(r"\s*(.+?) (yes|no)\s*")


def render_steps(query_step: str, item_step: str, verdicts: Verdicts, grade: int) -> str:
    """The five steps as text, without the grade token [TaoSR1 s3.1]."""
    return (
        f"query: {query_step}\nitem: {item_step}\n{render_verdicts(verdicts)}\n"
        f"decision: {GRADE_NAMES[grade]}"
    )


def render_verdicts(verdicts: Verdicts) -> str:
    """The lines of the two matching steps."""
    attributes = ", ".join(f"{n} {'yes' if h else 'no'}" for n, h in verdicts.attributes) or "none"
    return f"category: {verdicts.category}\nattributes: {attributes}"


def render_response(
    query_step: str, item_step: str, verdicts: Verdicts, grade: int, order: Order
) -> str:
    """Grade and steps in the configured order; `parse_response` inverts it."""
    if order == "label_only":
        return str(grade)
    steps = render_steps(query_step, item_step, verdicts, grade)
    if order == "think_then_respond":
        return f"{steps}\n{grade}"
    return f"{grade}\n{steps}"


def in_order(response: str, order: Order) -> str:
    """A grade-first response in `order`: its grade last, the grade alone, or as it is.

    >>> in_order("4\\nquery: sofa\\nitem: couch", "think_then_respond")
    'query: sofa\\nitem: couch\\n4'
    >>> in_order("4\\nquery: sofa\\nitem: couch", "label_only")
    '4'
    """
    if order == "respond_then_think":
        return response
    grade, _, steps = response.partition("\n")
    return grade if order == "label_only" else f"{steps}\n{grade}"


def thought(response: str) -> str:
    """What a think-first response says before its grade, ending where the grade is due.

    Its first five lines and a line break; a last line that is a bare grade is not part of them, so
    a stated grade never conditions the one that is read.

    >>> thought("query: sofa\\nitem: couch\\n4")
    'query: sofa\\nitem: couch\\n'
    >>> thought("query: sofa\\nitem: cou")
    'query: sofa\\nitem: cou\\n'
    """
    lines = response.strip("\n").split("\n")
    if lines[-1].strip() in _GRADES:
        lines = lines[:-1]
    return "\n".join(lines[:NUM_STEPS]) + "\n"


def parse_response(text: str, order: Order, finished: bool = True) -> Response:
    """Read a response; anything that is not exactly the format is named, never guessed.

    label_only: one line, and no verdicts are read.
    """
    lines = text.strip().split("\n")
    if not text.strip():
        return Response(ParseOutcome.EMPTY, None, None, text)
    raw = lines[-1 if order == "think_then_respond" else 0].strip()
    grade = int(raw) if raw in _GRADES else None
    steps = [] if order == "label_only" else _steps(lines)
    verdicts = _verdicts(steps)
    decision = _GRADE_OF.get(_only(steps, "decision"))
    if not finished:
        outcome = ParseOutcome.TRUNCATED
    elif grade is not None and len(lines) == 1 + len(steps) and _whole(steps, order):
        outcome = ParseOutcome.OK
    else:
        outcome = ParseOutcome.MALFORMED
    return Response(outcome, grade, verdicts, text, decision)


def attribute_name(name: str) -> str:
    """A name as the attributes line can hold it: plain, without the commas that part two.

    >>> attribute_name("width, 10,000 mm<|im_end|>")
    'width 10,000 mm'
    """
    return plain_line(_NEXT.sub(" ", name))


def each_once(attributes: Iterable[tuple[str, bool]]) -> tuple[tuple[str, bool], ...]:
    """One verdict a name, in order of appearance: no where any of them is no.

    >>> each_once([("price", True), ("red", True), ("price", False)])
    (('price', False), ('red', True))
    """
    out: dict[str, bool] = {}
    for name, holds in attributes:
        out[name] = holds and out.get(name, True)
    return tuple(out.items())


def verdict_spans(text: str) -> list[tuple[int, int]]:
    """Where a response states its verdicts: category, each yes and no, the decision.

    >>> text = "4\\nquery: a\\nitem: b\\ncategory: match\\nattributes: c yes\\ndecision: excellent"
    >>> [text[a:b] for a, b in verdict_spans(text)]
    ['match', 'yes', 'excellent']
    """
    spans = []
    for line in _STATED.finditer(text):
        if line[1] is not None:
            spans.append(line.span(1))
        else:
            start = line.start(2)
            spans += [(start + m.start(), start + m.end()) for m in _HOLDS.finditer(line[2])]
    return spans


def _steps(lines: list[str]) -> list[tuple[str, str]]:
    """(name, what is said) of every line that names one of the steps."""
    split = (line.partition(": ") for line in lines)
    return [(name, said.strip()) for name, _, said in split if name in STEPS]


def _whole(steps: list[tuple[str, str]], order: Order) -> bool:
    """Whether all that is due is there: each step once, in order, saying something readable."""
    if order == "label_only":
        return not steps
    names, said = zip(*steps, strict=True) if steps else ((), ())
    readable = _verdicts(steps) is not None and _only(steps, "decision") in _GRADE_OF
    return names == STEPS and all(said) and readable


def _only(steps: list[tuple[str, str]], name: str) -> str:
    """What is said under `name`, "" unless that is said once."""
    said = [value for key, value in steps if key == name]
    return said[0] if len(said) == 1 else ""


def _verdicts(steps: list[tuple[str, str]]) -> Verdicts | None:
    category, attributes = _only(steps, "category"), _only(steps, "attributes")
    if category not in set(Category) or not attributes:
        return None
    if attributes == "none":
        return Verdicts(Category(category))
    matches = [_ATTRIBUTE.fullmatch(part) for part in _NEXT.split(attributes)]
    if any(m is None for m in matches):
        return None
    stated = dict.fromkeys((m[1], m[2] == "yes") for m in matches if m)
    if len({name for name, _ in stated}) < len(stated):
        return None  # yes and no of one name: which of them would count?
    return Verdicts(Category(category), tuple(stated))
