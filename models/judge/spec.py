"""What a judge folder holds beside its weights: prompt format, lexica, CumPT reading."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import ArtifactError, explain
from models.evaluation.tiers import CumPT
from models.judge.config import PromptConfig
from models.rules.base import Rule, RuleBase, load_rules
from models.rules.estimate import GradeEstimate
from models.rules.evidence import Evidence, gather
from models.rules.kinds import KindLexicon
from models.rules.words import WordWeights
from models.text import normalise
from models.types import Pair, Product, Query

FILE = "judge.json"


@dataclass(frozen=True)
class JudgeSpec:
    """Everything but the weights that a score depends on; cumpt is None until calibrated."""

    prompt: PromptConfig
    kinds: KindLexicon | None = None
    cumpt: CumPT | None = None
    rules: RuleBase | None = None
    """The rules themselves: a judge keeps those it was trained with when their file is edited."""
    weights: WordWeights | None = None
    estimate: GradeEstimate | None = None

    @property
    def rule_base(self) -> RuleBase:
        """The judge's own rules; those of `prompt.rules` as they are now where it keeps none."""
        return self.rules or load_rules(self.prompt.rules)

    @classmethod
    def fit(
        cls, prompt: PromptConfig, pairs: Sequence[Pair], products: Collection[Product]
    ) -> JudgeSpec:
        """The spec of a new judge: kinds and estimate from the pairs, word weights."""
        rules = load_rules(prompt.rules)
        if not prompt.evidence:
            return cls(prompt, rules=rules)
        pairs = [replace(p, query=_cut(p.query, prompt)) for p in pairs]
        kinds, weights = KindLexicon.fit(pairs, products), WordWeights.fit(products)
        estimate = GradeEstimate.fit(pairs, lambda p: gather(p.query, p.product, kinds, weights))
        return cls(prompt, kinds, None, rules, weights, estimate)

    def evidence(self, query: Query, product: Product) -> tuple[Evidence, float | None]:
        """What words say of a pair, and the grade they speak for: None without an estimate."""
        query = _cut(query, self.prompt)
        found = gather(query, product, self.kinds, self.weights)
        return found, None if self.estimate is None else self.estimate(query, product, found)

    def calibrated(self, cumpt: CumPT) -> JudgeSpec:
        """The same with a CumPT reading."""
        return replace(self, cumpt=cumpt)

    def write(self, folder: Path) -> None:
        """Write judge.json into `folder`."""
        kinds = None if self.kinds is None else self.kinds.to_json()
        weights = None if self.weights is None else self.weights.to_json()
        estimate = None if self.estimate is None else self.estimate.to_json()
        body = {
            "prompt": self.prompt.model_dump(),
            "cumpt": None if self.cumpt is None else asdict(self.cumpt),
            "kinds": kinds,
            "weights": weights,
            "estimate": estimate,
            "rules": [asdict(rule) for rule in self.rule_base.rules],
        }
        (folder / FILE).write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> JudgeSpec:
        """Inverse of `write`.

        Raises:
            ArtifactError: no judge.json there, or one that an older version wrote.
        """
        path = folder / FILE
        if not path.is_file():
            raise ArtifactError(explain(f"no {FILE} in {folder}", "a judge folder", "train one"))
        body = json.loads(path.read_text(encoding="utf-8"))
        try:
            return cls._from_json(body)
        except (KeyError, TypeError) as problem:
            got = f"{path} of an older version ({problem})"
            raise ArtifactError(explain(got, "what this version writes", "train again")) from None

    @classmethod
    def _from_json(cls, body: Mapping[str, Any]) -> JudgeSpec:
        prompt = PromptConfig(**body["prompt"])
        kinds, weights, estimate = body["kinds"], body["weights"], body["estimate"]
        return cls(
            prompt,
            kinds=None if kinds is None else KindLexicon.from_json(kinds),
            cumpt=None if body["cumpt"] is None else CumPT(**body["cumpt"]),
            rules=RuleBase(prompt.rules, tuple(Rule(**row) for row in body["rules"])),
            weights=None if weights is None else WordWeights.from_json(weights),
            estimate=None if estimate is None else GradeEstimate.from_json(estimate),
        )


def _cut(query: Query, prompt: PromptConfig) -> Query:
    """The query as far as the prompt shows it: evidence is of what is read."""
    text = normalise(query.text)
    if len(text) <= prompt.max_query_chars:
        return query
    return replace(query, text=text[: prompt.max_query_chars])
