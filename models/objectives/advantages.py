"""Group-relative advantages, shared by the judge's GRPO and the retriever's.

rewards -> advantages and the groups worth training on. Pure torch.

Shapes: B groups, G members of a group (rollouts of a prompt, or candidates of a query).

Departures from the papers: the standard deviation is the population one (it fits the published
example of [TaoSearchEmb s3.2]; TRL uses the sample one), and a group below the floor is dropped as
a whole instead of being divided by std + 1e-4: in float32 equal rewards have a std of about 1e-4,
which turns rounding into advantages of any size.
"""

from __future__ import annotations

from typing import Literal

import torch

from models.errors import ConfigError, explain


def group_advantages(
    rewards_BG: torch.Tensor,
    floor: float = 1e-3,
    scale: Literal["group", "none"] = "group",
    mask_BG: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_i = (r_i - mean(r)) / std(r) inside each group [TaoSR1 s3.3] [TaoSearchEmb s3.2].

    Args:
        rewards_BG: real rewards, any scale.
        floor: groups with std < floor get advantage 0 and kept False (ours, 1e-3).
        scale: "group" divides by the population std; "none" only subtracts the mean (Dr. GRPO).
        mask_BG: True where a member counts; the others get advantage 0. None: all count.

    Returns:
        advantages_BG in the dtype of the rewards, and kept_B (bool). A group with fewer than two
        members that count is never kept.

    Raises:
        ConfigError: `rewards_BG` has not two axes, or `scale` is unknown.

    >>> advantages, kept = group_advantages(torch.tensor([[1.0, 0.0], [0.3, 0.3]]))
    >>> advantages.tolist(), kept.tolist()
    ([[1.0, -1.0], [0.0, 0.0]], [True, False])
    """
    if rewards_BG.ndim != 2 or scale not in ("group", "none"):
        raise ConfigError(
            explain(
                f"rewards of shape {tuple(rewards_BG.shape)}, scale {scale!r}",
                "rewards [groups, members] and scale 'group' or 'none'",
                "stack the rewards of each group into one row",
            )
        )
    counted = torch.ones_like(rewards_BG, dtype=torch.bool) if mask_BG is None else mask_BG.bool()
    values = rewards_BG.double().masked_fill(~counted, 0.0)
    num_B1 = counted.sum(1, keepdim=True).clamp(min=1)
    centred = (values - values.sum(1, keepdim=True) / num_B1).masked_fill(~counted, 0.0)
    std_B1 = (centred.square().sum(1, keepdim=True) / num_B1).sqrt()
    kept_B = (std_B1.squeeze(1) >= floor) & (counted.sum(1) > 1)
    if scale == "group":
        centred = centred / std_B1.clamp(min=floor)
    return centred.masked_fill(~kept_B[:, None], 0.0).to(rewards_BG.dtype), kept_B
