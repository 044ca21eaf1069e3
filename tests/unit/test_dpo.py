"""DPO losses: log 2 at the reference, TRL's values, traps."""

from __future__ import annotations

import math

import pytest
import torch

from models.errors import ConfigError
from models.objectives.dpo import dpo_loss


def test_log_two_at_the_reference() -> None:
    logp = torch.tensor([-3.0, -40.0])
    loss, metrics = dpo_loss(logp, logp - 1, logp, logp - 1, beta=0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0


def test_hand_written_case() -> None:
    z = torch.zeros(1)
    loss, metrics = dpo_loss(z + 1, z - 2, z, z, beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5 * (1 + 2))))
    assert metrics["rewards/chosen"] == pytest.approx(0.5)
    assert metrics["rewards/rejected"] == pytest.approx(-1.0)
    assert metrics["rewards/accuracies"] == 1


def test_ipo_is_zero_at_its_target_margin() -> None:
    z = torch.zeros(1)
    assert dpo_loss(z + 2.5, z, z, z, beta=0.2, kind="ipo")[0].item() == pytest.approx(0)


def test_robust_without_noise_is_sigmoid() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(8, generator=g) for _ in range(4))
    robust = dpo_loss(a, b, c, d, 0.3, "robust", label_smoothing=0.0)[0]
    assert robust.item() == pytest.approx(dpo_loss(a, b, c, d, 0.3)[0].item())


def test_gradient_pushes_chosen_up_and_rejected_down() -> None:
    chosen = torch.zeros(1, requires_grad=True)
    rejected = torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1)[0].backward()
    # d/dm -log sigmoid(beta m) at 0 is -beta / 2
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)


def test_unknown_kind_is_refused() -> None:
    z = torch.zeros(1)
    with pytest.raises(ConfigError, match="sigmoid, ipo or robust"):
        dpo_loss(z, z, z, z, 0.1, kind="nope")  # type: ignore[arg-type]
