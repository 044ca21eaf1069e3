"""One finished run of the whole chain, for every test of flows and commands."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows.recipes import PipelineConfig, recipe

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult
    from tasks.artifacts import ArtifactStore

SMALLER = (
    "data.source.num_products=120",
    "data.source.num_queries=36",
    "data.source.judgments_per_query=8",
    "judge.sft.max_pairs=60",
    "judge.sft.cot_share=0.0",
    "judge.sft.micro_batch=6",
    "judge.sft.accumulate=1",
    "judge.pass_at_n.prompts=8",
    "judge.pass_at_n.max_new_tokens=6",
    "judge.grpo.steps=1",
    "judge.grpo.pool.candidates=16",
    "judge.grpo.pool.size=8",
    "judge.grpo.prompts_per_step=2",
    "judge.grpo.max_new_tokens=6",
    "judge.calibration.max_pairs=24",
    "judge.answers.max_pairs=40",
    "judge.answers.reasoning_pairs=4",
    "judge.answers.max_new_tokens=6",
    "embedder.sft.steps=4",
    "embedder.rgrpo.steps=2",
    "embedder.rgrpo.max_queries=6",
    "embedder.rgrpo.k=4",
    "embedder.rgrpo.val_queries=6",
    "embedder.rgrpo.val_reward_queries=4",
    "embedder.rgrpo.sft_batch=4",
    "embedder.index.sample=20",
    "embedder.evaluation.judged_queries=3",
)
"""The smoke recipe in half a minute: grades alone, so no response ends within its six tokens."""


def small_config(*changes: str) -> PipelineConfig:
    """The recipe of these tests, with further changes."""
    return recipe("smoke", "synthetic", [*SMALLER, *changes])


@contextmanager
def at_home(home: Path) -> Iterator[None]:
    """`settings()` points at `home` inside."""
    before = os.environ["RELEARN_HOME"]
    os.environ["RELEARN_HOME"] = str(home)
    try:
        yield
    finally:
        os.environ["RELEARN_HOME"] = before


@dataclass
class Chain:
    """A home and the results of the runs in it, oldest first."""

    home: Path
    results: list[PipelineResult] = field(default_factory=list)

    def run(self, *changes: str) -> PipelineResult:
        """Run the chain once more, with changes."""
        from flows.pipeline import run_pipeline

        with at_home(self.home):
            self.results.append(run_pipeline(small_config(*changes)))
        return self.results[-1]

    @property
    def artifacts(self) -> ArtifactStore:
        """The artifact store of the home."""
        from tasks.artifacts import ArtifactStore
        from tasks.settings import settings

        return ArtifactStore(settings(home=self.home, experiment=small_config().name))


@pytest.fixture(scope="session")
def chain(
    tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path, prefect_server: None
) -> Chain:
    """A home with one finished run."""
    home = tmp_path_factory.mktemp("chain") / "home"
    home.mkdir()
    shutil.copy(mlflow_template, home / "mlflow.db")
    made = Chain(home)
    made.run()
    return made
