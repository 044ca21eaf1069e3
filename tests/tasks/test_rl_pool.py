"""The RL pool of a GRPO run that goes on: that of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.judge import pool_confidence


def test_a_run_that_goes_on_keeps_the_confidences_of_its_pool(tmp_path: Path) -> None:
    first = np.array([0.7, 0.1 + 0.2, np.float32(0.69999999)])
    kept = pool_confidence(tmp_path, lambda: first)
    # another device would have rounded them another way, and drawn another pool
    again = pool_confidence(tmp_path, lambda: first + 1e-3)
    assert kept.tolist() == again.tolist() == first.tolist()
