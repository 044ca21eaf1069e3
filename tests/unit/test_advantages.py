"""Group advantages, the clipped surrogate, its reductions and the divergences."""

from __future__ import annotations

import math

import pytest
import torch

from models.errors import ConfigError
from models.objectives.advantages import group_advantages
from models.objectives.kl import categorical_kl, k3
from models.objectives.surrogate import clipped_surrogate, reduce_dapo, reduce_dr_grpo, reduce_grpo


def test_population_std_as_arithmetic() -> None:
    advantages, kept = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 6.0]]))
    std = math.sqrt((4 + 1 + 0 + 9) / 4)
    assert advantages[0].tolist() == pytest.approx([-2 / std, -1 / std, 0.0, 3 / std])
    assert kept.tolist() == [True]


def test_advantages_sum_to_zero_with_unit_std() -> None:
    advantages, _ = group_advantages(torch.rand(20, 7, generator=torch.manual_seed(0)))
    assert advantages.sum(1).abs().max() < 1e-5
    assert advantages.std(1, correction=0).sub(1).abs().max() < 1e-5


def test_equal_float_rewards_do_not_explode() -> None:
    """0.1 + 0.2 style rounding is not a signal: its std is about 1e-8, not 0."""
    rewards = torch.full((1, 8), 0.3)
    rewards[0, 0] += 1e-7
    advantages, kept = group_advantages(rewards)
    assert advantages.abs().max() == 0
    assert kept.tolist() == [False]


def test_group_is_decided_by_its_std_not_by_the_mean() -> None:
    rewards = torch.tensor([[0.5, 0.5, 0.5], [0.4, 0.5, 0.6]])
    advantages, kept = group_advantages(rewards)
    assert kept.tolist() == [False, True]
    assert advantages[0].tolist() == [0.0, 0.0, 0.0]


def test_scale_none_only_centres() -> None:
    advantages, _ = group_advantages(torch.tensor([[0.0, 1.0]]), scale="none")
    assert advantages.tolist() == [[-0.5, 0.5]]


def test_masked_members_count_in_neither_mean_nor_std() -> None:
    rewards = torch.tensor([[1.0, 3.0, 1e6]])
    mask = torch.tensor([[True, True, False]])
    advantages, kept = group_advantages(rewards, mask_BG=mask)
    assert advantages.tolist() == [[-1.0, 1.0, 0.0]]
    assert kept.tolist() == [True]


def test_one_member_is_no_group() -> None:
    advantages, kept = group_advantages(
        torch.tensor([[1.0, 0.0]]), mask_BG=torch.tensor([[1, 0]]), floor=0.0
    )
    assert advantages.tolist() == [[0.0, 0.0]]
    assert kept.tolist() == [False]


def test_a_flat_list_of_rewards_is_refused() -> None:
    with pytest.raises(ConfigError, match="do this"):
        group_advantages(torch.zeros(4))


def test_surrogate_clips_each_side_only_where_it_helps() -> None:
    rho = torch.tensor([0.5, 0.5, 2.0, 2.0])
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    surrogate, clipped = clipped_surrogate(rho.log(), torch.zeros(4), sign, 0.2, 0.28)
    assert surrogate.tolist() == pytest.approx([0.5, -0.8, 1.28, -2.0])
    assert clipped.tolist() == [False, True, True, False]


def test_surrogate_at_the_old_policy_has_the_gradient_of_reinforce() -> None:
    logp = torch.randn(5, generator=torch.manual_seed(1)).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    surrogate, clipped = clipped_surrogate(logp, logp.detach(), advantages)
    surrogate.sum().backward()
    assert torch.allclose(logp.grad, advantages)
    assert not clipped.any()


def test_reductions_as_arithmetic() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0], [5.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert reduce_grpo(values, mask).item() == pytest.approx(((1 + 3) / 2 + 5) / 2)
    assert reduce_dapo(values, mask).item() == pytest.approx((1 + 3 + 5) / 3)
    assert reduce_dr_grpo(values, mask, 3).item() == pytest.approx((1 + 3 + 5) / (2 * 3))


def test_reductions_of_an_empty_mask_are_zero() -> None:
    values, mask = torch.ones(2, 3), torch.zeros(2, 3)
    assert reduce_grpo(values, mask).item() == 0
    assert reduce_dapo(values, mask).item() == 0


def test_k3_is_zero_at_the_reference_and_never_negative() -> None:
    logp = torch.linspace(-3, 0, 7)
    assert k3(logp, logp).abs().max() == 0
    assert (k3(logp, logp.flip(0)) >= 0).all()


def test_k3_estimates_the_categorical_kl() -> None:
    logp = torch.log_softmax(torch.tensor([1.0, 0.0, -1.0, 0.5]), 0)
    ref = torch.log_softmax(torch.tensor([0.2, 0.3, -0.4, 0.0]), 0)
    expectation = (logp.exp() * k3(logp, ref)).sum()
    assert expectation.item() == pytest.approx(categorical_kl(logp[None], ref[None]).item())


def test_categorical_kl_as_arithmetic_and_with_padding() -> None:
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    ref = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert categorical_kl(logp, ref).item() == pytest.approx(expected)


def test_surrogate_with_k3_equals_the_formula_of_trl() -> None:
    """TRL's GRPOTrainer, written out: -min(...) + beta k3, in both reductions."""
    g = torch.manual_seed(3)
    logp, old, ref = (-torch.rand(4, 6, generator=g) for _ in range(3))
    mask = (torch.rand(4, 6, generator=g) > 0.3).float()
    mask[:, 0] = 1
    adv = torch.randn(4, 1, generator=g)
    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    per_token = -torch.min(coef_1 * adv, coef_2 * adv)
    per_token = per_token + 0.04 * (torch.exp(ref - logp) - (ref - logp) - 1)
    grpo = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    dapo = (per_token * mask).sum() / mask.sum()
    ours = -clipped_surrogate(logp, old, adv, 0.2, 0.28)[0] + 0.04 * k3(logp, ref)
    assert reduce_grpo(ours, mask).item() == pytest.approx(grpo.item(), abs=1e-6)
    assert reduce_dapo(ours, mask).item() == pytest.approx(dapo.item(), abs=1e-6)
