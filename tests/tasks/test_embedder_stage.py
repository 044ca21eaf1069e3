"""What a retriever's stage does around its training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import DivergenceError
from tasks.embedder import _kept_when_it_diverges


def test_the_last_good_encoder_of_a_diverged_run_is_put_aside(tmp_path: Path) -> None:
    """The stage's own folder is removed when it fails."""
    out = tmp_path / "out"
    out.mkdir()
    context: Any = SimpleNamespace(
        out=out,
        stage="embedder_rgrpo",
        fingerprint="0123456789abcdef",
        settings=SimpleNamespace(home=tmp_path),
    )
    with pytest.raises(DivergenceError, match=r"^nothing yet$"), _kept_when_it_diverges(context):
        raise DivergenceError("nothing yet")
    for content in ("first", "second"):
        (out / "model.safetensors").write_text(content)
        with (
            pytest.raises(DivergenceError, match=r"^spread 0\. The best .*rgrpo-0123456789ab$"),
            _kept_when_it_diverges(context),
        ):
            raise DivergenceError("spread 0")
    kept = tmp_path / "diverged" / "embedder_rgrpo-0123456789ab" / "model.safetensors"
    assert kept.read_text() == "second"
    with pytest.raises(KeyError), _kept_when_it_diverges(context):
        raise KeyError("another fault is not touched")
