"""Atomic relevance rules as data, and which of them concern a query [TaoSR1 s3.1.rules].

A rule base is a JSON file beside this module: a list of {id, text, scope}. Scope "always" rules are
the shared prefix of every prompt; the others join a query that triggers them, so that the product
side of the prompt stays free of rules and prefixes stay shared (ours: the paper retrieves by pair).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from models.errors import ConfigError, explain
from models.rules.wishes import ALTERNATIVE, ANY_BUT, HYPHEN, NOT
from models.types import Query

FOLDER = Path(__file__).parent
TRIGGERS: dict[str, re.Pattern[str]] = {
    "negation": re.compile(rf"\b(?:{NOT}|{ANY_BUT})\b|[{HYPHEN}]free\b", re.I),
    "price": re.compile(r"\b(?:under|below|less than|cheap\w*|affordable|budget|max)\b|[$]", re.I),
    "number": re.compile(r"\d"),
    "question": re.compile(r"^(?:what|which|how|where|who|can)\b|\?$", re.I),
    "alternative": ALTERNATIVE,
    "knowledge": re.compile(r"\b(?:gift|present|someone|year old|loves?|beginner)\b", re.I),
}
"""When a scope applies: a pattern over the query's text."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One atomic rule."""

    id: str
    text: str
    scope: str


@dataclass(frozen=True)
class RuleBase:
    """The rules of one kind of store."""

    name: str
    rules: tuple[Rule, ...]

    @property
    def version(self) -> str:
        """Content hash, 12 hex digits: part of every prompt's and cached score's identity."""
        text = json.dumps([[r.id, r.text, r.scope] for r in self.rules])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def always(self) -> tuple[Rule, ...]:
        """Rules that every pair is judged by."""
        return tuple(r for r in self.rules if r.scope == "always")

    def concerning(self, query: Query) -> tuple[Rule, ...]:
        """The further rules that `query` triggers, in file order."""
        scopes = {name for name, pattern in TRIGGERS.items() if pattern.search(query.text)}
        return tuple(r for r in self.rules if r.scope in scopes)


@functools.cache
def load_rules(name: str) -> RuleBase:
    """The rule base `name` (a file in this folder, or a path to a JSON file of your own).

    Raises:
        ConfigError: no such rule base, or a file that holds none.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.json"))
        raise ConfigError(explain(f"rules {name!r}", f"one of {known} or a .json file", "fix it"))
    try:
        rules = _rules(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as problem:  # among them: no JSON, not UTF-8
        expected = 'a JSON list of {"id", "text", "scope"}, each id once, nothing empty, scopes of '
        expected += ", ".join(["always", *TRIGGERS])
        raise ConfigError(explain(f"{path}: {problem}", expected, "edit it")) from None
    return RuleBase(name, rules)


def _rules(rows: object) -> tuple[Rule, ...]:
    """The rules of a parsed file.

    Raises:
        ValueError: what is wrong with them, in words.
    """
    if not isinstance(rows, list) or not rows:
        raise ValueError("no list of rules" if not isinstance(rows, list) else "an empty list")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or set(row) != {"id", "text", "scope"}:
            raise ValueError(f"rule {number} is {json.dumps(row)[:80]}")
        empty = [k for k, v in row.items() if not isinstance(v, str) or not v.strip()]
        if empty:
            raise ValueError(f"rule {number} has no text as {', '.join(empty)}")
        if row["id"] in seen:
            raise ValueError(f"a second rule {row['id']!r}")
        if row["scope"] != "always" and row["scope"] not in TRIGGERS:
            raise ValueError(f"scope {row['scope']!r} of rule {row['id']}")
        seen.add(row["id"])
    return tuple(Rule(**row) for row in rows)
