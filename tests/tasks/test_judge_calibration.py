"""When a judge's threshold is chosen on validation, and when it is not."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.errors import DataContractError
from models.evaluation.tiers import MEDIAN
from models.judge.config import PromptConfig
from models.judge.spec import JudgeSpec
from tasks import judge as stages
from tasks.judge import CalibrationConfig, judge_calibrated
from tests.builders import make_pairs


@pytest.mark.parametrize("lacking", [True, False])
def test_without_validation_pairs_of_a_grade_the_median_is_read(
    lacking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train = make_pairs(40)
    held = [replace(p, grade=4) if lacking and p.grade == 2 else p for p in make_pairs(40, seed=1)]
    # sure of itself and one grade too high, so that a threshold above one half is worth most
    p_NL = np.full((40, 4), 0.1)
    p_NL[np.arange(40), [min(p.grade, 3) for p in held]] = 0.7

    def pairs(split: str) -> list[Any]:
        return {"train": train, "validation": held}[split]

    (tmp_path / "judge").mkdir()
    JudgeSpec.fit(PromptConfig(evidence=False), [], []).write(tmp_path / "judge")
    scoring = SimpleNamespace(score=lambda asked, desc: p_NL[: len(asked)])
    monkeypatch.setattr(stages, "open_store", lambda ctx, store: SimpleNamespace(pairs=pairs))
    monkeypatch.setattr(stages, "_open_judge", lambda ctx, judge: scoring)
    monkeypatch.setattr(stages, "sample_pairs", lambda given, count, seed: given)
    ctx: Any = SimpleNamespace(open=lambda ref: ref, out=tmp_path / "out")
    inputs: dict[str, Any] = {"judge": tmp_path / "judge", "store": None}
    with caplog.at_level(logging.WARNING):
        metrics = judge_calibrated.body(ctx, CalibrationConfig(), **inputs)
    written = JudgeSpec.read(tmp_path / "out").cumpt
    assert written is not None and (written == MEDIAN) is lacking
    assert metrics["beta_cum"] == written.beta and metrics["calibrated"] == (not lacking)
    held.clear()
    with pytest.raises(DataContractError, match="label a few validation queries"):
        judge_calibrated.body(ctx, CalibrationConfig(), **inputs)
    warnings = [r.getMessage() for r in caplog.records]
    assert any("40 validation pairs have grade 2, so" in w for w in warnings) is lacking
