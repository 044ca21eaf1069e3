"""What a judge says when it is asked why.

Consumes pairs -> produces responses: `decode_greedy` the judge's own, grade and steps, as they are
measured; `explain` the steps behind a grade that is already served, read against the rule table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.judge.scoring import ScoringJudge
from models.lm.rollout import sample
from models.teacher.response import Order, parse_response
from models.types import Pair, Product, Query

TRIES = 16
"""Explanations drawn before one that disagrees is given. One batch: they share the prompt."""


def decode_greedy(
    judge: ScoringJudge, pairs: Sequence[Pair], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """(response text, finished) for each pair, in order; [] for no pairs."""
    encoder = judge.encoder
    groups = sample(
        judge.model,
        [encoder.prompt(p.query, p.product) for p in pairs],
        group_size=1,
        max_new_tokens=max_new_tokens,
        end_id=encoder.end_id,
        generator=torch.Generator(device=judge.model.device),
        temperature=0.0,
        desc="reasoning",
    )
    return [(encoder.decode(group[0].ids), group[0].finished) for group in groups]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The steps for one served grade.

    agrees: well formed, of that grade, and in accord with it under the rule table.
    """

    text: str
    finished: bool
    agrees: bool


def explain(
    judge: ScoringJudge,
    query: Query,
    product: Product,
    grade: int,
    max_new_tokens: int,
    tries: int = TRIES,
    seed: int = 0,
) -> Explanation:
    """The likeliest of `tries` explanations that agrees with `grade`, or the greedy one (ours).

    The response is made to begin with `grade`, which may come from a calibrated reading of the
    probabilities rather than from the first token; a judge that thinks first cannot be made to,
    and is asked for its own grade. The greedy response is the first try. Same seed, same answer.
    """
    encoder = judge.encoder
    order = encoder.config.order
    forced = () if order == "think_then_respond" else (encoder.label_ids[grade - 1],)
    *path, item = encoder.prompt(query, product)
    prompt = (*path, item + forced)

    def draw(count: int, temperature: float) -> list[tuple[float, Explanation]]:
        group = sample(
            judge.model,
            [prompt],
            group_size=count,
            max_new_tokens=max_new_tokens,
            end_id=encoder.end_id,
            generator=torch.Generator(device=judge.model.device).manual_seed(seed),
            temperature=temperature,
        )[0]
        return [
            (sum(r.logps), _read(encoder.decode((*forced, *r.ids)), r.finished, grade, order))
            for r in group
        ]

    (_, greedy), *_ = draw(1, 0.0)
    if greedy.agrees or tries == 1:
        return greedy
    agreeing = [(logp, said) for logp, said in draw(tries - 1, 1.0) if said.agrees]
    return max(agreeing, key=lambda drawn: drawn[0])[1] if agreeing else greedy


def _read(text: str, finished: bool, grade: int, order: Order) -> Explanation:
    read = parse_response(text, order, finished)
    return Explanation(text, finished, read.sound and read.grade == grade)
