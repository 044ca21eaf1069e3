"""Which teacher writes the reasoning, importable without torch and without a network library.

`TeacherConfig` is identity: another model or temperature is another data set. `Endpoint` is
circumstance: where that model is served, with which key, and how hard it may be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from models.errors import ConfigError, explain


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TemplateTeacher(_Config):
    """The offline teacher: fills the format from gold grade, rules and evidence."""

    kind: Literal["template"] = "template"


class ChatTeacher(_Config):
    """A model behind an OpenAI-compatible endpoint: RELEARN_TEACHER_URL says where."""

    kind: Literal["chat"] = "chat"
    model: str = Field(min_length=1)
    """The model's name at the endpoint; the paper's is DeepSeek-R1 [TaoSR1 s3.1]."""
    temperature: float | None = Field(0.6, ge=0, le=2)
    """0.6 is what DeepSeek-R1's authors advise; None leaves it to the endpoint."""
    max_tokens: int = Field(4096, ge=16)
    """Longest answer, a reasoning model's own thoughts included."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that limit; OpenAI's newer models want the second."""
    max_words: int = Field(80, ge=12)
    """Longest response kept: the judge learns to write as many (ours)."""
    max_replaced_share: float = Field(0.05, ge=0, le=1)
    """Above this share of unusable answers, which the template replaces, the stage stops (ours)."""


TeacherConfig = Annotated[TemplateTeacher | ChatTeacher, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how a chat teacher is asked. Never part of an artifact's identity."""

    url: str
    """Base URL, e.g. http://127.0.0.1:8000/v1."""
    api_key: SecretStr | None = None
    concurrency: int = 8
    """Requests under way at once."""
    timeout_s: float = 120.0
    """Longest silence of one request."""
    attempts: int = 5
    """Tries of one request that fails in passing (429, 5xx, no connection, timeout)."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                explain("no usable teacher URL", "http(s)://host/v1", "set RELEARN_TEACHER_URL")
            )
        if parts.username or parts.password:
            raise ConfigError(
                explain(
                    "a teacher URL with a user or password in it",
                    "the key in RELEARN_TEACHER_API_KEY: URLs are logged",
                    "change RELEARN_TEACHER_URL",
                )
            )
