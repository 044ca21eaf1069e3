"""pass@k: how often one of k sampled responses is right.

Pure integers; nothing is sampled here.
"""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, correct: int, k: int) -> float:
    """P(at least one of k responses is right), from n of which `correct` are; unbiased.

    1 - C(n - correct, k) / C(n, k): the share of the k-subsets that hold a right one. 1 - (1 -
    correct/n)^k would be biased downwards, for it draws with replacement.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= correct <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 0, 4)
    (0.25, 0.5, 0.0)
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(
            f"got n={n}, correct={correct}, k={k}; expected 1 <= k <= n and 0 <= correct <= n; "
            "draw more responses or ask for a smaller k"
        )
    return 1 - comb(n - correct, k) / comb(n, k)
