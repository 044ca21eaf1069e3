"""The shared-prefix engine equals the plain forward: log-probs, labels, gradients."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from models.lm import tree
from models.lm.shared_prefix import Path, SharedPrefixLM, build_tree

VOCAB = 60


@pytest.fixture(scope="module")
def lm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def plain_logps(lm: LlamaForCausalLM, path: Path) -> torch.Tensor:
    ids = torch.tensor([sum(path, ())])
    size = len(path[-1])
    logits = lm(ids).logits[0, -size - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(path[-1])[:, None])[:, 0]


segments = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=9).map(tuple)


@st.composite
def trees(draw: st.DrawFn) -> list[Path]:
    root = draw(segments)
    paths = []
    for _ in range(draw(st.integers(1, 3))):
        query = draw(segments)
        for _ in range(draw(st.integers(1, 3))):
            item = draw(segments)
            paths += [(root, query, item, draw(segments)) for _ in range(draw(st.integers(1, 2)))]
    return draw(st.permutations(paths))


@pytest.mark.parametrize("pass_tokens", [-1, 10, 10_000])
@settings(max_examples=25, deadline=None)
@given(paths=trees())
def test_logps_equal_plain_forward_for_any_tree_and_any_joining(
    lm: LlamaForCausalLM, pass_tokens: int, paths: list[Path]
) -> None:
    before, tree.PASS_TOKENS = tree.PASS_TOKENS, pass_tokens
    try:
        with torch.no_grad():
            got = SharedPrefixLM(lm)(build_tree(paths))
            for row, path in enumerate(paths):
                want = plain_logps(lm, path)
                assert int(got.mask_PT[row].sum()) == len(path[-1])
                assert torch.allclose(got.logp_PT[row, : len(path[-1])], want, atol=1e-4)
    finally:
        tree.PASS_TOKENS = before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_logps_equal_padded_batches_of_any_size_and_side(
    lm: LlamaForCausalLM, side: str, rows: int
) -> None:
    rng = random.Random(rows)

    def run(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, VOCAB) for _ in range(rng.randint(1, longest)))

    root, queries = run(70), [run(60), run(60)]
    paths = [(root, queries[i % 2], run(30), run(12)) for i in range(8)]
    got, want = [], []
    with torch.no_grad():
        for start in range(0, 8, rows):
            part = paths[start : start + rows]
            out = SharedPrefixLM(lm)(build_tree(part))
            got += [logp[mask] for logp, mask in zip(out.logp_PT, out.mask_PT, strict=True)]
            want += padded_logps(lm, part, side)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, want, strict=True))


def padded_logps(lm: LlamaForCausalLM, paths: list[Path], side: str) -> list[torch.Tensor]:
    """What transformers itself computes for one batch padded on `side`."""
    texts = [sum(path, ()) for path in paths]
    width = max(map(len, texts))
    fill = [(0,) * (width - len(text)) for text in texts]
    if side == "left":
        ids = torch.tensor([f + t for f, t in zip(fill, texts, strict=True)])
        ends = [width] * len(texts)
    else:
        ids = torch.tensor([t + f for f, t in zip(fill, texts, strict=True)])
        ends = [len(text) for text in texts]
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = lm(ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    out = []
    for row, (path, end) in enumerate(zip(paths, ends, strict=True)):
        start = end - len(path[-1])
        target = torch.tensor(path[-1])[:, None]
        out.append(logits[row, start - 1 : end - 1].gather(1, target)[:, 0])
    return out


@pytest.mark.parametrize("pass_tokens", [-1, 48])
def test_gradients_equal_plain_forward(
    lm: LlamaForCausalLM, pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "PASS_TOKENS", pass_tokens)
    root, query = tuple(range(1, 40)), (3, 4)
    paths = [(root, query, (i, i + 1), tuple(range(i, i + 3 + i % 2))) for i in range(1, 6)]
    weights = torch.arange(1.0, 6.0)

    def grads(loss: torch.Tensor) -> torch.Tensor:
        lm.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])

    shared = grads((SharedPrefixLM(lm)(build_tree(paths)).logp_PT.sum(1) * weights).sum())
    parts = [w * plain_logps(lm, p).sum() for w, p in zip(weights, paths, strict=True)]
    plain = grads(torch.stack(parts).sum())
    assert (shared - plain).norm() / plain.norm() < 1e-4
    lm.zero_grad()


def test_label_logprobs_equal_plain_softmax_and_accept_a_cached_root(lm: LlamaForCausalLM) -> None:
    model, labels = SharedPrefixLM(lm), [5, 6, 7, 8]
    root = tuple(range(1, 30))
    paths = [(root, (40, 41), (i, i + 1, i + 2)[: 1 + i % 3]) for i in range(9)]
    with torch.no_grad():
        frontier, _ = model.prefill(build_tree([(root,)]))
        cached = model.label_logprobs(build_tree([p[1:] for p in paths]), labels, frontier)
        whole = model.label_logprobs(build_tree(paths), labels)
        for row, path in enumerate(paths):
            logits = lm(torch.tensor([sum(path, ())])).logits[0, -1, labels]
            want = torch.log_softmax(logits, -1)
            assert torch.allclose(whole[row], want, atol=1e-4)
            assert torch.allclose(cached[row], want, atol=1e-4)
    assert torch.allclose(whole.exp().sum(1), torch.ones(9), atol=1e-5)


def test_shared_tokens_are_computed_once() -> None:
    root = tuple(range(1, 101))
    paths = [(root, (q,) * 60, (q, i), (1, 2)) for q in range(2) for i in range(5)]
    # 100 root tokens once, 2 queries of 60 once, 10 leaves of item + response = 4 tokens
    assert build_tree(paths).num_tokens == 100 + 2 * 60 + 10 * 4


def test_equal_paths_share_a_leaf_and_keep_their_rows(lm: LlamaForCausalLM) -> None:
    path = ((1, 2), (3,), (4, 5), (6,))
    tree = build_tree([path, path])
    assert tree.leaf_P.tolist() == [0, 0]
    with torch.no_grad():
        got = SharedPrefixLM(lm)(tree).logp_PT
    assert torch.equal(got[0], got[1])


def test_same_ids_cut_differently_stay_apart(lm: LlamaForCausalLM) -> None:
    """Joined ids are the same, the responses are not: each keeps its own length."""
    paths = [((1,), (2,), (3, 4), (5, 6)), ((1,), (2,), (3,), (4, 5, 6))]
    with torch.no_grad():
        got = SharedPrefixLM(lm)(build_tree(paths))
        assert got.mask_PT.sum(1).tolist() == [2, 3]
        for row, path in enumerate(paths):
            want = plain_logps(lm, path)
            assert torch.allclose(got.logp_PT[row, : len(want)], want, atol=1e-4)


def test_empty_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="empty segment"):
        build_tree([((1,), ())])


def test_lora_gradients_reach_the_adapters_through_the_tree(lm: LlamaForCausalLM) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    copy = LlamaForCausalLM(lm.config)
    peft = get_peft_model(copy, LoraConfig(r=2, target_modules="all-linear"))
    loss = -SharedPrefixLM(peft)(build_tree([((1, 2), (3,), (4,), (5, 6))])).logp_PT.sum()
    loss.backward()
    names = [n for n, p in peft.named_parameters() if p.grad is not None and p.grad.norm() > 0]
    assert names and all("lora_" in n for n in names)


def test_entropy_is_that_of_the_next_token_distribution(lm: LlamaForCausalLM) -> None:
    path = ((1, 2), (3,), (4,), (5,))
    with torch.no_grad():
        got = SharedPrefixLM(lm)(build_tree([path]), with_entropy=True).entropy_PT
        p = lm(torch.tensor([[1, 2, 3, 4]])).logits[0, -1].softmax(-1)
    assert got is not None
    assert got[0, 0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
