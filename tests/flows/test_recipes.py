"""Recipes: every one parses for every store, and a wrong setting says what would be right."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from flows.recipes import (
    RECIPES,
    STORES,
    PipelineConfig,
    delta_settings,
    recipe,
    with_settings,
)
from models.errors import ConfigError
from models.index.config import IndexConfig, RefreshConfig
from models.rules.base import load_rules

EVERY = [(name, store) for name in RECIPES for store in STORES]


@pytest.mark.parametrize(("name", "store"), EVERY)
def test_every_recipe_parses_for_every_store(name: str, store: str) -> None:
    config = recipe(name, store)
    assert config.data.source.kind == store
    assert config.name == (f"{store}-smoke" if name == "smoke" else store)
    assert load_rules(config.judge.prompt.rules).always
    again = PipelineConfig.model_validate_json(config.model_dump_json())
    assert again == config and again.model_dump_json() == config.model_dump_json()


def test_recipes_and_stores_differ() -> None:
    texts = {recipe(name, store).model_dump_json() for name, store in EVERY}
    assert len(texts) == len(EVERY)


def models_in(value: object) -> list[BaseModel]:
    """`value` and every config below it."""
    if not isinstance(value, BaseModel):
        return []
    fields = [getattr(value, name) for name in type(value).model_fields]
    return [value] + [inner for field in fields for inner in models_in(field)]


def test_configs_are_frozen_and_closed() -> None:
    found = models_in(recipe("smoke", "synthetic"))
    assert len(found) > 15
    for config in found:
        name = next(iter(type(config).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, getattr(config, name))
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(config)(**{**config.model_dump(), "no_such_field": 1})


def test_the_form_explains_its_fields() -> None:
    """Prefect shows the schema as a form: attribute docstrings must reach it."""
    schema = json.dumps(PipelineConfig.model_json_schema())
    assert "the paper reports pass@1..5" in schema
    assert "the paper's ablation" in schema


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("judge.dpo.beta=0.2", "judge.dpo.beta", 0.2),
        ("judge.grpo.gamma=null", "judge.grpo.gamma", None),
        (" judge.base =tiny", "judge.base", "tiny"),
        ("judge.base=a=b", "judge.base", "a=b"),
        ('judge.teacher={"kind": "chat", "model": "r1"}', "judge.teacher.model", "r1"),
        ("judge.grpo.replay={}", "judge.grpo.replay.max_ratio", 1.0),
        ("embedder.evaluation.ks=[5, 20]", "embedder.evaluation.ks", (5, 20)),
        ("refresh.max_deleted=0.5", "refresh.max_deleted", 0.5),
        ("data.source.num_products=500", "data.source.num_products", 500),
        ('embedder.sft.interactions={"cart": 2}', "embedder.sft.interactions", {"cart": 2.0}),
    ],
)
def test_one_setting_changes_and_no_other(change: str, path: str, value: object) -> None:
    before = recipe("small", "synthetic")
    after: object = recipe("small", "synthetic", [change])
    assert isinstance(after, PipelineConfig)
    old, new = (flat(c.model_dump()) for c in (before, after))
    key = change.partition("=")[0].strip()
    assert {k for k in new if old.get(k, "?") != new[k] and not k.startswith(key)} == set()
    for part in path.split("."):
        after = getattr(after, part)
    assert after == value


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_adapters_beside_top_layers_are_refused(stage: str) -> None:
    """`small` trains its top layers, and adapters would be on all of them."""
    adapters = f"judge.{stage}.optimiser.lora={{}}"
    with pytest.raises(ConfigError, match=r"lora adapts every layer.*train_layers=null"):
        recipe("small", "synthetic", [adapters])
    whole = f"judge.{stage}.optimiser.train_layers=null"
    config = recipe("small", "synthetic", [whole, adapters])
    optimiser = getattr(config.judge, stage).optimiser
    assert optimiser.lora.r == 16 and optimiser.train_layers is None


def flat(body: object, prefix: str = "") -> dict[str, object]:
    """Leaves of nested dicts by dotted path."""
    if not isinstance(body, dict) or not body:
        return {prefix: body}
    return {
        k: v
        for key, inner in body.items()
        for k, v in flat(inner, f"{prefix}.{key}".strip(".")).items()
    }


def test_later_changes_win_and_the_original_stays() -> None:
    before = recipe("small", "synthetic")
    after = with_settings(before, ["judge.dpo.beta=0.2", "judge.dpo.beta=0.3"])
    assert (before.judge.dpo.beta, after.judge.dpo.beta) == (0.1, 0.3)
    assert with_settings(before, []) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("judge.dpo.bta=0.2", r"'judge\.dpo\.bta'.*beta.*under judge\.dpo"),
        ("jduge.dpo.beta=0.2", r"data, embedder, gate, judge"),
        ("judge.dpo.beta.x=0.2", r"beta.*under judge\.dpo"),
        ("judge.dpo", r"judge\.dpo.*key=value"),
        ("=1", r"one of ablation, data, embedder, gate, judge"),
        ("", r"key=value"),
        ("judge.dpo.beta=-1", r"judge\.dpo\.beta = -1.*greater than 0"),
        ("judge.dpo.beta=many", r"judge\.dpo\.beta = 'many'.*number"),
        ("judge.dpo.kind=hinge", r"judge\.dpo\.kind = 'hinge'.*sigmoid"),
        ("judge.dpo=3", r"judge\.dpo = 3"),
        ("judge.grpo.group_size=1", r"group_size = 1.*greater than or equal to 2"),
        ("name=Upper Case", r"name = 'Upper Case'"),
        ("data.source.kind=nowhere", r"nowhere.*synthetic"),
        ('judge.teacher={"kind": "chat"}', r"got judge\.teacher\.model .*required"),
        ('embedder.sft.interactions={"view": 1}', r"got embedder\.sft\.interactions\.view .*cart"),
        ('embedder.sft.interactions={"cart": 0}', r"interactions\.cart = 0.*greater than 0"),
        ("embedder.encoder={'pooling': 'lasttoken'}", r"which is no JSON.*double quotes"),
        ("judge.teacher.kind=oracle", r"oracle.*'template', 'chat'"),
    ],
)
def test_a_wrong_change_is_one_clear_error(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        recipe("small", "synthetic", [change])
    text = str(raised.value)
    assert "got " in text and "expected " in text and "do this: " in text


@pytest.mark.parametrize("key", ["nprobes", "refine"])
@pytest.mark.parametrize("value", ["[]", "[0, 1]", "[64, 1]", "[1, 1]"])
def test_efforts_to_try_are_ascending(key: str, value: str) -> None:
    """Before the catalogue is embedded; and the smallest that passes is the first."""
    with pytest.raises(ConfigError, match=r"larger than the one before.*smallest first") as raised:
        recipe("small", "synthetic", [f"embedder.index.{key}={value}"])
    assert str(raised.value).startswith(f"got {key} = {value}; expected ")
    with pytest.raises(ValidationError, match="smallest first"):
        IndexConfig(**{key: json.loads(value)})


def test_a_delta_is_applied_with_settings_of_a_run() -> None:
    config, encoding = delta_settings(["refresh.keep=7", " data.source.encoding =latin-1"])
    assert (config.keep, encoding) == (7, "latin-1")
    assert delta_settings([]) == (RefreshConfig(), "utf-8")
    assert delta_settings(["refresh.probes=9"])[0].keep is None, "not asked for again"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("refresh.kep=7", r"'refresh\.kep'.*refresh\.keep.*data\.source\.encoding"),
        ("judge.dpo.beta=0.2", r"'judge\.dpo\.beta'.*what a delta is applied with"),
        ("data.source.grade_offset=1", r"grade_offset.*what a delta is applied with"),
        ("refresh.max_deleted=1", "a delta names what it deletes"),
        ("refresh.keep=1", r"refresh\.keep = 1.*greater than or equal to 2"),
        ("refresh.keep", "key=value"),
    ],
)
def test_what_no_delta_is_applied_with_is_refused(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        delta_settings([change])
    assert "do this: " in str(raised.value)


def test_json_may_go_on_in_a_second_line() -> None:
    """As an example in a document does, once it is copied."""
    change = 'embedder.encoder={"pooling": "lasttoken", "query_prompt": "Instruct: find\nproducts"}'
    prompt = recipe("small", "synthetic", [change]).embedder.encoder.query_prompt
    assert prompt == "Instruct: find\nproducts"


def test_splits_that_leave_nothing_are_refused_as_a_setting() -> None:
    with pytest.raises(ConfigError, match="less than 1 together"):
        recipe("small", "synthetic", ["data.split.test=0.9"])


@pytest.mark.parametrize(("name", "store"), [("tiny", "synthetic"), ("small", "amazon")])
def test_unknown_recipe_and_store_name_the_known(name: str, store: str) -> None:
    known = "smoke, small, full" if name == "tiny" else "synthetic, homedepot"
    with pytest.raises(ConfigError, match=known):
        recipe(name, store)
