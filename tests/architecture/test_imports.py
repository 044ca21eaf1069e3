"""Who may import whom, and what importing the flows costs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch transformers sentence_transformers peft lancedb great_expectations mlflow datasets trl "
    "openai"
).split()


def run(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_contracts_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 broken" in done.stdout


def test_models_run_where_no_orchestrator_is_installed() -> None:
    """The contract reads source; this one looks at what is loaded."""
    light = "models.types, models.schemas, models.store, models.text, models.lm.weights"
    blocked = "('prefect', 'mlflow', 'great_expectations')"
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport {light}\nprint('ok')"
    )
    assert run(code) == "ok"


@pytest.mark.parametrize(
    "module",
    [
        "flows.pipeline",
        "flows.recipes",
        "flows.cli",
        "flows.scheduled",
        "flows.monitor",
        "flows.backfill",
        "flows.index",
        "flows.ablate",
        "flows.ablate_retriever",
    ],
)
def test_flows_load_no_heavy_library(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} does not exist yet")
    loaded = run(f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert loaded == ""
