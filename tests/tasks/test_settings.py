"""Settings: circumstance from the environment, and what is set before the libraries load."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from models.errors import ConfigError
from tasks.settings import prepare_environment, settings

REPOSITORY = Path(__file__).resolve().parents[2]


def test_environment_is_read_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RELEARN_HOME", str(tmp_path / "one"))
    assert settings().home == tmp_path / "one"
    monkeypatch.setenv("RELEARN_HOME", str(tmp_path / "two"))
    assert settings().home == tmp_path / "two"


def test_relative_home_becomes_absolute_uris(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELEARN_HOME", "here")
    assert settings().tracking_uri == f"sqlite:///{tmp_path}/here/mlflow.db"
    assert settings().artifact_uri == f"file://{tmp_path}/here/artifacts"


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///../a/mlflow.db", "sqlite:///{here.parent}/a/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://db/mlflow", "postgresql://db/mlflow"),
    ],
)
def test_the_path_of_a_sqlite_file_becomes_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, made: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELEARN_MLFLOW_URI", given)
    assert settings().tracking_uri == made.format(here=tmp_path)


@pytest.mark.parametrize("name", ["RELEARN_WEIGHTS", "RELEARN_WEIGHTS_DIR"])
def test_weights_folder_has_two_spellings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.delenv("RELEARN_WEIGHTS", raising=False)
    monkeypatch.setenv(name, str(tmp_path))
    assert settings().weights_dir == tmp_path


def test_bad_value_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEARN_DEVICE", "toaster")
    with pytest.raises(ConfigError, match="RELEARN_DEVICE"):
        settings()


def test_secret_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEARN_TEACHER_API_KEY", "hunter2")
    current = settings()
    assert "hunter2" not in f"{current!r} {current} {current.model_dump()}"
    assert current.teacher_api_key is not None
    assert current.teacher_api_key.get_secret_value() == "hunter2"


def test_prepare_keeps_what_the_user_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = dict(os.environ)
    try:
        os.environ["PREFECT_HOME"] = "/elsewhere"
        os.environ.pop("MLFLOW_DISABLE_TELEMETRY", None)
        prepare_environment(settings(home=tmp_path / "home"))
        assert os.environ["PREFECT_HOME"] == "/elsewhere"
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert os.environ["RELEARN_HOME"] == str(tmp_path / "home")
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As before torch is loaded; every variable is put back."""
    before = dict(os.environ)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("device", "visible", "seen"),
    [("cuda:1", None, "1"), ("cuda:1", "2,3", "3"), ("cuda:0", "GPU-a,GPU-b", "GPU-a")],
)
def test_a_numbered_gpu_is_the_only_one_seen(
    environment: pytest.MonkeyPatch, tmp_path: Path, device: str, visible: str | None, seen: str
) -> None:
    environment.setenv("RELEARN_DEVICE", device)
    if visible is not None:
        environment.setenv("CUDA_VISIBLE_DEVICES", visible)
    for _ in range(2):  # a child process inherits both and changes nothing
        prepare_environment(settings(home=tmp_path))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
        assert settings().torch_device == "cuda"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_other_devices_leave_the_gpus_as_they_are(
    environment: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    environment.setitem(sys.modules, "torch", ModuleType("torch"))
    prepare_environment(settings(home=tmp_path, device=device))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_numbered_gpu_that_cannot_be_chosen_is_refused(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    current = settings(home=tmp_path, device="cuda:2")
    environment.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"cuda:2.*one of the 2 in CUDA_VISIBLE_DEVICES=0,1"):
        prepare_environment(current)
    environment.setitem(sys.modules, "torch", ModuleType("torch"))
    with pytest.raises(ConfigError, match="after torch was loaded"):
        prepare_environment(current)


def test_settings_and_stage_load_no_heavy_library() -> None:
    heavy = "{'torch', 'mlflow', 'prefect', 'transformers', 'pandas', 'great_expectations'}"
    code = f"import sys, tasks.stage, tasks.registry; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
