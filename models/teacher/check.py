"""Whether a text from outside may teach: five steps that lead to the gold grade and no other.

Consumes a text and its pair -> produces the response to train on, written anew from what was read,
or the reason why there is none. Whatever the text says, the grade that is written is the gold one.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.rules.table import contradicts
from models.teacher.response import (
    ParseOutcome,
    attribute_name,
    each_once,
    parse_response,
    render_response,
)
from models.text import plain_line
from models.types import Pair, Verdicts


@dataclass(frozen=True, slots=True)
class Checked:
    """response: grade first, or None; problem: why not, "" otherwise."""

    response: str | None
    problem: str = ""


def known_verdicts(pair: Pair) -> Verdicts | None:
    """The store's own verdicts, where it has some that its grade does not contradict.

    Attributes are named as the response format can hold them, each once (`each_once`); one without
    a name is left out.
    """
    if pair.verdicts is None:
        return None
    named = ((attribute_name(name), holds) for name, holds in pair.verdicts.attributes)
    said = Verdicts(pair.verdicts.category, each_once(known for known in named if known[0]))
    return None if contradicts(pair.grade, said) else said


def check(text: str, pair: Pair, max_words: int | None = None) -> Checked:
    """Read `text` as a response for `pair`, grade first [TaoSR1 s3.1].

    Refused: not the format, another grade, verdicts that contradict the gold grade under the rule
    table or differ from the store's own, more than `max_words` words. Blank lines, control tokens
    and invisible characters are dropped.
    """
    lines = [line for line in map(plain_line, text.splitlines()) if line]
    read = parse_response("\n".join(lines), "respond_then_think")
    if read.outcome is not ParseOutcome.OK or read.verdicts is None:
        got = f"{len(lines)} lines ({read.outcome})"
        return Checked(None, f"not the six lines asked for, each saying something, but {got}")
    query, item, _, _, decision = (line.partition(":")[2].strip() for line in lines[1:])
    if (read.grade, read.decision) != (pair.grade, pair.grade):
        return Checked(None, f"grade {read.grade} and decision {decision}, not the grade given")
    if contradicts(pair.grade, read.verdicts):
        return Checked(None, f"verdicts that contradict grade {pair.grade}")
    known = known_verdicts(pair)
    if known is not None and _content(known) != _content(read.verdicts):
        return Checked(None, "verdicts other than the known ones")
    words = sum(len(line.split()) for line in lines)
    if max_words is not None and words > max_words:
        return Checked(None, f"{words} words, more than {max_words}")
    return Checked(render_response(query, item, read.verdicts, pair.grade, "respond_then_think"))


def _content(verdicts: Verdicts) -> tuple[str, dict[str, bool]]:
    return verdicts.category.value, dict(verdicts.attributes)
