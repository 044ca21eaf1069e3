"""Every stage's loss and gradient through the tree equal those of one plain forward a response."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.judge.config import GrpoConfig, LoraSettings, OptimiserConfig
from models.judge.cot_sft import sft_loss
from models.judge.groups import Member
from models.judge.grpo import _part_loss
from models.judge.trainer import make_trainable
from models.lm.shared_prefix import Path, PromptTree, ResponseLogps, SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.objectives.dpo import dpo_loss
from tests.builders import make_pairs, make_tiny_judge

RELATIVE = 1e-4
ROOT = tuple(10 + i % 50 for i in range(90))
PROMPTS: list[Path] = [
    (ROOT, tuple(20 + i % 9 for i in range(60)), (41, 42, 43)),
    (ROOT, tuple(20 + i % 9 for i in range(60)), (44,)),
    (ROOT, (30, 31), (45, 46, 47, 48, 49)),
]
LENGTHS = (4, 9, 2, 6, 7, 3)
"""Two responses a prompt, in turn: the padding of no level is that of another."""


def response(row: int) -> tuple[int, ...]:
    """Some tokens, as many as LENGTHS says."""
    return tuple(60 + (7 * row + 3 * i) % 80 for i in range(LENGTHS[row]))


PATHS: list[Path] = [(*PROMPTS[row % 3], response(row)) for row in range(6)]


class PlainLM(torch.nn.Module):
    """In place of SharedPrefixLM: one forward of `lm` a text, nothing shared or padded."""

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.device = torch.device("cpu")

    def forward(
        self, tree: PromptTree, temperature: float = 1.0, with_entropy: bool = False
    ) -> ResponseLogps:
        texts, tails = tree.texts(), tree.tail_N.tolist()
        rows, width = [], max(tails)
        for text, size in zip(texts, tails, strict=True):
            logits_TV = self.lm(torch.tensor([text])).logits[0, -size - 1 : -1] / temperature
            logp_T1 = logits_TV.log_softmax(-1).gather(1, torch.tensor(text[-size:])[:, None])
            rows.append(torch.nn.functional.pad(logp_T1[:, 0], (0, width - size)))
        mask_NT = torch.arange(width)[None] < tree.tail_N[:, None]
        entropy_PT = torch.zeros(mask_NT.shape)[tree.leaf_P] if with_entropy else None
        return ResponseLogps(torch.stack(rows)[tree.leaf_P], mask_NT[tree.leaf_P], entropy_PT)


def sft(model: Any, _: Any) -> torch.Tensor:
    logps = model(build_tree(PATHS))
    verdict_PT = logps.mask_PT & (torch.arange(logps.mask_PT.shape[1])[None] % 3 == 1)
    return sft_loss(logps, torch.zeros(6, dtype=torch.long), verdict_PT, 0.4, 0.3)[0]


def dpo(model: Any, _: Any) -> torch.Tensor:
    total_P = model(build_tree(PATHS)).logp_PT.sum(1)
    reference_P = total_P.detach() + torch.linspace(-4, 4, 6)
    return dpo_loss(total_P[:3], total_P[3:], reference_P[:3], reference_P[3:], 0.1)[0]


def grpo(model: Any, reference: Any) -> torch.Tensor:
    """Old log-probs far enough from the policy for the clip to bite; a reference of its own."""
    config = GrpoConfig(beta=0.1, temperature=0.8, clip_high=0.28, max_new_tokens=12)
    with torch.no_grad():
        now = model(build_tree(PATHS), temperature=0.8)
    rng = torch.Generator().manual_seed(2)
    old_PT = now.logp_PT + 0.3 * torch.randn(now.logp_PT.shape, generator=rng)
    members = [
        Member(row % 3, response(row), tuple(old_PT[row, : LENGTHS[row]].tolist()), a, True)
        for row, a in enumerate((1.0, -0.5, 0.3, -1.2, 0.7, -0.9))
    ]
    sampler: Any = SimpleNamespace(prompts=PROMPTS)
    loss, metrics = _part_loss(model, reference, sampler, members, config)
    assert metrics["clip_ratio/region_mean"] > 0 and metrics["kl"] > 0
    return loss


LOSSES: dict[str, Callable[[Any, Any], torch.Tensor]] = {"sft": sft, "dpo": dpo, "grpo": grpo}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A policy and a reference with other weights."""
    folder = tmp_path_factory.mktemp("gradients")
    pairs = make_pairs(12)
    one, two = (
        load_lm(make_tiny_judge(folder / str(seed), pairs, seed=seed))[0] for seed in (0, 1)
    )
    return one, two.requires_grad_(False)


def trainable(lm: Any, way: str, checkpointing: bool) -> Any:
    """A copy with all weights, the top layer, or adapters (none of them zero) to train."""
    lora = LoraSettings(r=2) if way == "lora" else None
    config = OptimiserConfig(
        lora=lora,
        train_layers=1 if way == "top" else None,
        gradient_checkpointing=checkpointing,
    )
    out = make_trainable(copy.deepcopy(lm), config)
    if way == "lora":
        rng = torch.Generator().manual_seed(1)
        for name, parameter in out.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    return out


def loss_and_gradient(loss: torch.Tensor, lm: Any) -> tuple[float, torch.Tensor]:
    parameters = [p for p in lm.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["full", "top", "lora"])
@pytest.mark.parametrize("stage", LOSSES)
def test_loss_and_gradient_equal_the_plain_forward(
    bases: tuple[Any, Any], stage: str, way: str, checkpointing: bool
) -> None:
    lm = trainable(bases[0], way, checkpointing)
    value, want = loss_and_gradient(LOSSES[stage](PlainLM(lm), PlainLM(bases[1])), lm)
    lm.train()
    assert SharedPrefixLM(lm).causal_lm.is_gradient_checkpointing == checkpointing
    loss = LOSSES[stage](SharedPrefixLM(lm), SharedPrefixLM(bases[1]))
    got_value, got = loss_and_gradient(loss, lm)
    assert got_value == pytest.approx(value, rel=RELATIVE)
    assert want.norm() > 0 and (got - want).norm() / want.norm() < RELATIVE
