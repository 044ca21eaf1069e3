"""Our losses equal TRL's own code on the same log-probs, values and gradients.

TRL's trainers are made without their constructors (which want datasets and a disk): `_compute_loss`
is theirs, only the attributes that it reads are given here, and log-probs come from us.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.judge.config import GrpoConfig
from models.judge.groups import Member
from models.judge.grpo import _part_loss, _update
from models.lm.shared_prefix import ResponseLogps, SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.objectives.dpo import dpo_loss
from models.objectives.kl import k3
from models.objectives.surrogate import (
    clipped_surrogate,
    reduce_dapo,
    reduce_dr_grpo,
    reduce_grpo,
)
from tests.builders import make_pairs, make_tiny_judge

TOLERANCE = 1e-5
LOSSES = ("grpo", "dapo", "dr_grpo")
MAX_TOKENS = 12
BETA = 0.04


# DPO


def trl_dpo(
    logp_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    ref_B: torch.Tensor,
    beta: float,
    kind: str,
    smoothing: float,
) -> torch.Tensor:
    """TRL's DPO loss; rows are chosen then rejected, log-probs one a response token."""
    from accelerate import Accelerator
    from trl import DPOTrainer

    rows, tokens = logp_BT.shape
    trainer: Any = object.__new__(DPOTrainer)
    trainer.model = torch.nn.Identity().eval()
    trainer.accelerator = Accelerator(cpu=True)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha, trainer.precompute_ref_logps = None, True
    trainer.f_divergence_type, trainer.beta, trainer.label_smoothing = "reverse_kl", beta, smoothing
    trainer.loss_types, trainer.loss_weights = [kind], [1.0]

    def model(**_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(logp_BT).detach()
        return SimpleNamespace(
            log_probs=logp_BT, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    inputs = {
        "input_ids": torch.ones(rows, tokens + 1, dtype=torch.long),
        "attention_mask": torch.ones(rows, tokens + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask_BT.long(), (1, 0)),
        "ref_chosen_logps": ref_B[: rows // 2],
        "ref_rejected_logps": ref_B[rows // 2 :],
    }
    return trainer._compute_loss(model, inputs, return_outputs=False)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("ipo", 0.0)])
def test_dpo_equals_trl(beta: float, kind: Any, smoothing: float) -> None:
    random = torch.Generator().manual_seed(3)
    mask_BT = torch.arange(9)[None] < torch.tensor([9, 3, 5, 8, 2, 7, 9, 4])[:, None]
    logp_BT = (-3 * torch.rand(8, 9, generator=random) * mask_BT).requires_grad_()
    ref_B = logp_BT.detach().sum(1) + 4 * torch.randn(8, generator=random)
    theirs = trl_dpo(logp_BT, mask_BT, ref_B, beta, kind, smoothing)
    (chosen_B, rejected_B), (ref_chosen_B, ref_rejected_B) = logp_BT.sum(1).chunk(2), ref_B.chunk(2)
    tokens = mask_BT[:4].sum(1), mask_BT[4:].sum(1)
    ours, _ = dpo_loss(
        chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta, kind, smoothing, tokens
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    gradients = [torch.autograd.grad(x, logp_BT, retain_graph=True)[0] for x in (ours, theirs)]
    assert torch.allclose(*gradients, atol=TOLERANCE)
    assert gradients[0].abs().max() > 100 * TOLERANCE


# GRPO


@dataclass(frozen=True)
class Batch:
    """Everything both losses read; members are rows, tokens are columns, padding is at the end."""

    logp_BT: torch.Tensor
    old_BT: torch.Tensor
    ref_BT: torch.Tensor
    mask_BT: torch.Tensor
    advantage_B: torch.Tensor


def make_batch(seed: int = 0, rows: int = 6) -> Batch:
    """Random responses of 3..MAX_TOKENS tokens, far enough off policy for the clip to bite."""
    random = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(3, MAX_TOKENS + 1, (rows,), generator=random)
    lengths_B[0] = MAX_TOKENS
    mask_BT = torch.arange(MAX_TOKENS)[None] < lengths_B[:, None]
    logp_BT = -3 * torch.rand(rows, MAX_TOKENS, generator=random) * mask_BT
    noise = [0.4 * torch.randn(rows, MAX_TOKENS, generator=random) * mask_BT for _ in range(2)]
    advantage_B = torch.randn(rows, generator=random)
    logp_BT.requires_grad_()
    old_BT, ref_BT = (logp_BT.detach() + n for n in noise)
    return Batch(logp_BT, old_BT, ref_BT, mask_BT, advantage_B)


def trl_grpo(
    batch: Batch, loss: str, clip_low: float, clip_high: float, level: str = "token"
) -> torch.Tensor:
    """TRL's GRPO loss with beta = BETA; fails unless the clip was active."""
    from accelerate import Accelerator
    from trl import GRPOTrainer

    trainer: Any = object.__new__(GRPOTrainer)
    trainer.model = torch.nn.Identity().train()
    trainer.accelerator = Accelerator(cpu=True)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=False, delta=None, steps_per_generation=1, router_aux_loss_coef=0.0
    )
    trainer.aux_loss_enabled = trainer._entropy_bonus_enabled = trainer.use_vllm = False
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.importance_sampling_level, trainer.loss_type = level, loss
    trainer.beta, trainer.epsilon_low, trainer.epsilon_high = BETA, clip_low, clip_high
    trainer.current_gradient_accumulation_steps = 1
    trainer.max_completion_length = MAX_TOKENS
    entropy_BT = torch.zeros_like(batch.logp_BT).detach()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (batch.logp_BT, entropy_BT, None)
    mask_BT = batch.mask_BT.long()
    inputs = {
        "prompt_ids": torch.ones(len(mask_BT), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask_BT), 1, dtype=torch.long),
        "completion_ids": torch.ones_like(mask_BT),
        "completion_mask": mask_BT,
        "advantages": batch.advantage_B,
        "old_per_token_logps": batch.old_BT,
        "ref_per_token_logps": batch.ref_BT,
        "num_items_in_batch": mask_BT.sum(),
    }
    value = trainer._compute_loss(None, inputs)
    assert trainer._metrics["train"]["clip_ratio/region_mean"][0] > 0
    assert trainer._metrics["train"]["kl"][0] > 0
    return value


def config(loss: Any, clip_high: float = 0.28, **changes: Any) -> GrpoConfig:
    """GRPO settings of these tests."""
    return GrpoConfig(
        loss=loss, beta=BETA, clip_high=clip_high, max_new_tokens=MAX_TOKENS, temperature=1.0
    ).model_copy(update=changes)


class FixedModel:
    """In place of a language model: the log-probs it was given, whatever the tree."""

    def __init__(self, logp_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        self.out = ResponseLogps(logp_BT, mask_BT, torch.zeros_like(logp_BT))
        self.device = torch.device("cpu")

    def __call__(self, *_: Any, **__: Any) -> ResponseLogps:
        return self.out


def our_part_loss(batch: Batch, settings: GrpoConfig) -> torch.Tensor:
    """`_part_loss` on the batch's own log-probs."""
    lengths = batch.mask_BT.sum(1).tolist()
    part = [
        Member(0, tuple(range(1, n + 1)), tuple(old[:n].tolist()), advantage, True)
        for n, old, advantage in zip(lengths, batch.old_BT, batch.advantage_B.tolist(), strict=True)
    ]
    model = FixedModel(batch.logp_BT, batch.mask_BT)
    reference = FixedModel(batch.ref_BT, batch.mask_BT)
    sampler = SimpleNamespace(prompts=[((1,), (2,), (3,))])
    loss, metrics = _part_loss(model, reference, sampler, part, settings)  # type: ignore[arg-type]
    assert metrics["clip_ratio/region_mean"] > 0 and metrics["kl"] > 0
    return loss


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("loss", LOSSES)
def test_grpo_equals_trl(loss: str, clip_high: float) -> None:
    batch = make_batch()
    theirs = trl_grpo(batch, loss, 0.2, clip_high)
    ours = our_part_loss(batch, config(loss, clip_high))
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    gradients = [torch.autograd.grad(x, batch.logp_BT)[0] for x in (ours, theirs)]
    assert torch.allclose(*gradients, atol=TOLERANCE)
    assert gradients[0].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("loss", LOSSES)
def test_ratios_of_whole_responses_equal_trl(loss: str) -> None:
    """GSPO."""
    batch = make_batch(seed=2)
    theirs = trl_grpo(batch, loss, 0.05, 0.08, level="sequence")
    settings = config(loss, 0.08, clip_low=0.05, importance_sampling_level="sequence")
    ours = our_part_loss(batch, settings)
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    gradients = [torch.autograd.grad(x, batch.logp_BT)[0] for x in (ours, theirs)]
    assert torch.allclose(*gradients, atol=TOLERANCE)
    assert gradients[0].abs().max() > 100 * TOLERANCE


def test_the_three_reductions_are_three_algorithms() -> None:
    """Were the responses of equal length, a wrong reduction would pass the tests above."""
    values = [our_part_loss(make_batch(), config(loss)).item() for loss in LOSSES]
    assert all(abs(a - b) > 100 * TOLERANCE for a in values for b in values if a is not b)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_with_truncated_responses_masked_out_equal_trl(loss: str) -> None:
    """TRL clears the mask of a truncated response: out of the tokens, still one of the B rows."""
    whole = make_batch(seed=1)
    mask_BT = whole.mask_BT.clone()
    mask_BT[[0, 3]] = False
    batch = Batch(whole.logp_BT, whole.old_BT, whole.ref_BT, mask_BT, whole.advantage_B)
    theirs = trl_grpo(batch, loss, 0.2, 0.2)
    surrogate_BT, _ = clipped_surrogate(batch.logp_BT, batch.old_BT, batch.advantage_B[:, None])
    objective_BT = surrogate_BT - BETA * k3(batch.logp_BT, batch.ref_BT)
    ours = -{
        "grpo": reduce_grpo(objective_BT, mask_BT),
        "dapo": reduce_dapo(objective_BT, mask_BT),
        "dr_grpo": reduce_dr_grpo(objective_BT, mask_BT, MAX_TOKENS),
    }[loss]
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    gradients = [torch.autograd.grad(x, batch.logp_BT)[0] for x in (ours, theirs)]
    assert torch.allclose(*gradients, atol=TOLERANCE)
    assert not gradients[0][[0, 3]].any()


# a whole update with a real model, in parts, against one TRL loss


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[SharedPrefixLM, SharedPrefixLM]:
    """A policy and a reference with other weights."""
    folder = tmp_path_factory.mktemp("trl-parity")
    pairs = make_pairs(12)
    names = [make_tiny_judge(folder / str(seed), pairs, seed=seed) for seed in (0, 1)]
    policy, reference = (SharedPrefixLM(load_lm(name)[0]) for name in names)
    return policy, reference.requires_grad_(False)


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """All gradients of `loss`, as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("truncated", [(), (1, 4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_update_in_parts_equals_one_trl_loss(
    tiny: tuple[SharedPrefixLM, SharedPrefixLM], loss: str, truncated: tuple[int, ...]
) -> None:
    """Parts of 4, 4 and 1 responses add up to the loss, and the gradient, of the whole batch.

    Truncated responses leave the loss altogether here, so TRL is given the others alone: in its
    "grpo" and "dr_grpo" reductions they would still count in B.
    """
    policy, reference = tiny
    random = torch.Generator().manual_seed(5)
    prompts = [tuple((1, 2, 3, 40 + i) for _ in range(3)) for i in range(3)]
    lengths = [5, 9, 12, 3, 7, 12, 4, 6, 8]
    ids = [tuple(torch.randint(3, 200, (n,), generator=random).tolist()) for n in lengths]
    paths = [(*prompts[i % 3], row) for i, row in enumerate(ids)]
    logps = policy(build_tree(paths))
    old_BT = logps.logp_PT.detach() + 0.3 * torch.randn(logps.logp_PT.shape, generator=random)
    advantage_B = torch.randn(len(ids), generator=random)
    members = [
        Member(i % 3, row, tuple(old_BT[i, : len(row)].tolist()), advantage_B[i].item(), True)
        for i, row in enumerate(ids)
    ]
    members = [
        Member(m.prompt_index, m.ids, m.old_logps, m.advantage, i not in truncated)
        for i, m in enumerate(members)
    ]
    kept = [i for i in range(len(ids)) if i not in truncated]
    batch = Batch(
        logps.logp_PT[kept],
        old_BT[kept],
        reference(build_tree(paths)).logp_PT[kept],
        logps.mask_PT[kept],
        advantage_B[kept],
    )
    theirs = trl_grpo(batch, loss, 0.2, 0.28)
    sampler: Any = SimpleNamespace(prompts=prompts, members=members)
    parts = list(_update(policy, reference, sampler, config(loss, responses_at_once=4)))
    assert len(parts) == -(-len(kept) // 4)
    ours = torch.stack([part for part, _ in parts]).sum()
    assert ours.item() == pytest.approx(theirs.item(), abs=TOLERANCE)
    mine, other = gradient(ours, policy), gradient(theirs, policy)
    assert (mine - other).norm() / other.norm() < TOLERANCE
