"""Decoding G siblings a prompt without copying the prompt: attention in two parts.

A new token attends to its prompt, whose keys and values stay one row a prompt, and to the tokens
its own sibling has drawn, in a buffer of fixed size. One softmax runs over both, so the result is
that of the plain forward. Copying the prompt to every sibling and growing the copy by a token a
step moves 30 times as many bytes (G = 4, 190 prompt tokens) and took most of a decoding step.

Consumes: the caches that a prefill left -> produces what transformers' attention interface asks
for. Works for every model whose attention goes through that interface; others are refused.

Tensor legend: P prompts, G siblings, R = P * G rows, H key/value heads, J query heads each, D head
size, S prompt tokens, T decoded tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from models.errors import ConfigError, explain
from models.lm.precision import autocast

NAME = "relearn_siblings"
"""Name under which transformers finds `_attention`."""


class Siblings:
    """The state of one decoding batch: prompts once, G growing continuations each.

    Args:
        caches: per layer the prompts' (keys, values), each [P, H, S, D].
        mask_PS: 1 for prompt tokens, 0 for padding.
        group_size: G.
        max_new_tokens: most tokens that `attend` will be fed a row.
    """

    def __init__(
        self,
        caches: list[tuple[torch.Tensor, torch.Tensor]],
        mask_PS: torch.Tensor,
        group_size: int,
        max_new_tokens: int,
    ) -> None:
        self.prompts = caches
        self.bias_PS = torch.zeros(mask_PS.shape, device=mask_PS.device)
        self.bias_PS.masked_fill_(mask_PS == 0, float("-inf"))
        self.lengths_P = mask_PS.sum(1)
        self.group_size = group_size
        self.num_new = 0
        self._max_new = max_new_tokens
        self._own: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._attended = 0

    def keep(self, prompts_P: torch.Tensor, siblings_PG: torch.Tensor) -> None:
        """Go on with these prompts, and of each with these of its siblings."""
        self.prompts = [(k[prompts_P], v[prompts_P]) for k, v in self.prompts]
        self.bias_PS, self.lengths_P = self.bias_PS[prompts_P], self.lengths_P[prompts_P]
        rows_P1 = prompts_P[:, None]
        self._own = [(k[rows_P1, siblings_PG], v[rows_P1, siblings_PG]) for k, v in self._own]
        self.group_size = siblings_PG.shape[1]

    def step(self, backbone: Any, ids_R: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        """Feed one token a row; the backbone's last hidden states, [R, hidden].

        Raises:
            ConfigError: the model's attention does not go through transformers' interface, or
                wants something that `attend` does not do.
        """
        positions_P = self.lengths_P + self.num_new
        self._attended = 0
        with _attending(backbone), autocast(ids_R.device.type, bf16):
            out = backbone(
                input_ids=ids_R[:, None],
                position_ids=positions_P.repeat_interleave(self.group_size)[:, None],
                use_cache=False,
                siblings=self,
            )
        if self._attended != len(self.prompts):
            raise _refusal(f"{self._attended} of {len(self.prompts)} layers asked for it")
        self.num_new += 1
        return out.last_hidden_state[:, 0]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of the newest tokens, [R, 1, H * J, D]; their keys and values are kept.

        Args:
            query: [R, H * J, 1, D]. key, value: [R, H, 1, D].
        """
        self._attended += 1
        prompts, group = len(self.lengths_P), self.group_size
        heads, size = key.shape[1], key.shape[3]
        query_PGHJD = query.reshape(prompts, group, heads, -1, size) * scale
        keys_PGHTD, values_PGHTD = self._append(layer, key, value)
        own_PGHJT = query_PGHJD @ keys_PGHTD.transpose(-1, -2)
        keys_PHSD, values_PHSD = self.prompts[layer]
        query_PHXD = query_PGHJD.transpose(1, 2).reshape(prompts, heads, -1, size)
        prompt_PHXS = query_PHXD @ keys_PHSD.to(query.dtype).transpose(-1, -2)
        prompt_PHXS = prompt_PHXS + self.bias_PS[:, None, None].to(query.dtype)
        own_PHXT = own_PGHJT.transpose(1, 2).reshape(prompts, heads, -1, own_PGHJT.shape[-1])
        both = torch.cat([prompt_PHXS, own_PHXT], dim=-1)
        weights = both.softmax(-1, dtype=torch.float32).to(query.dtype)
        span = prompt_PHXS.shape[-1]
        out_PHXD = weights[..., :span] @ values_PHSD.to(query.dtype)
        own = weights[..., span:].reshape(prompts, heads, group, -1, self.num_new + 1)
        out_PGHJD = own.transpose(1, 2) @ values_PGHTD
        out_PGHJD = out_PGHJD + out_PHXD.reshape(prompts, heads, group, -1, size).transpose(1, 2)
        return out_PGHJD.reshape(prompts * group, 1, -1, size)

    def _append(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prompts, group = len(self.lengths_P), self.group_size
        if layer == len(self._own):
            shape = (prompts, group, key.shape[1], self._max_new, key.shape[3])
            self._own.append((key.new_empty(shape), value.new_empty(shape)))
        for buffer, new in zip(self._own[layer], (key, value), strict=True):
            buffer[:, :, :, self.num_new] = new.reshape(prompts, group, *new.shape[1::2])
        keys, values = self._own[layer]
        return keys[:, :, :, : self.num_new + 1], values[:, :, :, : self.num_new + 1]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    siblings: Siblings,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention."""
    for name in ("softcap", "s_aux"):
        if given.get(name) is not None:
            raise _refusal(f"attention with {name}")
    window = given.get("sliding_window")
    if window is not None:  # asked of few models; looking at a length waits for the device
        longest = int(siblings.lengths_P.max()) + siblings.num_new + 1
        if longest > window:
            raise _refusal(f"a sliding window of {window} tokens and a text of {longest}")
    return siblings.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(NAME, _attention)


@contextlib.contextmanager
def _attending(backbone: Any) -> Iterator[None]:
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = NAME
    try:
        yield
    finally:
        backbone.config._attn_implementation = before


def _refusal(got: str) -> ConfigError:
    expected = "attention over the whole text through transformers' attention interface"
    return ConfigError(explain(got, expected, "sample with another base model"))
