"""InfoNCE: arithmetic, the guard against false negatives, and sentence-transformers' own loss."""

from __future__ import annotations

import math

import pytest
import torch

from models.objectives.infonce import false_negatives, infonce


def vectors(rows: int, seed: int, dim: int = 8) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.manual_seed(seed))


def test_infonce_as_arithmetic() -> None:
    q, pos = torch.eye(2), torch.eye(2)
    negative = torch.tensor([[1.0, 1.0]])
    tau, near = 0.5, 1 / math.sqrt(2)
    expected = -math.log(
        math.exp(1 / tau) / (math.exp(1 / tau) + math.exp(0) + math.exp(near / tau))
    )
    assert infonce(q, pos, negative, tau).item() == pytest.approx(expected, abs=1e-6)


def test_lengths_do_not_matter() -> None:
    q, pos = vectors(4, 0), vectors(4, 1)
    assert infonce(3 * q, 0.1 * pos).item() == pytest.approx(infonce(q, pos).item(), rel=1e-5)


def test_a_masked_negative_is_as_if_it_were_not_there() -> None:
    q, pos, negatives = vectors(3, 0), vectors(3, 1), vectors(5, 2)
    masked = torch.zeros(3, 8, dtype=torch.bool)
    masked[:, -2:] = True
    got = infonce(q, pos, negatives, masked_BP=masked)
    assert got.item() == pytest.approx(infonce(q, pos, negatives[:3]).item(), rel=1e-5)


def test_the_positive_cannot_be_masked() -> None:
    q, pos = vectors(3, 0), vectors(3, 1)
    everything = torch.ones(3, 3, dtype=torch.bool)
    assert infonce(q, pos, masked_BP=everything).item() == pytest.approx(0.0, abs=1e-6)


def test_weights_average_and_all_zero_gives_zero() -> None:
    q, pos = vectors(2, 0), vectors(2, 1)
    one = infonce(q, pos, weight_B=torch.tensor([1.0, 0.0])).item()
    other = infonce(q, pos, weight_B=torch.tensor([0.0, 1.0])).item()
    both = infonce(q, pos, weight_B=torch.tensor([3.0, 1.0])).item()
    assert both == pytest.approx((3 * one + other) / 4, rel=1e-5)
    assert infonce(q, pos, weight_B=torch.zeros(2)).item() == 0


def test_known_positives_and_copies_are_no_negatives() -> None:
    masked = false_negatives(
        positives=[{"a", "b"}, {"c"}, {"a"}], pos_ids=["a", "c", "a"], global_ids=["b", "z"]
    )
    assert masked.int().tolist() == [
        [0, 0, 1, 1, 0],  # the copy of a, and b
        [0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]


def test_equal_to_multiple_negatives_ranking_loss() -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    q, pos = vectors(6, 4), vectors(6, 5)
    tau = 0.05
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / tau)
    expected = theirs.compute_loss_from_embeddings([q, pos], None)
    assert infonce(q, pos, tau=tau).item() == pytest.approx(expected.item(), abs=1e-5)


def test_bf16_autocast_does_not_touch_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    q_BD, pos_BD = torch.randn(2, 8, 32, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        inside = infonce(q_BD, pos_BD)
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(infonce(q_BD, pos_BD).item(), abs=1e-6)
