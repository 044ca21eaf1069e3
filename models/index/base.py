"""What a vector index answers, whoever built it."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class VectorIndex(Protocol):
    """Nearest products by cosine.

    Shapes: Q queries, D dim, k results. Fewer than k rows in the index give shorter lists.
    """

    def search(
        self, vectors_QD: np.ndarray, k: int, where: str | None = None
    ) -> tuple[list[list[str]], list[list[float]]]:
        """Product ids [Q][k] and cosines [Q][k], best first.

        where: a filter in the index's own language (SQL for LanceDB); None: all products.
        """
        ...
