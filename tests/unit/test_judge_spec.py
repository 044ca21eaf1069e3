"""What a judge folder says about itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.errors import ArtifactError
from models.evaluation.tiers import CumPT
from models.judge.config import PromptConfig
from models.judge.spec import JudgeSpec
from tests.builders import make_pair


def test_round_trip_with_lexicon_rules_and_threshold(tmp_path: Path) -> None:
    pairs = [make_pair("couch", "x", category="Home > Sofas"), make_pair("lamp", "y", category="L")]
    products = [p.product for p in pairs]
    spec = JudgeSpec.fit(PromptConfig(rules="homedepot"), pairs, products)
    spec = spec.calibrated(CumPT(0.4, 2.0))
    spec.write(tmp_path)
    again = JudgeSpec.read(tmp_path)
    assert (again.prompt, again.cumpt, again.rules) == (spec.prompt, CumPT(0.4, 2.0), spec.rules)
    assert again.kinds is not None and spec.kinds is not None
    assert again.kinds.to_json() == spec.kinds.to_json()
    assert again.weights == spec.weights and spec.weights is not None
    assert again.estimate == spec.estimate is not None
    assert (spec.weights.documents, spec.weights.counts["sofa"]) == (2, 1)


def test_a_judge_keeps_the_rules_it_was_trained_with(tmp_path: Path) -> None:
    rules = tmp_path / "own.json"
    rules.write_text(json.dumps([{"id": "A", "text": "old", "scope": "always"}]))
    JudgeSpec.fit(PromptConfig(rules=str(rules)), [], []).write(tmp_path)
    rules.write_text(json.dumps([{"id": "A", "text": "new", "scope": "always"}]))
    assert JudgeSpec.read(tmp_path).rule_base.rules[0].text == "old"


def test_without_evidence_there_is_no_lexicon() -> None:
    pair = make_pair()
    spec = JudgeSpec.fit(PromptConfig(evidence=False), [pair], [pair.product])
    assert spec.kinds is None and spec.weights is None


def test_a_judge_of_an_older_version_is_refused(tmp_path: Path) -> None:
    pair = make_pair()
    JudgeSpec.fit(PromptConfig(), [pair], [pair.product]).write(tmp_path)
    whole = json.loads((tmp_path / "judge.json").read_text())
    for older in ({}, {"estimate": {"weights": [[1.0]], "knots": [1.0], "trained": []}}):
        body = {k: v for k, v in whole.items() if k != "estimate"} | older
        (tmp_path / "judge.json").write_text(json.dumps(body))
        with pytest.raises(ArtifactError, match="older version"):
            JudgeSpec.read(tmp_path)


def test_a_folder_that_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no judge\.json"):
        JudgeSpec.read(tmp_path)
