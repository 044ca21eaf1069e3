"""Settings of the rewards, importable without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RuleRewardConfig(BaseModel):
    """Weights of the parts; they need not sum to one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    shaped: bool = True
    """False: outcome reward only, the plain GRPO baseline."""
    grade: float = Field(1.0, ge=0)
    category: float = Field(0.2, ge=0)
    attributes: float = Field(0.2, ge=0)
    format: float = Field(0.1, ge=0)
    gate: bool = True
    """Zero the reward of a response whose grade contradicts its own verdicts, or whose verdicts
    cannot be read where steps are due."""
