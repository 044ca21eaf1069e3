"""The plain forward: every text whole, no shared prefix. Slower, and right for any causal LM.

Consumes a causal LM and whole texts -> produces the same values as the shared-prefix engine, which
is compared with it and replaced by it (models/lm/self_check.py).

Tensor legend: N texts, T tokens, M tokens looked at, V vocabulary, P prompts, G siblings,
R = P * G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from models.lm.tree import Segment, padded

TOKENS_AT_ONCE = 4096
"""Padded tokens in one forward: its logits over 50,000 words take 0.8 GB."""


def plain_logits(lm: Any, texts: Sequence[Segment], tokens: Sequence[range]) -> torch.Tensor:
    """[M, V] float32: what `lm` predicts for the given token positions of each text, in order.

    Position len(text) is the token after the text. Nothing precedes position 0: zeros.
    """
    parts = []
    for start, ids_NT, mask_NT in _batches(texts, _device(lm)):
        logits_NTV = lm(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False).logits
        before_NTV = torch.nn.functional.pad(logits_NTV, (0, 0, 1, 0))
        for row, wanted in enumerate(tokens[start : start + len(ids_NT)]):
            kept_MV = before_NTV[row, wanted.start : wanted.stop]
            parts.append(kept_MV.clone())  # a view would hold on to all of the batch's logits
    return torch.cat(parts).float()


def plain_states(backbone: Any, texts: Sequence[Segment], tokens: Sequence[range]) -> torch.Tensor:
    """[M, D]: last hidden states at the given token positions of each text, in order."""
    parts = []
    for start, ids_NT, mask_NT in _batches(texts, _device(backbone)):
        out = backbone(input_ids=ids_NT, attention_mask=mask_NT, use_cache=False)
        for row, wanted in enumerate(tokens[start : start + len(ids_NT)]):
            parts.append(out.last_hidden_state[row, wanted.start : wanted.stop].clone())
    return torch.cat(parts)


def _batches(
    texts: Sequence[Segment], device: torch.device
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first text, ids_NT, mask_NT) of each part of `texts` that fits one forward."""
    at_once = max(1, TOKENS_AT_ONCE // max(len(text) for text in texts))
    for start in range(0, len(texts), at_once):
        ids_NT, mask_NT = padded(texts[start : start + at_once])
        yield start, ids_NT.to(device), mask_NT.to(device)


def _device(module: Any) -> torch.device:
    return next(module.parameters()).device


class PlainSiblings:
    """G continuations of each prompt as whole texts: what decoding.Siblings is without a cache.

    Args:
        prompts: P texts.
        group_size: G.
    """

    def __init__(self, prompts: Sequence[Segment], group_size: int) -> None:
        self.texts: list[Segment] = [text for text in prompts for _ in range(group_size)]
        self.group_size = group_size

    def keep(self, prompts_P: torch.Tensor, siblings_PG: torch.Tensor) -> None:
        """Go on with these prompts, and of each with these of its siblings."""
        rows_R = (prompts_P[:, None] * self.group_size + siblings_PG).flatten().tolist()
        self.texts = [self.texts[row] for row in rows_R]
        self.group_size = siblings_PG.shape[1]

    def step(self, lm: Any, ids_R: torch.Tensor) -> torch.Tensor:
        """Feed one token a row; next-token logits [R, V]."""
        fed = zip(self.texts, ids_R.tolist(), strict=True)
        self.texts = [(*text, token) for text, token in fed]
        return plain_logits(lm, self.texts, [range(len(t), len(t) + 1) for t in self.texts])
