"""What a judge says when it is asked why.

Consumes pairs -> produces responses: `decode_greedy` the judge's own, grade and steps, as they are
measured; `explain` the steps behind a grade that is already served, held to the rule table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.judge.scoring import ScoringJudge
from models.lm.rollout import sample
from models.lm.shared_prefix import Path as TokenPath
from models.lm.tree import build_tree
from models.rules.table import contradicts
from models.teacher.response import ParseOutcome, Response, parse_response, render_response
from models.types import Category, Pair, Product, Query, Verdicts

TRIES = 8
"""Explanations drawn before one that cannot be read is given. One batch: they share the prompt."""
MAX_ATTRIBUTES = 4
"""Attributes whose verdicts are weighed: 2^n sets of them. Further ones are left out."""


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
    own: the verdicts of the judge's own explanation, where `text` has others in their place.
    """

    text: str
    finished: bool
    agrees: bool
    own: Verdicts | None = None


def explain(
    judge: ScoringJudge,
    query: Query,
    product: Product,
    grade: int,
    max_new_tokens: int,
    tries: int = TRIES,
    seed: int = 0,
) -> Explanation:
    """The judge's explanation of `grade`, its verdicts held to the rule table (ours).

    The response is made to begin with `grade`, which may come from a calibrated reading of the
    probabilities rather than from the first token; a judge that thinks first cannot be made to,
    and is asked for its own grade. The greedy response is taken if it agrees. Otherwise its
    verdicts give way to the likeliest, by the judge, of all sets that the rule table allows for
    `grade`; one that cannot be read gives way to the likeliest readable one of `tries` - 1 samples
    first. Same seed, same answer.
    """
    encoder = judge.encoder
    order = encoder.config.order
    forced = () if order == "think_then_respond" else (encoder.label_ids[grade - 1],)
    prompt = encoder.prompt(query, product)
    *path, item = prompt
    begun = (*path, item + forced)

    def draw(count: int, temperature: float) -> list[Response]:
        """Likeliest first."""
        group = sample(
            judge.model,
            [begun],
            group_size=count,
            max_new_tokens=max_new_tokens,
            end_id=encoder.end_id,
            generator=torch.Generator(device=judge.model.device).manual_seed(seed),
            temperature=temperature,
        )[0]
        group.sort(key=lambda rollout: -sum(rollout.logps))
        return [parse_response(encoder.decode((*forced, *r.ids)), order, r.finished) for r in group]

    (greedy,) = draw(1, 0.0)
    if greedy.sound and greedy.grade == grade:
        return Explanation(greedy.text, True, True)
    drafts = [greedy]
    if _steps(greedy) is None and tries > 1:
        drafts += draw(tries - 1, 1.0)
    draft = next((d for d in drafts if _steps(d) is not None), None)
    if draft is None:
        return Explanation(greedy.text, greedy.outcome is not ParseOutcome.TRUNCATED, False)
    if draft.sound and draft.grade == grade:
        return Explanation(draft.text, True, True)
    text = _held_to_rules(judge, prompt, draft, grade)
    return Explanation(text, True, True, own=draft.verdicts)


def _steps(response: Response) -> tuple[str, str] | None:
    """What a response says of query and item; None where it lacks one of them, or verdicts."""
    said = dict(line.split(": ", 1) for line in response.text.split("\n") if ": " in line)
    query, item = said.get("query", "").strip(), said.get("item", "").strip()
    return (query, item) if query and item and response.verdicts is not None else None


def _held_to_rules(judge: ScoringJudge, prompt: TokenPath, draft: Response, grade: int) -> str:
    """`draft` with the likeliest verdicts that allow `grade`, and the decision that follows."""
    steps = _steps(draft)
    assert steps is not None and draft.verdicts is not None, "the caller has read them"
    names = list(dict.fromkeys(name for name, _ in draft.verdicts.attributes))[:MAX_ATTRIBUTES]
    sets = [
        Verdicts(category, tuple(zip(names, holds, strict=True)))
        for category in Category
        for holds in itertools.product((True, False), repeat=len(names))
    ]
    order = judge.encoder.config.order
    texts = [
        render_response(*steps, verdicts, grade, order)
        for verdicts in sets
        if not contradicts(grade, verdicts)
    ]
    ids = [judge.encoder.response_segment(text) for text in texts]
    if len(ids) == 1:
        return texts[0]
    columns = enumerate(zip(*ids, strict=False))
    same = next(at for at, column in columns if len(set(column)) > 1)
    with torch.no_grad():
        tree = build_tree([(*prompt, i[:same], i[same:]) for i in ids])
        said = judge.model(tree.to(judge.model.device))
    return texts[int(said.logp_PT.sum(1).argmax())]
