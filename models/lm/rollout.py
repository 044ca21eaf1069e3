"""Sampling G responses a prompt: prefill once a prompt, decode all rows together.

Consumes: a SharedPrefixLM and prompt paths -> produces token ids with the log-probabilities under
the very distribution they were drawn from. Finished rows leave the batch. No server, one process.

Tensor legend: P prompts, G group, R = P * G rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.lm.precision import weights_cast
from models.lm.shared_prefix import Path, SharedPrefixLM, build_tree

COMPACT_AT = 0.75
"""Finished rows leave the batch once what is left is below this share of it."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response. ids end with the end token when `finished`."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool


@torch.no_grad()
def sample(
    model: SharedPrefixLM,
    prompts: Sequence[Path],
    *,
    group_size: int,
    max_new_tokens: int,
    end_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    rows_at_once: int = 64,
    desc: str = "",
) -> list[list[Rollout]]:
    """G responses for every prompt, in prompt order.

    The kept log-probs are those of softmax(logits / temperature) before top-k, so they equal the
    trainer's at the same temperature when top_k = 0. Adapters are merged meanwhile, and weights
    that autocast would cast at every token are cast once.

    Returns:
        [P][G] rollouts; a row that hits `max_new_tokens` has finished=False.
    """
    was_training = model.training
    model.eval()
    chunk = max(1, rows_at_once // group_size)
    groups: list[list[Rollout]] = []
    starts = range(0, len(prompts), chunk)
    try:
        with adapters_merged(model.lm):
            for start in tqdm(starts, desc=desc, disable=not desc, leave=False):
                part = prompts[start : start + chunk]
                drawn = _decode(
                    model, part, group_size, max_new_tokens, end_id, generator, temperature, top_k
                )
                groups += [drawn[i : i + group_size] for i in range(0, len(drawn), group_size)]
    finally:
        model.train(was_training)
    return groups


@contextlib.contextmanager
def adapters_merged(lm: torch.nn.Module) -> Iterator[None]:
    """peft's adapters are part of the weights inside; each token costs two products a layer less.

    Afterwards the weights are to the bit what they were, which subtracting the adapters again would
    not give: a copy of the adapted ones is kept meanwhile. Without adapters nothing happens.
    """
    if not hasattr(lm, "peft_config"):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer, weight, before in zip(layers, weights, kept, strict=True):
            layer.unmerge()
            weight.data.copy_(before)


def _products(causal_lm: Any) -> list[torch.nn.Module]:
    """What autocast computes in bf16. An output layer tied to the embeddings is not among them:
    cast, it would take the residual stream to bf16 with it."""
    embeddings = causal_lm.get_input_embeddings().weight
    linear = (m for m in causal_lm.modules() if isinstance(m, torch.nn.Linear))
    return [m for m in linear if m.weight is not embeddings]


def _decode(
    model: SharedPrefixLM,
    prompts: Sequence[Path],
    group_size: int,
    max_new_tokens: int,
    end_id: int,
    generator: torch.Generator,
    temperature: float,
    top_k: int,
) -> list[Rollout]:
    device = model.device
    frontier, logits_PV = model.prefill(build_tree(prompts).to(device), reserve=max_new_tokens)
    siblings = frontier.siblings(group_size, max_new_tokens)
    logits_RV = logits_PV.repeat_interleave(group_size, dim=0)
    ids: list[list[int]] = [[] for _ in range(len(logits_RV))]
    logps: list[list[float]] = [[] for _ in range(len(logits_RV))]
    rollout_R = list(range(len(logits_RV)))
    with weights_cast(_products(model.causal_lm), model.bf16):
        for position in range(max_new_tokens):
            token_R, logp_R = _draw(logits_RV, generator, temperature, top_k)
            drawn = zip(rollout_R, token_R.tolist(), logp_R.tolist(), strict=True)
            for rollout, token, logp in drawn:
                if not ids[rollout] or ids[rollout][-1] != end_id:
                    ids[rollout].append(token)
                    logps[rollout].append(logp)
            alive_R = [ids[rollout][-1] != end_id for rollout in rollout_R]
            if not any(alive_R) or position == max_new_tokens - 1:
                break
            prompts_P, siblings_PG = _still_decoding(alive_R, siblings.group_size)
            if siblings_PG.size < COMPACT_AT * len(alive_R):
                kept_R = (prompts_P[:, None] * siblings.group_size + siblings_PG).ravel()
                siblings.keep(
                    torch.from_numpy(prompts_P).to(device), torch.from_numpy(siblings_PG).to(device)
                )
                rollout_R = [rollout_R[row] for row in kept_R.tolist()]
                token_R = token_R[torch.from_numpy(kept_R).to(device)]
            logits_RV = model.step(siblings, token_R)
    return [
        Rollout(tuple(i), tuple(p), finished=i[-1] == end_id)
        for i, p in zip(ids, logps, strict=True)
    ]


def _still_decoding(alive_R: list[bool], group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with a live sibling, and as many siblings of each as the liveliest has, live first.

    >>> prompts, siblings = _still_decoding([False, True, False, False, False, True], 2)
    >>> prompts.tolist(), siblings.tolist()
    ([0, 2], [[1], [1]])
    """
    alive_PG = np.array(alive_R).reshape(-1, group_size)
    prompts_P = np.flatnonzero(alive_PG.any(1))
    order_PG = np.argsort(~alive_PG[prompts_P], axis=1, kind="stable")
    return prompts_P, order_PG[:, : alive_PG.sum(1).max()]


def _draw(
    logits_RV: torch.Tensor, generator: torch.Generator, temperature: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row; temperature 0 is greedy. Returns ids and log-probs, both [R]."""
    scale = temperature if temperature > 0 else 1.0
    logp_RV = torch.log_softmax(logits_RV.float() / scale, dim=-1)
    if temperature == 0:
        logp_R, token_R = logp_RV.max(-1)
        return token_R, logp_R
    choice_RV = logp_RV
    if top_k > 0:
        floor_R1 = logp_RV.topk(min(top_k, logp_RV.shape[-1]), dim=-1).values[:, -1:]
        choice_RV = logp_RV.masked_fill(logp_RV < floor_R1, float("-inf"))
    # inverse transform: one random number a row, where Gumbel noise would draw one a token
    wide = torch.float32 if choice_RV.device.type == "mps" else torch.float64
    cdf_RV = choice_RV.to(wide).exp().cumsum(-1)
    u_R1 = torch.rand(len(cdf_RV), 1, dtype=cdf_RV.dtype, device=cdf_RV.device, generator=generator)
    token_R = torch.searchsorted(cdf_RV, u_R1 * cdf_RV[:, -1:], right=True)[:, 0]
    token_R = token_R.clamp(max=cdf_RV.shape[-1] - 1)
    return token_R, logp_RV.gather(1, token_R[:, None])[:, 0]
