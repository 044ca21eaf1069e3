"""The engine compares itself with a model's plain forward before it is trusted with that model."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from models.lm import decoding, plain, self_check, shared_prefix
from models.lm.rollout import sample
from models.lm.self_check import agrees, decodes, exact_tokens
from models.lm.shared_prefix import Path, SharedPrefixLM, build_tree

VOCAB = 64
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROOT = tuple(3 + i % 40 for i in range(60))
QUERY = tuple(5 + i % 30 for i in range(55))
PATHS: list[Path] = [
    (ROOT, QUERY, (4, 9), (6, 7)),
    (ROOT, QUERY, (5,), (8, 3, 2)),
    (ROOT, (9, 8, 11), (6, 7, 12, 13), (4,)),
]
LABELS = [5, 6, 7, 8]


class OwnPositions(LlamaModel):
    """Counts positions by itself, so that padding inside a text shifts what follows."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class CountsItself(LlamaForCausalLM):
    """Wrong in a way that only padded levels show."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = OwnPositions(config)
        self.post_init()


class NoCache(LlamaModel):
    """Takes no cache at all, as models with a recurrent state do not take this one."""

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool = False) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=False)


class HasNoCache(LlamaForCausalLM):
    """Raises in the engine."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = NoCache(config)
        self.post_init()

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        states = self.model(input_ids, attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(states))


def llama(kind: Callable[[LlamaConfig], Any] = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return loud(kind(LlamaConfig(**(SIZES | changes))))


def gemma() -> Any:
    """Its logits are not the output layer's: they are squeezed by tanh."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=1.0)
    return loud(transformers.Gemma2ForCausalLM(config))


def loud(lm: Any) -> Any:
    """With weights large enough for attention to look at something."""
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return lm.eval()


WRONG = {
    "positions": lambda: llama(CountsItself),
    "no_cache": lambda: llama(HasNoCache),
    "softcap": gemma,
}


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict of another test."""
    monkeypatch.setattr(self_check, "_VERDICTS", {})


def plain_logits(lm: Any, ids: tuple[int, ...]) -> torch.Tensor:
    return lm(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits[
        0
    ]


def plain_logps(lm: Any, path: Path) -> torch.Tensor:
    logp_TV = plain_logits(lm, sum(path, ()))[-len(path[-1]) - 1 : -1].log_softmax(-1)
    return logp_TV.gather(1, torch.tensor(path[-1])[:, None])[:, 0]


def assert_equals_plain(model: SharedPrefixLM) -> None:
    """Responses, labels with and without a cached root, next tokens."""
    with torch.no_grad():
        logps = model(build_tree(PATHS))
        prompts = [path[:-1] for path in PATHS]
        root, _ = model.prefill(build_tree([(ROOT,)]))
        labels = model.label_logprobs(build_tree(prompts), LABELS)
        cached = model.label_logprobs(build_tree([p[1:] for p in prompts]), LABELS, root)
        _, next_PV = model.prefill(build_tree(prompts))
        for row, path in enumerate(PATHS):
            want = plain_logps(model.lm, path)
            assert torch.allclose(logps.logp_PT[row][logps.mask_PT[row]], want, atol=1e-4)
            want_V = plain_logits(model.lm, sum(path[:-1], ()))[-1]
            assert torch.allclose(next_PV[row], want_V, atol=1e-4)
            want_L = want_V[LABELS].log_softmax(-1)
            assert torch.allclose(labels[row], want_L, atol=1e-4)
            assert torch.allclose(cached[row], want_L, atol=1e-4)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_architecture_is_named_and_computed_plainly(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm = WRONG[kind]()
    lm.name_or_path = "some/base"
    model = SharedPrefixLM(lm)
    with caplog.at_level(logging.WARNING):
        assert_equals_plain(model)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "models.lm.self_check"]
    assert f"{type(lm).__name__} (some/base) cannot share prefixes" in warning
    assert ("TypeError" in warning) == (kind == "no_cache")
    assert ("log-probs up to" in warning) == (kind != "no_cache")


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_architecture_trains_on_the_plain_gradient(kind: str) -> None:
    lm = WRONG[kind]()
    parts = [plain_logps(lm, path).sum() for path in PATHS]
    want = torch.autograd.grad(torch.stack(parts).sum(), list(lm.parameters()), allow_unused=True)
    loss = SharedPrefixLM(lm)(build_tree(PATHS)).logp_PT.sum()
    got = torch.autograd.grad(loss, list(lm.parameters()), allow_unused=True)
    one, two = (torch.cat([g.flatten() for g in x if g is not None]) for x in (got, want))
    assert (one - two).norm() / two.norm() < 1e-4


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_architecture_samples_from_its_plain_distribution(kind: str) -> None:
    model = SharedPrefixLM(WRONG[kind]())
    prompts = [path[:-1] for path in PATHS]
    generator = torch.Generator().manual_seed(0)
    groups = sample(model, prompts, group_size=3, max_new_tokens=6, end_id=2, generator=generator)
    with torch.no_grad():
        for prompt, group in zip(prompts, groups, strict=True):
            for rollout in group:
                want = plain_logps(model.lm, (*prompt, rollout.ids))
                assert torch.allclose(torch.tensor(rollout.logps), want, atol=1e-4)


def attention_softcap() -> Any:
    """Read as a tree like any other; its attention asks for more than siblings do."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES, final_logit_softcapping=None, attn_logit_softcapping=2.0
    )
    return loud(transformers.Gemma2ForCausalLM(config))


def test_a_model_that_cannot_decode_from_a_shared_prompt_is_named_and_sampled_plainly(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SharedPrefixLM(attention_softcap())
    assert agrees(model)
    prompts = [path[:-1] for path in PATHS]
    generator = torch.Generator().manual_seed(0)
    with caplog.at_level(logging.WARNING):
        groups = sample(
            model, prompts, group_size=3, max_new_tokens=6, end_id=2, generator=generator
        )
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "models.lm.self_check"]
    assert "cannot decode from a shared prompt: ConfigError: got attention with softcap" in warning
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            with torch.no_grad():
                want = plain_logps(model.lm, (*prompt, rollout.ids))
            assert torch.allclose(torch.tensor(rollout.logps), want, atol=1e-4)
    monkeypatch.setattr(shared_prefix, "plain_logits", None)  # reading still shares
    with torch.no_grad():
        model(build_tree(PATHS))


def test_a_model_that_decodes_to_something_else_is_sampled_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend, fault = decoding.Siblings.attend, 1.1

    def scaled(self: Any, layer: int, query: Any, key: Any, value: Any, scale: float) -> Any:
        return attend(self, layer, query, key, value, fault * scale)

    model = SharedPrefixLM(llama())
    assert decodes(model) and self_check._VERDICTS
    self_check._VERDICTS.clear()
    monkeypatch.setattr(decoding.Siblings, "attend", scaled)
    assert agrees(model) and not decodes(model)
    fault = -1.0  # in half precision a fault has to be a gross one
    wide = dict(hidden_size=128, intermediate_size=256, head_dim=32)
    half = SharedPrefixLM(llama(**wide).to(torch.bfloat16))
    assert agrees(half) and not decodes(half)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_a_right_architecture_shares_its_prefixes_in_silence(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = SharedPrefixLM(loud(getattr(transformers, f"{kind}ForCausalLM")(config)))
    monkeypatch.setattr(shared_prefix, "plain_logits", None)  # not to be called
    assert_equals_plain(model)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_and_wrong_are_told_apart_in_half_precision(dtype: torch.dtype) -> None:
    wide = dict(hidden_size=128, intermediate_size=256, head_dim=32)
    right = SharedPrefixLM(llama(**wide).to(dtype))
    assert agrees(right) and decodes(right)
    assert not agrees(SharedPrefixLM(llama(CountsItself, **wide).to(dtype)))


def test_each_kind_of_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    real = self_check._compare

    def counted(model: SharedPrefixLM) -> Any:
        checked.append(type(model.causal_lm).__name__)
        return real(model)

    monkeypatch.setattr(self_check, "_compare", counted)
    for _ in range(2):
        for lm in (llama(), llama(CountsItself), llama(num_hidden_layers=1)):
            model = SharedPrefixLM(lm)
            with torch.no_grad():
                model(build_tree(PATHS))
                model(build_tree(PATHS))
    assert checked == ["LlamaForCausalLM", "CountsItself", "LlamaForCausalLM"]


def test_the_check_leaves_no_trace() -> None:
    lm = llama(attention_dropout=0.5).train()
    lm.model.layers[0].eval()
    model = SharedPrefixLM(lm, bf16=True)
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    assert agrees(model)  # with dropout it would not
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert model.bf16 and all(p.grad is None for p in lm.parameters())


def test_broken_weights_say_nothing_about_their_kind() -> None:
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    assert agrees(SharedPrefixLM(broken))
    assert not self_check._VERDICTS
    assert agrees(SharedPrefixLM(llama()))


def test_an_output_layer_with_a_bias_scores_labels_with_it() -> None:
    lm = llama()
    head = torch.nn.Linear(SIZES["hidden_size"], VOCAB)
    with torch.no_grad():
        head.bias.copy_(torch.linspace(-3, 3, VOCAB))
    lm.set_output_embeddings(head)
    assert_equals_plain(SharedPrefixLM(lm))


def test_gradient_checkpointing_trains_on_the_plain_gradient() -> None:
    """transformers drops the cache of a checkpointed layer: levels would not see their parents."""
    lm = llama()

    def gradient() -> torch.Tensor:
        loss = SharedPrefixLM(lm)(build_tree(PATHS)).logp_PT.sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lm.parameters()))])

    want = gradient()
    lm.train()
    lm.gradient_checkpointing_enable()
    got = gradient()
    assert (got - want).norm() / want.norm() < 1e-4


@pytest.mark.parametrize("window", [64, 125, 4096])
def test_texts_beyond_a_sliding_window_are_read_plainly(window: int) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, sliding_window=window)
    assert_equals_plain(SharedPrefixLM(loud(transformers.MistralForCausalLM(config))))


def test_how_long_a_text_may_be() -> None:
    assert exact_tokens(LlamaConfig(**SIZES)) == math.inf
    assert exact_tokens(transformers.MistralConfig(**SIZES, sliding_window=7)) == 7
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert exact_tokens(LlamaConfig(**SIZES, rope_parameters=dynamic)) == 256
    fixed = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert exact_tokens(LlamaConfig(**SIZES, rope_parameters=fixed)) == math.inf


class Counts(torch.nn.Module):
    """A model whose results for earlier batches are looked for in memory at each call."""

    def __init__(self, inner: Any, width: int) -> None:
        super().__init__()
        self.inner, self.width, self.alive = inner, width, [0]

    def forward(self, **given: Any) -> Any:
        held = {
            storage.data_ptr(): storage.nbytes()
            for thing in gc.get_objects()
            if type(thing) is torch.Tensor and thing.shape[-1:] == (self.width,)
            for storage in [thing.untyped_storage()]
        }
        self.alive.append(sum(held.values()))
        return self.inner(**given)


@pytest.mark.parametrize(
    ("read", "trained"),
    [(plain.plain_logits, False), (plain.plain_logits, True), (plain.plain_states, False)],
)
def test_what_the_plain_forward_made_of_earlier_batches_is_let_go(
    read: Any, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "TOKENS_AT_ONCE", 100)
    lm = llama(hidden_size=40)
    of_states = read is plain.plain_states
    counts = Counts(lm.model if of_states else lm, 40 if of_states else VOCAB)
    gc.collect()
    with torch.set_grad_enabled(trained):
        got = read(counts, [ROOT] * 12, [range(59, 60)] * 12)
    assert got.shape == (12, counts.width) and len(counts.alive) == 13
    one_batch = 4 * counts.width * (len(ROOT) + 1)
    assert max(counts.alive) - counts.alive[1] < 2.5 * one_batch
