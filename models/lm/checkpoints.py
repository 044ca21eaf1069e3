"""Which of a Trainer's checkpoints a killed run may go on from.

Consumes a Trainer's output folder -> produces the checkpoint to resume, if there is one.
"""

from __future__ import annotations

import json
from pathlib import Path


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose trainer_state.json, written last, is there and whole."""
    whole = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _is_json(p)]
    return max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:  # cut: the disk was full
        return False
    return True
