"""Fixtures of all tests. The environment is set here, before torch, Prefect or MLflow load."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_WEIGHTS = os.environ.get("RELEARN_WEIGHTS")
for _name in [n for n in os.environ if n.startswith(("RELEARN_", "PREFECT_", "MLFLOW_"))]:
    del os.environ[_name]  # the developer's own circumstance must not reach a test
if _WEIGHTS:
    os.environ["RELEARN_WEIGHTS"] = _WEIGHTS
os.environ["RELEARN_HOME"] = tempfile.mkdtemp(prefix="relearn-tests-")
os.environ["RELEARN_NUM_THREADS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from tasks.settings import Settings, prepare_environment, settings  # noqa: E402

prepare_environment(settings())


def pytest_unconfigure() -> None:
    """Remove what the session wrote outside tmp_path."""
    shutil.rmtree(os.environ["RELEARN_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def float32_everywhere() -> Iterator[None]:
    """bf16 where the processor has it would make a test's numbers depend on the machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("models.lm.precision.has_bf16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables, to copy: making one takes seconds."""
    from tasks.artifacts import ArtifactStore

    folder = tmp_path_factory.mktemp("mlflow-template")
    ArtifactStore(settings(home=folder)).client.search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty relearn home that `settings()` points at."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    monkeypatch.setenv("RELEARN_HOME", str(folder))
    return folder


@pytest.fixture
def current(home: Path) -> Settings:
    """Settings of `home`."""
    return settings()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One Prefect server for the session; ask for it only where a flow runs."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=600):
        yield


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """Where `make setup` puts the packaged models; tests that need one skip when it is absent."""
    return settings().weights_dir
