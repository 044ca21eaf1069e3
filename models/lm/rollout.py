"""Sampling G responses a prompt: prefill once a prompt, decode all rows together.

Consumes: a SharedPrefixLM and prompt paths -> produces token ids with the log-probabilities under
the very distribution they were drawn from. Finished rows leave the batch. No server, one process.

Tensor legend: P prompts, G group, R = P * G rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from models.lm.shared_prefix import Path, SharedPrefixLM, build_tree

COMPACT_AT = 0.75
"""The cache is compacted when fewer than this share of its rows still decode."""


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
    trainer's at the same temperature when top_k = 0.

    Returns:
        [P][G] rollouts; a row that hits `max_new_tokens` has finished=False.
    """
    was_training = model.training
    model.eval()
    chunk = max(1, rows_at_once // group_size)
    groups: list[list[Rollout]] = []
    for start in tqdm(range(0, len(prompts), chunk), desc=desc, disable=not desc, leave=False):
        part = prompts[start : start + chunk]
        rollouts = _decode(
            model, part, group_size, max_new_tokens, end_id, generator, temperature, top_k
        )
        groups += [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    model.train(was_training)
    return groups


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
    tree = build_tree(prompts).to(device)
    frontier, logits_PV = model.prefill(tree)
    rows_R = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    logits_RV = logits_PV[rows_R]
    frontier = frontier.select(rows_R)
    ids: list[list[int]] = [[] for _ in range(len(rows_R))]
    logps: list[list[float]] = [[] for _ in range(len(rows_R))]
    alive = list(range(len(rows_R)))
    for position in range(max_new_tokens):
        token_R, logp_R = _draw(logits_RV, generator, temperature, top_k)
        still: list[int] = []
        for row, (original, token, logp) in enumerate(
            zip(alive, token_R.tolist(), logp_R.tolist(), strict=True)
        ):
            if ids[original] and ids[original][-1] == end_id:
                continue
            ids[original].append(token)
            logps[original].append(logp)
            if token != end_id:
                still.append(row)
        if not still or position == max_new_tokens - 1:
            break
        if len(still) < COMPACT_AT * len(alive):
            keep = torch.tensor(still, device=device)
            frontier, token_R = frontier.select(keep), token_R[keep]
            alive = [alive[row] for row in still]
        frontier, logits_RV = model.step(frontier, token_R)
    return [
        Rollout(tuple(i), tuple(p), finished=i[-1] == end_id)
        for i, p in zip(ids, logps, strict=True)
    ]


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
    noise_RV = torch.empty_like(choice_RV).exponential_(generator=generator).log_()
    token_R = (choice_RV - noise_RV).argmax(-1)
    return token_R, logp_RV.gather(1, token_R[:, None])[:, 0]
