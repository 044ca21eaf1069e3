"""No secret is in a log, an artifact or what MLflow keeps, not even when a stage fails with one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import BaseModel, SecretStr

from models.errors import ConfigError
from tasks.artifacts import ArtifactStore
from tasks.settings import Settings, masked, settings
from tasks.stage import StageContext, pipeline, stage

KEY, PASSWORD, TOKEN = "sk-very-secret-4711", "hunter2-hunter2", "tok-5c5c5c5c"
ADDRESS = f"https://me:{PASSWORD}@host/v1?token={TOKEN}&k=10"


class Asking(BaseModel):
    """A config with a secret field."""

    model: str = "m"
    key: SecretStr = SecretStr(KEY)


@stage(name="asks", kind="text")
def asks(ctx: StageContext, config: Asking, fails: bool) -> None:
    """Needs a key, and may fail with everything in its message."""
    ctx.log.info("settings %s, %r", ctx.settings, ctx.settings)
    (ctx.out / "config.json").write_text(config.model_dump_json())
    if fails:
        try:
            raise OSError(5, f"no connection to {ADDRESS}")
        except OSError as error:
            raise ValueError(f"cannot ask with {KEY}") from error


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, ...]:
    monkeypatch.setenv("RELEARN_TEACHER_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return (KEY.encode(), PASSWORD.encode(), TOKEN.encode())


def found_below(folder: Path, secrets: tuple[bytes, ...]) -> list[str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert any(p.name == "mlflow.db" for p in files)
    return [p.name for p in files if any(s in p.read_bytes() for s in secrets)]


def test_nothing_kept_or_logged_holds_a_secret(
    home: Path, secrets: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pipeline("chain"):
        asks.make(config=Asking(), fails=False)
    with pytest.raises(ValueError) as caught, pipeline("chain"):
        asks.make(config=Asking(), fails=True)
    logging.getLogger("tasks").exception("as a flow logs it", exc_info=caught.value)
    assert "as a flow logs it" in caplog.text and "no connection to" in caplog.text
    assert not [s for s in secrets if s.decode() in caplog.text]
    assert found_below(home, secrets) == []
    assert "***" in str(caught.value) and "https://***@host/v1?token=***&k=10" in caplog.text


def test_the_search_for_secrets_finds_one(home: Path) -> None:
    (home / "leak.txt").write_text(f"key {KEY}")
    assert found_below(home, (KEY.encode(),)) == ["leak.txt"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p@ss@db:5432/x", "postgresql://***@db:5432/x"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("http://h/?api_key=abc&q=sofa", "http://h/?api_key=***&q=sofa"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        (f"Bearer {KEY}", "Bearer ***"),
    ],
)
def test_masked(secrets: tuple[bytes, ...], text: str, shown: str) -> None:
    assert masked(text) == shown


def test_a_link_to_mlflow_has_no_password(tmp_path: Path) -> None:
    current = Settings(home=tmp_path, mlflow_uri=f"https://me:{PASSWORD}@host/mlflow/")
    assert current.mlflow_pages == "https://host/mlflow"


def test_a_bad_secret_is_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELEARN_TEACHER_CONCURRENCY", KEY)  # pasted into the wrong variable
    with pytest.raises(Exception, match="RELEARN_TEACHER_CONCURRENCY") as caught:
        settings()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("name", ["promotion-../../x", "promotion-/etc/x", "", ".."])
def test_a_store_name_is_no_path(current: Settings, name: str) -> None:
    with pytest.raises(ConfigError, match="fix --store"):
        ArtifactStore(current).lock_file(name)
    assert not (current.home / "locks" / "promotion-..").exists()
