"""What a judge folder holds beside its weights: prompt format, kind lexicon, CumPT reading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from models.errors import ArtifactError, explain
from models.evaluation.tiers import CumPT
from models.judge.config import PromptConfig
from models.rules.base import Rule, RuleBase, load_rules
from models.rules.kinds import KindLexicon
from models.types import Pair

FILE = "judge.json"


@dataclass(frozen=True)
class JudgeSpec:
    """Everything but the weights that a score depends on; cumpt is None until calibrated."""

    prompt: PromptConfig
    kinds: KindLexicon | None = None
    cumpt: CumPT | None = None
    rules: RuleBase | None = None
    """The rules themselves: a judge keeps those it was trained with when their file is edited."""

    @property
    def rule_base(self) -> RuleBase:
        """The judge's own rules; those of `prompt.rules` as they are now where it keeps none."""
        return self.rules or load_rules(self.prompt.rules)

    @classmethod
    def fit(cls, prompt: PromptConfig, pairs: Sequence[Pair]) -> JudgeSpec:
        """The spec of a new judge; the lexicon is learned from the training pairs."""
        kinds = KindLexicon.fit(pairs) if prompt.evidence else None
        return cls(prompt, kinds, rules=load_rules(prompt.rules))

    def calibrated(self, cumpt: CumPT) -> JudgeSpec:
        """The same with a CumPT reading."""
        return replace(self, cumpt=cumpt)

    def write(self, folder: Path) -> None:
        """Write judge.json into `folder`."""
        kinds = None if self.kinds is None else self.kinds.to_json()
        body = {
            "prompt": self.prompt.model_dump(),
            "cumpt": None if self.cumpt is None else asdict(self.cumpt),
            "kinds": kinds,
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
        if "cumpt" not in body:
            got = f"{path} of an older version"
            raise ArtifactError(explain(got, "a judge that says how CumPT reads it", "train again"))
        kinds = None if body["kinds"] is None else KindLexicon.from_json(body["kinds"])
        prompt = PromptConfig(**body["prompt"])
        rules = RuleBase(prompt.rules, tuple(Rule(**row) for row in body["rules"]))
        cumpt = None if body["cumpt"] is None else CumPT(**body["cumpt"])
        return cls(prompt, kinds, cumpt, rules)
