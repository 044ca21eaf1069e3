"""Decoding with one copy of the prompt: equal to the plain forward, for several architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from models.errors import ConfigError
from models.lm.decoding import Siblings
from models.lm.rollout import _still_decoding, sample
from models.lm.shared_prefix import SharedPrefixLM, build_tree

LONG = tuple(1 + i % 9 for i in range(60))
"""Longer than a pass is worth: such a segment keeps a level of its own, padded rows and all."""
PROMPTS = [((1, 2, 3), (4, 5), (6,)), ((1, 2, 3), (9,), (6, 6, 6, 7))]
SIZES: dict[str, Any] = dict(
    vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


def build(kind: str, **changes: Any) -> SharedPrefixLM:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    return SharedPrefixLM(getattr(transformers, f"{kind}ForCausalLM")(config).eval())


def plain_logits(model: SharedPrefixLM, ids: tuple[int, ...]) -> torch.Tensor:
    return model.lm(torch.tensor([ids])).logits[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_every_step_equals_the_plain_forward(kind: str) -> None:
    model, rng = build(kind), torch.Generator().manual_seed(1)
    frontier, _ = model.prefill(build_tree(PROMPTS))
    siblings, drawn = frontier.siblings(3, 5), [[] for _ in range(6)]
    for _ in range(5):
        ids_R = torch.randint(16, (6,), generator=rng)
        got_RV = model.step(siblings, ids_R)
        for row, new in enumerate(ids_R.tolist()):
            drawn[row].append(new)
            want_V = plain_logits(model, (*sum(PROMPTS[row // 3], ()), *drawn[row]))
            assert torch.allclose(got_RV[row], want_V, atol=1e-4)


@torch.no_grad()
def test_padding_inside_a_prompt_is_not_attended_to() -> None:
    model = build("Llama", max_position_embeddings=256)
    prompts = [(LONG, LONG[:55], (4,)), (LONG, LONG[:55], (5,)), (LONG, (9, 8), (6, 7))]
    frontier, _ = model.prefill(build_tree(prompts))
    assert len(build_tree(prompts).levels) > 1
    siblings = frontier.siblings(1, 1)
    got_RV = model.step(siblings, torch.tensor([1, 2, 3]))
    for row, new in enumerate([1, 2, 3]):
        want_V = plain_logits(model, (*sum(prompts[row], ()), new))
        assert torch.allclose(got_RV[row], want_V, atol=1e-4)


@torch.no_grad()
def test_rows_that_stay_go_on_as_if_the_others_had_stayed_too() -> None:
    model = build("Llama")
    frontier, _ = model.prefill(build_tree(PROMPTS))
    siblings = frontier.siblings(3, 4)
    model.step(siblings, torch.tensor([1, 2, 3, 4, 5, 6]))
    model.step(siblings, torch.tensor([6, 5, 4, 3, 2, 1]))
    siblings.keep(torch.tensor([1]), torch.tensor([[2, 0]]))
    got_RV = model.step(siblings, torch.tensor([7, 8]))
    head = sum(PROMPTS[1], ())
    assert torch.allclose(got_RV[0], plain_logits(model, (*head, 6, 1, 7)), atol=1e-4)
    assert torch.allclose(got_RV[1], plain_logits(model, (*head, 4, 3, 8)), atol=1e-4)


def test_the_prompt_is_never_copied() -> None:
    model = build("Llama")
    with torch.no_grad():
        frontier, _ = model.prefill(build_tree(PROMPTS))
        siblings = frontier.siblings(50, 4)
        for _ in range(3):
            model.step(siblings, torch.ones(100, dtype=torch.long))
    assert all(keys.shape[0] == len(PROMPTS) for keys, _ in siblings.prompts)
    assert all(keys.shape[:2] == (len(PROMPTS), 50) for keys, _ in siblings._own)


def test_the_attention_of_training_is_back_afterwards() -> None:
    model = build("Llama")
    before = model.lm.config._attn_implementation
    sample(
        model,
        PROMPTS,
        group_size=2,
        max_new_tokens=3,
        end_id=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert model.lm.config._attn_implementation == before
    model.lm(torch.tensor([[1, 2, 3]]))


def test_a_model_with_attention_of_its_own_is_refused_not_misread() -> None:
    class Own(torch.nn.Module):
        """A backbone that never asks the attention interface."""

        config = transformers.LlamaConfig(**SIZES)

        def forward(self, **_: Any) -> Any:
            return None

    cache = [(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))]
    siblings = Siblings(cache, torch.ones(1, 3), 2, 4)
    with pytest.raises(ConfigError, match=r"0 of 1 layers.*attention interface"):
        siblings.step(Own(), torch.tensor([1, 2]))


@torch.no_grad()
def test_decoding_beyond_a_sliding_window_is_refused() -> None:
    model = build("Mistral", sliding_window=32)
    frontier, _ = model.prefill(build_tree([((1,), (2, 3), LONG[:28])]))
    siblings = frontier.siblings(1, 2)
    model.step(siblings, torch.tensor([1]))
    with pytest.raises(ConfigError, match="a sliding window of 32 tokens"):
        model.step(siblings, torch.tensor([1]))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [30, 40])
def test_what_would_grow_beyond_a_sliding_window_is_sampled_plainly(tokens: int) -> None:
    model, prompt = build("Mistral", sliding_window=32), (LONG[:tokens],)
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = dict(group_size=3, max_new_tokens=4, end_id=99)
    (group,) = sample(model, [prompt], generator=generator, **arguments)
    for rollout in group:
        for i, (token, logp) in enumerate(zip(rollout.ids, rollout.logps, strict=True)):
            want_V = plain_logits(model, (*sum(prompt, ()), *rollout.ids[:i])).log_softmax(-1)
            assert logp == pytest.approx(want_V[token].item(), abs=1e-4)


def test_prompts_without_a_live_sibling_leave() -> None:
    alive = [False, True, True, False, False, False, True, True, True]
    prompts_P, siblings_PG = _still_decoding(alive, 3)
    assert prompts_P.tolist() == [0, 2]
    assert siblings_PG.tolist() == [[1, 2, 0], [0, 1, 2]]
