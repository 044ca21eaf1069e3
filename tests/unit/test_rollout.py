"""Sampling: log-probs are the trainer's, seeds repeat, finished rows stop."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.lm import precision, rollout
from models.lm.rollout import COMPACT_AT, sample
from models.lm.self_check import decodes
from models.lm.shared_prefix import SharedPrefixLM, build_tree

PROMPTS = [((1, 2, 3), (4, 5), (6,)), ((1, 2, 3), (4, 5), (7, 8)), ((1, 2, 3), (9,), (6, 6, 6))]
END = 2
CONFIG = LlamaConfig(
    vocab_size=12, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SharedPrefixLM:
    torch.manual_seed(1)
    return SharedPrefixLM(LlamaForCausalLM(CONFIG))


def draw(model: SharedPrefixLM, seed: int = 0, **changes: object) -> list:
    arguments: dict = dict(group_size=6, max_new_tokens=12, end_id=END, temperature=1.0)
    generator = torch.Generator().manual_seed(seed)
    return sample(model, PROMPTS, generator=generator, **(arguments | changes))


def assert_logps(model: SharedPrefixLM, groups: list, temperature: float = 1.0) -> None:
    """The log-probs that were kept are the trainer's."""
    paths = [(*p, r.ids) for p, g in zip(PROMPTS, groups, strict=True) for r in g]
    with torch.no_grad():
        got = model.eval()(build_tree(paths), temperature=temperature)
    for row, drawn in enumerate(r for g in groups for r in g):
        want = torch.tensor(drawn.logps)
        assert torch.allclose(got.logp_PT[row][got.mask_PT[row]], want, atol=1e-4)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (0.7, 3)])
def test_sampled_logps_equal_the_trainers(
    model: SharedPrefixLM, temperature: float, top_k: int
) -> None:
    assert_logps(model, draw(model, temperature=temperature, top_k=top_k), temperature)


def test_adapters_are_merged_while_sampling_and_the_weights_come_back_to_the_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(2)
    lm = get_peft_model(LlamaForCausalLM(CONFIG), LoraConfig(r=4, target_modules="all-linear"))
    layers = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    adapted = SharedPrefixLM(lm)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    plain = draw(adapted, group_size=2)
    seen: list[bool] = []
    step = SharedPrefixLM.step

    def watched(self: SharedPrefixLM, siblings: Any, ids_R: torch.Tensor) -> torch.Tensor:
        seen.extend(layer.merged for layer in layers)
        return step(self, siblings, ids_R)

    monkeypatch.setattr(SharedPrefixLM, "step", watched)
    groups = draw(adapted, group_size=2)
    assert groups == plain and seen and all(seen)
    assert not any(layer.merged for layer in layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.state_dict().items())
    assert_logps(adapted, groups)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_cast_once_and_what_is_drawn_is_what_autocast_draws(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    torch.manual_seed(3)
    config = LlamaConfig(**(CONFIG.to_dict() | {"tie_word_embeddings": tied}))
    halved = SharedPrefixLM(LlamaForCausalLM(config), bf16=True)
    head, inner = halved.head, halved.causal_lm.model.layers[0].mlp.up_proj
    assert decodes(halved)  # the first use compares them, in their own precision
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    step = SharedPrefixLM.step

    def watched(self: SharedPrefixLM, siblings: Any, ids_R: torch.Tensor) -> torch.Tensor:
        seen.append((inner.weight.dtype, head.weight.dtype))
        return step(self, siblings, ids_R)

    monkeypatch.setattr(SharedPrefixLM, "step", watched)
    groups = draw(halved)
    assert set(seen) == {(torch.bfloat16, torch.float32 if tied else torch.bfloat16)}
    assert {p.dtype for p in halved.parameters()} == {torch.float32}
    monkeypatch.setattr(rollout, "weights_cast", lambda *_: contextlib.nullcontext())
    assert draw(halved) == groups


def test_same_seed_same_rollouts_and_another_seed_others(model: SharedPrefixLM) -> None:
    assert draw(model) == draw(model)
    assert draw(model) != draw(model, seed=1)


def test_finished_rows_are_no_longer_computed(
    model: SharedPrefixLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    step = SharedPrefixLM.step

    def counted(self: SharedPrefixLM, siblings: Any, ids_R: torch.Tensor) -> torch.Tensor:
        fed.append(len(ids_R))
        return step(self, siblings, ids_R)

    monkeypatch.setattr(SharedPrefixLM, "step", counted)
    groups = draw(model, group_size=16)
    assert fed[0] == 48 and fed[-1] <= 24
    for i, rows in enumerate(fed):  # what is fed at step i has a token after its i-th
        alive = [sum(len(r.ids) > i + 1 for r in group) for group in groups]
        needed = sum(map(bool, alive)) * max(alive)
        assert COMPACT_AT * rows <= needed <= rows


def test_what_is_left_goes_on_as_if_nothing_had_been_dropped(
    model: SharedPrefixLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = dict(temperature=0.0, group_size=1, end_id=draw(model)[0][0].ids[1])
    dropped = draw(model, **greedy)
    assert len({len(g[0].ids) for g in dropped}) > 1
    monkeypatch.setattr(rollout, "COMPACT_AT", 0.0)
    kept = draw(model, **greedy)
    assert [g[0].ids for g in kept] == [g[0].ids for g in dropped]


def test_rows_stop_at_the_end_token_or_at_the_limit(model: SharedPrefixLM) -> None:
    rollouts = [r for g in draw(model, group_size=32) for r in g]
    assert any(r.finished for r in rollouts) and any(not r.finished for r in rollouts)
    for r in rollouts:
        assert END not in r.ids[:-1]
        assert r.finished == (r.ids[-1] == END)
        assert r.finished or len(r.ids) == 12


def test_sampling_follows_the_distribution(model: SharedPrefixLM) -> None:
    groups = draw(model, group_size=3000, max_new_tokens=1, rows_at_once=10_000)
    with torch.no_grad():
        logits = model.lm(torch.tensor([sum(PROMPTS[0], ())])).logits[0, -1]
    want = logits.softmax(-1)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in groups[0]]), minlength=12) / 3000
    assert (counts - want).abs().max() < 0.04


def test_greedy_takes_the_most_likely_token(model: SharedPrefixLM) -> None:
    first = draw(model, temperature=0.0, group_size=1, max_new_tokens=1)[0][0].ids[0]
    with torch.no_grad():
        assert first == model.lm(torch.tensor([sum(PROMPTS[0], ())])).logits[0, -1].argmax().item()


def test_top_k_never_leaves_the_top(model: SharedPrefixLM) -> None:
    groups = draw(model, top_k=2, group_size=64, max_new_tokens=1)
    with torch.no_grad():
        top = model.lm(torch.tensor([sum(PROMPTS[0], ())])).logits[0, -1].topk(2).indices.tolist()
    assert {r.ids[0] for r in groups[0]} == set(top)
