"""May a model be read as a tree? Asked of the model itself, once a process and kind of model.

The shared-prefix engine assumes what holds for most causal LMs of transformers: a cache that any
row may be taken from, positions that can be given, and logits that are the output layer's. A model
that does otherwise would be scored and trained wrongly without a word. So before the first use its
log-probs on a small built tree are compared with those of its plain forward; where they differ, a
warning says by how much, and everything is computed by the plain forward: right, and slower.
Decoding from a shared prompt is asked of it in the same way, before the first sampling.

Tensor legend: M response tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from models.lm.plain import plain_logits
from models.lm.tree import PromptTree, build_tree

if TYPE_CHECKING:
    from models.lm.shared_prefix import SharedPrefixLM

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Largest gap of a log-prob, as a share of the log-prob where that exceeds one nat. In bf16 it is
three times what thirty random layers show (infra/LOG.md)."""

HALF = (torch.bfloat16, torch.float16)
DECODING = 10
"""Times as much is allowed of decoding in half precision: its attention adds in another order, and
thirty layers of SmolLM2 in bf16 are .03 to .14 nats from float32 by either (measured, ours)."""

_VERDICTS: dict[tuple[Any, ...], bool] = {}


def agrees(model: SharedPrefixLM) -> bool:
    """Whether the engine's log-probs are the plain forward's for this kind of model.

    Kinds differ by class, config, dtype, device and kind of adapters; a kind is checked once a
    process. A model whose plain log-probs are not finite says nothing and is not remembered.
    """
    return _verdict(model, decoding=False)


def decodes(model: SharedPrefixLM) -> bool:
    """Whether siblings that share one copy of their prompt decode as the plain forward does.

    Asked of a model that `agrees`, and remembered as that is.
    """
    return _verdict(model, decoding=True)


def exact_tokens(config: Any) -> float:
    """Longest text, padding included, that a tree of levels reads as the plain forward does.

    Windows and chunks of attention count padded columns, and some rotary embeddings change with
    the length of what is read in one pass; beyond these lengths the check above says nothing.
    """
    text = config.get_text_config()
    bounds = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            original = part.get("original_max_position_embeddings")
            bounds.append(original or text.max_position_embeddings)
    return min((bound for bound in bounds if bound), default=math.inf)


def built_tree(vocab_size: int) -> PromptTree:
    """Three texts that share, branch and are padded at every level but the first."""

    def run(start: int, count: int) -> tuple[int, ...]:
        return tuple(
            (start * 31 + 7 * i) % (vocab_size // 2) + vocab_size // 4 for i in range(count)
        )

    root, short, long = run(1, 7), run(2, 2), run(3, 9)
    paths = [
        (root, short, run(4, 2), run(5, 3)),
        (root, short, run(6, 7), run(7, 1)),
        (root, long, run(8, 4), run(9, 2)),
    ]
    return build_tree(paths, pass_tokens=-1)


def _verdict(model: SharedPrefixLM, decoding: bool) -> bool:
    kind = (decoding, *_kind(model))
    if kind not in _VERDICTS:
        gap, allowed, why = _compare_decoding(model) if decoding else _compare(model)
        if math.isnan(gap):
            return True
        _VERDICTS[kind] = gap <= allowed
        if gap > allowed:
            log.warning(_warning(model, gap, allowed, why, decoding))
    return _VERDICTS[kind]


@torch.no_grad()
def _compare(model: SharedPrefixLM) -> tuple[float, float, str]:
    """(largest gap, what is allowed, the engine's error if it raised one)."""
    vocab_size = model.head.weight.shape[0]
    tree = built_tree(vocab_size).to(model.device)
    texts, tails = tree.texts(), tree.tail_N.tolist()
    tokens = [range(len(t) - n, len(t)) for t, n in zip(texts, tails, strict=True)]
    targets_M1 = torch.tensor(
        [[text[i]] for text, at in zip(texts, tokens, strict=True) for i in at]
    )
    targets_M1 = targets_M1.to(model.device)
    allowed = _allowed(model)
    with _as_in_scoring(model):
        alone = [plain_logits(model.lm, [t], [at]) for t, at in zip(texts, tokens, strict=True)]
        want_M = torch.cat(alone).log_softmax(-1).gather(1, targets_M1)
        try:
            got_M = model.shared_logits(tree).log_softmax(-1).gather(1, targets_M1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture without such a cache raises
            return math.inf, allowed, f"{type(error).__name__}: {error}"
    return _gap(got_M, want_M), allowed, ""


@torch.no_grad()
def _compare_decoding(model: SharedPrefixLM) -> tuple[float, float, str]:
    """The same of the second of two tokens decoded by two siblings of each text."""
    tree = built_tree(model.head.weight.shape[0])
    texts = [text for text in tree.texts() for _ in range(2)]
    first, second = (
        [text[(at + step) % len(text)] for at, text in enumerate(texts)] for step in (0, 3)
    )
    fed = [(*text, *both) for text, *both in zip(texts, first, second, strict=True)]
    allowed = _allowed(model) * (DECODING if next(model.parameters()).dtype in HALF else 1)
    with _as_in_scoring(model):
        alone = [plain_logits(model.lm, [t], [range(len(t), len(t) + 1)]) for t in fed]
        want_RV = torch.cat(alone).log_softmax(-1)
        try:
            frontier, _ = model.prefill(tree.to(model.device))
            siblings = frontier.siblings(2, 2)
            model.step(siblings, torch.tensor(first, device=model.device))
            got_RV = model.step(siblings, torch.tensor(second, device=model.device)).log_softmax(-1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a refusal, or whatever an attention of its own raises
            return math.inf, allowed, f"{type(error).__name__}: {error}"
    at_R1 = want_RV.argmax(-1, keepdim=True)
    return _gap(got_RV.gather(1, at_R1), want_RV.gather(1, at_R1)), allowed, ""


def _allowed(model: SharedPrefixLM) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, max(TOLERANCE.values()))


def _gap(got_M: torch.Tensor, want_M: torch.Tensor) -> float:
    """The largest gap, relative beyond one nat; NaN where the plain forward is not finite."""
    if not bool(torch.isfinite(want_M).all()):
        return math.nan
    gap = ((got_M - want_M).abs() / want_M.abs().clamp_min(1)).max().item()
    return math.inf if math.isnan(gap) else gap


@contextlib.contextmanager
def _as_in_scoring(model: SharedPrefixLM) -> Iterator[None]:
    """No dropout and no autocast: the parameters' own precision; all as before afterwards."""
    training = {module: module.training for module in model.modules()}
    bf16 = model.bf16
    model.eval()
    model.bf16 = False
    try:
        yield
    finally:
        model.bf16 = bf16
        for module, was in training.items():
            module.training = was


def _kind(model: SharedPrefixLM) -> tuple[Any, ...]:
    causal_lm, first = model.causal_lm, next(model.parameters())
    config = causal_lm.config
    attention = config._attn_implementation
    kind = (type(model.lm), type(causal_lm), config.to_json_string(), attention)
    return (*kind, first.dtype, first.device.type)


def _warning(model: SharedPrefixLM, gap: float, allowed: float, why: str, decoding: bool) -> str:
    causal_lm = model.causal_lm
    name = getattr(causal_lm, "name_or_path", "") or "unnamed"
    got = why or f"log-probs up to {gap:.2g} from those of the plain forward, allowed {allowed:.0e}"
    cannot, done = "share prefixes", "scored and trained"
    if decoding:
        cannot, done = "decode from a shared prompt", "sampled"
    return (
        f"{type(causal_lm).__name__} ({name}) cannot {cannot}: {got}. It is {done} by its plain "
        "forward, right but several times slower; choose a Llama or Qwen base"
    )
