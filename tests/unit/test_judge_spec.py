"""What a judge folder says about itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.errors import ArtifactError
from models.evaluation.tiers import CumPT
from models.judge.config import PromptConfig
from models.judge.prompt import PairText
from models.judge.spec import JudgeSpec
from models.lm.weights import load_tokenizer
from models.types import Pair
from tests.builders import make_pair, make_pairs, make_tiny_judge


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
    kinds = {"by_query": {"q1": {"Sofa": 1.0}}, "terms_of": {"q1": ["sofa"]}, "titles": {}}
    (tmp_path / "judge.json").write_text(json.dumps(whole | {"kinds": kinds}))
    with pytest.raises(ArtifactError, match="older version"):  # it knew queries by their ids
        JudgeSpec.read(tmp_path)


def test_evidence_is_of_what_the_prompt_shows_of_a_query() -> None:
    wanted, more = "red  sofa   without leather", " and much more that is not shown"
    pair = make_pair(wanted, "red sofa")
    fitted = JudgeSpec.fit(PromptConfig(max_query_chars=26), [pair], [pair.product])
    long = replace(pair.query, text=f"{wanted}{more * 9}")
    for query in (pair.query, long):
        evidence, _ = fitted.evidence(query, pair.product)
        assert evidence.excluded == (("leather", False),), query.text
        assert evidence.missing == ()


@pytest.mark.parametrize("categories", [False, True])
def test_no_label_of_a_query_reaches_its_own_prompts(tmp_path: Path, categories: bool) -> None:
    """What the judge is told is fitted on labels; a query's own are left out when it is read."""
    pairs = [
        replace(p, product=replace(p.product, category=f"Home > {p.product.title.split()[0]}"))
        if categories
        else p
        for p in make_pairs(60)
    ]
    text_of = {p.query.text for p in pairs}
    tokenizer = load_tokenizer(make_tiny_judge(tmp_path, pairs))

    def told(pairs: list[Pair]) -> dict[str, list[str]]:
        spec = JudgeSpec.fit(PromptConfig(), pairs, [p.product for p in pairs])
        text = PairText(tokenizer, spec)
        return {q: ["\n".join(text.item(p.query, p.product)) for p in of(q)] for q in text_of}

    def of(query: str) -> list[Pair]:
        return [p for p in pairs if p.query.text == query]

    def seen(lines: list[str]) -> list[str]:
        # the estimate learns of other queries by kinds that know this one's labels (estimate.py)
        return [line.split(", words say")[0] for line in lines] if categories else lines

    truth, others_differ = told(pairs), 0
    for query in sorted(text_of)[:4]:
        lying = [replace(p, grade=5 - p.grade) if p.query.text == query else p for p in pairs]
        lie = told(lying)
        assert seen(lie[query]) == seen(truth[query])
        others_differ += any(lie[q] != truth[q] for q in text_of if q != query)
    assert others_differ == 4


def test_the_item_is_cut_where_the_prompt_says(tmp_path: Path) -> None:
    pair = make_pair("sofa", "red sofa " * 100)
    tokenizer = load_tokenizer(make_tiny_judge(tmp_path, [pair]))
    whole = len(" ".join(pair.product.title.split()))
    for chars, length in ((220, 220), (800, 800), (2000, whole)):
        spec = JudgeSpec(PromptConfig(evidence=False, max_item_chars=chars))
        assert len(PairText(tokenizer, spec).item(pair.query, pair.product)[0]) == length


@pytest.mark.parametrize("name", ["max_item_chars", "max_query_chars"])
def test_a_prompt_without_room_for_text_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        PromptConfig.model_validate({name: 0})


def test_a_folder_that_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no judge\.json"):
        JudgeSpec.read(tmp_path)
