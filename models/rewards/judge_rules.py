"""Rule-aware reward shaping for the judge's rollouts [TaoSR-AGRL s3.rrs, ours].

Consumes a parsed response and the gold grade and verdicts -> produces the reward and its parts.

    reward = gate * (w_grade [grade == gold] + w_category [category == gold]
                     + w_attributes * share of attribute verdicts right + w_format [well formed])

gate = 0 when the stated grade contradicts the stated verdicts under the rule table, or when steps
are due and no verdicts can be read: breaking the form must not pay more than an honest step that is
wrong. With `shaped=False` the reward is the outcome alone: 1 for the gold grade, else 0
[TaoSR1 s3.3].
"""

from __future__ import annotations

from dataclasses import dataclass

from models.rewards.config import RuleRewardConfig
from models.teacher.response import Order, ParseOutcome, Response
from models.types import Verdicts


@dataclass(frozen=True, slots=True)
class RewardParts:
    """Every part before weighting, each in [0, 1], and the weighted total."""

    grade: float
    category: float
    attributes: float
    format: float
    gate: float
    total: float


def rule_reward(
    response: Response, gold_grade: int, gold: Verdicts, config: RuleRewardConfig, order: Order
) -> RewardParts:
    """The reward of one response in `order`; parts that it does not state are 0.

    A truncated or malformed response whose verdicts can be read keeps credit for what it states,
    none for its form; one whose verdicts cannot be read gets 0 in total, but for label_only, which
    has none. Without gold attributes the attribute part is 1 when none is stated.
    """
    grade = float(response.grade == gold_grade)
    verdicts = response.verdicts
    form = float(response.outcome is ParseOutcome.OK)
    if not config.shaped:
        return RewardParts(grade, 0.0, 0.0, form, 1.0, grade)
    category = float(verdicts is not None and verdicts.category == gold.category)
    attributes = 0.0 if verdicts is None else share_right(verdicts, gold)
    broken = order != "label_only" if verdicts is None else response.contradicting
    gate = 0.0 if config.gate and broken else 1.0
    total = gate * (
        config.grade * grade
        + config.category * category
        + config.attributes * attributes
        + config.format * form
    )
    return RewardParts(grade, category, attributes, form, gate, total)


def share_right(stated: Verdicts, gold: Verdicts) -> float:
    """Share of gold attribute verdicts stated with the right truth value; invented ones count.

    >>> from models.types import Category
    >>> gold = Verdicts(Category.MATCH, (("colour", True), ("price", False)))
    >>> share_right(Verdicts(Category.MATCH, (("colour", True), ("price", True))), gold)
    0.5
    """
    want, have = dict(gold.attributes), dict(stated.attributes)
    names = want.keys() | have.keys()
    if not names:
        return 1.0
    return sum(name in want and have.get(name) == want[name] for name in names) / len(names)
