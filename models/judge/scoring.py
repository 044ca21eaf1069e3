"""Scoring: P(grade) for (query, product) pairs from one prefill, nothing decoded.

Consumes a judge folder -> produces a `Judge`. Rules are read once per loaded model, each query
once per call, each product once; chunks are filled by length. A judge that thinks first has to
decode its steps before its grade can be read, one token a pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.judge.prompt import PromptEncoder
from models.judge.spec import JudgeSpec
from models.lm.precision import has_bf16
from models.lm.rollout import sample
from models.lm.shared_prefix import Frontier, PromptTree, Segment, SharedPrefixLM, build_tree
from models.lm.shared_prefix import Path as TokenPath
from models.lm.weights import Dtype, load_lm
from models.teacher.response import thought
from models.types import Product, Query

ROWS_AT_ONCE = 48
"""Prompts in one forward."""


class ScoringJudge:
    """A trained judge as a function from pairs to grade probabilities."""

    def __init__(
        self,
        model: SharedPrefixLM,
        encoder: PromptEncoder,
        rows_at_once: int = ROWS_AT_ONCE,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.rows_at_once = rows_at_once
        self._root: Frontier | None = None

    @classmethod
    def open(
        cls, folder: str, spec: JudgeSpec, device: str = "cpu", bf16: bool = True
    ) -> ScoringJudge:
        """Load weights for scoring: in bf16 where `bf16` permits it and the device has it."""
        dtype: Dtype = "bfloat16" if bf16 and has_bf16(device) else "float32"
        lm, tokenizer = load_lm(folder, dtype, device)
        lm.set_attn_implementation("sdpa")
        return cls(SharedPrefixLM(lm), PromptEncoder(tokenizer, spec))

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> ScoringJudge:
        """Load a judge folder by its own spec."""
        return cls.open(str(folder), JudgeSpec.read(folder), device)

    @property
    def rules_version(self) -> str:
        """Identity of rule base and prompt format."""
        return self.encoder.version

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Query, Product]], desc: str = "") -> np.ndarray:
        """P(grade) of every pair, [P, 4] float32 in the order of GRADES [TaoSR1 s1.score].

        Pairs of one query should be neighbours: that is what is shared. Empty input gives [0, 4].
        think_then_respond: read after the judge's own greedy steps (`before_grade`).
        """
        out = np.zeros((len(pairs), 4), dtype=np.float32)
        tails = [path[1:] for path in self.before_grade(pairs, desc)]
        for rows, tree in chunks(tails, self.rows_at_once, desc):
            logp_PL = self.model.label_logprobs(
                tree.to(self.model.device), self.encoder.label_ids, self._rules()
            )
            out[rows] = logp_PL.exp().cpu().numpy()
        return out

    @torch.no_grad()
    def before_grade(
        self, pairs: Sequence[tuple[Query, Product]], desc: str = ""
    ) -> list[TokenPath]:
        """The path of every pair whose next token is the grade.

        think_then_respond: the prompt and the steps the judge decodes greedily, at most
        `max_thought_tokens`; what is cut off there is followed by a line break and graded as it is.
        Otherwise the prompt alone.
        """
        prompts = [self.encoder.prompt(q, p) for q, p in pairs]
        if self.encoder.config.order != "think_then_respond":
            return prompts
        groups = sample(
            self.model,
            prompts,
            group_size=1,
            max_new_tokens=self.encoder.config.max_thought_tokens,
            end_id=self.encoder.end_id,
            generator=torch.Generator(device=self.model.device),
            temperature=0.0,
            desc=f"{desc}: thinking" if desc else "",
        )
        steps = [thought(self.encoder.decode(group[0].ids)) for group in groups]
        return [
            (*prompt, self.encoder.segment(text))
            for prompt, text in zip(prompts, steps, strict=True)
        ]

    def num_tokens(
        self, pairs: Iterable[tuple[Query, Product]], before: Collection[str] = ()
    ) -> int:
        """Tokens read to score `pairs` in one call: rules once, each query once, each pair once.

        before: ids of queries that were read already, as were the rules if there are any.
        """
        queries: dict[str, int] = {}
        items = 0
        for query, product in pairs:
            if query.query_id not in queries and query.query_id not in before:
                queries[query.query_id] = len(self.encoder.query_segment(query))
            items += len(self.encoder.item_segment(query, product))
        rules = len(self.encoder.root) if queries and not before else 0
        return rules + sum(queries.values()) + items

    def _rules(self) -> Frontier:
        if self._root is None:
            tree = build_tree([(self.encoder.root,)]).to(self.model.device)
            self._root, _ = self.model.prefill(tree)
        return self._root


def chunks(
    tails: Sequence[TokenPath],
    rows_at_once: int = ROWS_AT_ONCE,
    desc: str = "",
    pass_tokens: int | None = None,
) -> Iterator[tuple[list[int], PromptTree]]:
    """Places of prompts without their rules and the tree of those: whole queries, of like length.

    desc: of a progress bar; none without it. pass_tokens: as for `build_tree`.
    """
    filled = _filled(tails, rows_at_once)
    for rows in tqdm(filled, desc=desc, disable=not desc, leave=False):
        yield rows, build_tree([tails[i] for i in rows], pass_tokens)


def _filled(tails: Sequence[TokenPath], rows_at_once: int) -> list[list[int]]:
    """Places by chunk. A row is padded to the longest of its chunk, so queries are in the order of
    their longest row; one is cut only where it fills a chunk by itself.
    """
    length = [sum(map(len, tail[1:])) for tail in tails]
    of_query: dict[Segment, list[int]] = {}
    for i in sorted(range(len(tails)), key=lambda i: length[i]):
        of_query.setdefault(tails[i][0], []).append(i)
    ordered = sorted(of_query.items(), key=lambda item: (length[item[1][-1]], item[0]))
    out: list[list[int]] = []
    for _, rows in ordered:
        for start in range(0, len(rows), rows_at_once):
            part = rows[start : start + rows_at_once]
            if not out or len(out[-1]) + len(part) > rows_at_once:
                out.append([])
            out[-1] += part
    return out
