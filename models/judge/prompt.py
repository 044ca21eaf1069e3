"""The judge's prompt and response, as segments of a shared-prefix path.

Consumes a rule base and pairs -> produces token segments (rules | query | item [| response]).
Segments are tokenised one by one, so a prompt's ids are the joined segments by definition and a
shared node is exact.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from typing import Any

from models.errors import ConfigError, explain
from models.judge.spec import JudgeSpec
from models.lm.shared_prefix import Path, Segment
from models.rules.base import RuleBase
from models.teacher.response import verdict_spans
from models.text import normalise, product_text
from models.types import Product, Query


class PairText:
    """What is read of a pair, as plain text, by the judge and by the cross-encoder.

    The tokenizer's own control tokens are taken out: shop text must not open a turn of its own.
    """

    def __init__(self, tokenizer: Any, spec: JudgeSpec) -> None:
        self.config, self.spec = spec.prompt, spec
        marks = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, marks)) or r"(?!)", re.IGNORECASE)

    def plain(self, text: str) -> str:
        """`text` without control tokens."""
        return self._control.sub(" ", text)

    def query(self, query: Query) -> str:
        """The query, normalised and cut."""
        return normalise(self.plain(query.text))[: self.config.max_query_chars]

    def item(self, query: Query, product: Product) -> tuple[str, str]:
        """The item's line with its evidence lines, and the evidence in one closing line or ""."""
        whole = self.plain(product_text(product, max_chars=None))
        text = " ".join(whole.split())[: self.config.max_item_chars]
        if not self.config.evidence:
            return text, ""
        evidence, estimate = self.spec.evidence(query, product)
        return f"{text}\n{evidence.lines()}".rstrip("\n"), evidence.summary(estimate)


class PromptEncoder:
    """Turns pairs into token segments for one tokenizer and one judge spec."""

    def __init__(self, tokenizer: Any, spec: JudgeSpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        self.config = spec.prompt
        self.rule_base: RuleBase = spec.rule_base
        self._open, self._middle, self._close = _chat_markers(tokenizer)
        self.text = PairText(tokenizer, spec)
        self.end_id: int = tokenizer.eos_token_id
        self.label_ids = _label_ids(tokenizer)
        rules = "\n".join(r.text for r in self.rule_base.always)
        system = f"Grade how well an item answers a search query.\n{rules}"
        self.root: Segment = self.segment(self._open + system + self._middle)

    @functools.cached_property
    def version(self) -> str:
        """Identity of everything here but the tokenizer: rules, prompt config, what was learned."""
        learned = (self.spec.kinds, self.spec.weights, self.spec.estimate)
        lexica = json.dumps([None if x is None else x.to_json() for x in learned])
        text = f"{self.rule_base.version}:{self.config.model_dump_json()}:{lexica}"
        return hashlib.sha256(text.encode()).hexdigest()

    def query_segment(self, query: Query, hint: str = "") -> Segment:
        """The query and the further rules it triggers. `hint` is for guided replay only."""
        extra = "".join(f"{r.text}\n" for r in self.rule_base.concerning(query))
        return self.segment(f"{extra}query: {self.text.query(query)}\n{self.text.plain(hint)}")

    def item_segment(self, query: Query, product: Product) -> Segment:
        """The item, its evidence, and the opening of the assistant's turn."""
        lines, summary = self.text.item(query, product)
        return self.segment(f"item: {lines}{self._close}{summary}")

    def prompt(self, query: Query, product: Product) -> Path:
        """(rules, query, item): the path whose next token is the response's first."""
        return (self.root, self.query_segment(query), self.item_segment(query, product))

    def segment(self, text: str) -> Segment:
        """Ids of a text by itself, without added tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def response_segment(self, text: str) -> Segment:
        """Response ids with the end token."""
        return (*self.segment(text), self.end_id)

    def verdict_mask(self, text: str) -> tuple[bool, ...]:
        """Per id of `response_segment(text)`, whether it is part of a stated verdict."""
        spans = verdict_spans(text)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [
            any(start < right and left < end for left, right in spans)
            for start, end in offsets["offset_mapping"]
        ]
        return (*inside, False)

    def decode(self, ids: Segment) -> str:
        """Text of a sampled response, end token dropped."""
        return self.tokenizer.decode([i for i in ids if i != self.end_id])


def _label_ids(tokenizer: Any) -> list[int]:
    """The token of each grade.

    Raises:
        ConfigError: the tokenizer does not write each grade as one token of its own.
    """
    written = {grade: tokenizer.encode(grade, add_special_tokens=False) for grade in "1234"}
    ids = [tokens[0] for tokens in written.values() if len(tokens) == 1]
    if len(set(ids)) < len(written):
        got = f"a tokenizer that writes the grades as {written}"
        raise ConfigError(explain(got, "one token a digit, each its own", "take another base"))
    return ids


def _chat_markers(tokenizer: Any) -> tuple[str, str, str]:
    """What the chat template puts before, between and after a system and a user text."""
    messages = [{"role": "system", "content": "<<S>>"}, {"role": "user", "content": "<<U>>"}]
    if tokenizer.chat_template is None:
        raise ConfigError(explain("no chat template", "an instruct model", "choose another base"))
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before, found_system, rest = text.partition("<<S>>")
    middle, found_user, close = rest.partition("<<U>>")
    if not (found_system and found_user):
        got = "a chat template without system turn"
        raise ConfigError(explain(got, "system and user turns", "choose another base model"))
    return before, middle, close
