"""What Retrieval-GRPO maximises: rewards in [0, 1], added up with weights [TaoSearchEmb s3.2].

queries and their candidates -> one number a candidate.

Shapes: Q queries, K candidates each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from models.errors import ConfigError, explain
from models.types import Product, Query


class Reward(Protocol):
    """One term of the reward. Its metrics are logged under `name`.

    One that asks no model sets `free = True`: the watch then reads it on every validation query.
    """

    name: str
    weight: float

    def __call__(
        self, queries: Sequence[Query], candidates: Sequence[Sequence[Product]]
    ) -> np.ndarray:
        """Rewards [Q, K] in [0, 1], float32."""
        ...


@runtime_checkable
class Counting(Protocol):
    """A reward with counts that a checkpoint keeps, so that a resumed run reports the whole."""

    def state(self) -> dict[str, np.ndarray]:
        """The counts, as arrays of numbers or text."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from `state`."""
        ...


def total_reward(
    rewards: Sequence[Reward],
    queries: Sequence[Query],
    candidates: Sequence[Sequence[Product]],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """r = sum_n w_n r_n(q, d): the plain weighted sum [TaoSearchEmb s3.2].

    Returns:
        the sum [Q, K] float32, and every term by name, unweighted.

    Raises:
        ConfigError: no reward, two of one name, or a term outside [0, 1] or of another shape.
    """
    names = [r.name for r in rewards]
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            explain(f"rewards {names}", "one or more, each with its own name", "rename or drop one")
        )
    shape = (len(queries), len(candidates[0]) if candidates else 0)
    terms = {r.name: np.asarray(r(queries, candidates), dtype=np.float32) for r in rewards}
    for name, values in terms.items():
        if values.shape != shape or not ((values >= -1e-6) & (values <= 1 + 1e-6)).all():
            raise ConfigError(
                explain(
                    f"reward {name!r} of shape {values.shape}, "
                    f"range {values.min():.3g}..{values.max():.3g}",
                    f"shape {shape}, values in [0, 1]",
                    "rescale the reward and return one number a candidate",
                )
            )
    total = sum(r.weight * terms[r.name] for r in rewards)
    return np.asarray(total, dtype=np.float32), terms
