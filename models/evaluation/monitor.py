"""What the monitor watches, when a value is too far off, and what is to be run then.

Consumes values by name (`models/evaluation/drift.py` and friends) -> produces a `Report`: every
value with its limit, and the reactions due. Pure: the clock comes in as an argument.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Reaction(enum.StrEnum):
    """The deployment that a breach asks for."""

    NONE = "none"
    """Told, nothing is run."""
    RETRAIN = "retrain"
    RETRAIN_JUDGE = "retrain-judge"
    RETRAIN_EMBEDDER = "retrain-embedder"
    REFRESH_INDEX = "refresh-index"


COVERED: Mapping[Reaction, tuple[Reaction, ...]] = {
    Reaction.RETRAIN: (Reaction.RETRAIN_JUDGE, Reaction.RETRAIN_EMBEDDER),
}
"""What a reaction does as well."""


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Bound(_Config):
    """How far a value may go, and what its breach asks for."""

    limit: float = Field(ge=0)
    """A larger value is a breach."""
    reaction: Reaction = Reaction.NONE
    """Deployment that is run then."""


class SampleConfig(_Config):
    """How much is looked at; all that the cached part of a pass depends on."""

    queries: int = Field(256, ge=8)
    """Queries embedded on each side. The MMD of two independent draws of one distribution stayed
    below .002 at this size and reached .02 at 24 (20 draws in 384 dimensions)."""
    products: int = Field(5000, ge=100)
    """Titles of today's catalogue whose terms are looked up."""
    judged_queries: int = Field(24, ge=2)
    """Queries whose results the judge reads on each side."""
    results: int = Field(4, ge=1, le=100)
    """Results a query that it reads, the best by the champion's index."""


class MonitorConfig(_Config):
    """Limits of a monitor pass. Every default is ours, with its reason."""

    query_new_terms: Bound = Bound(limit=0.2, reaction=Reaction.RETRAIN)
    """Share of today's query terms, by frequency, that the training queries never used. One in five
    is more than a season's brands."""
    segment_shift: Bound = Bound(limit=0.05, reaction=Reaction.RETRAIN)
    """Jensen-Shannon divergence of the segment mixes by frequency, bits. An eighth of all traffic
    that moves from one of six equal segments to another comes to .04."""
    query_mmd: Bound = Bound(limit=0.02, reaction=Reaction.RETRAIN_EMBEDDER)
    """MMD of query embeddings by the champion's encoder; ten times what sampling alone gives."""
    query_mean_shift: Bound = Bound(limit=0.05, reaction=Reaction.RETRAIN_EMBEDDER)
    """1 - cosine of the mean query embeddings."""
    product_new_terms: Bound = Bound(limit=0.1, reaction=Reaction.RETRAIN_EMBEDDER)
    """Share of today's product terms that the training catalogue never used."""
    category_shift: Bound = Bound(limit=0.05, reaction=Reaction.RETRAIN_EMBEDDER)
    """Jensen-Shannon divergence of the top categories' shares, bits."""
    confidence_drop: Bound = Bound(limit=0.1, reaction=Reaction.RETRAIN_JUDGE)
    """Judge's mean largest probability on training queries' results less that on today's."""
    entropy_rise: Bound = Bound(limit=0.2, reaction=Reaction.RETRAIN_JUDGE)
    """Judge's mean entropy on today's results less that on training queries', nats (of log 4)."""
    contradiction_rise: Bound = Bound(limit=0.3, reaction=Reaction.RETRAIN_JUDGE)
    """Share of today's responses whose grade breaks their own verdicts, less that of training
    queries'. Wide: with 24 responses a side chance alone moves it by .14."""
    label_age_days: Bound = Bound(limit=14)
    """Days since the newest judgment or interaction. Training cannot mend a feed that stopped."""
    index_stale_share: Bound = Bound(limit=0.01, reaction=Reaction.REFRESH_INDEX)
    """Share of products that the published index lacks, holds otherwise, or holds no more."""
    index_lag_hours: Bound = Bound(limit=24, reaction=Reaction.REFRESH_INDEX)
    """Age of the published version while any product is stale; an index that holds today's
    catalogue lags by 0, however old it is."""
    cooldown_hours: float = Field(24, ge=0)
    """A retraining is not asked for again within this time."""
    refresh_cooldown_hours: float = Field(1, ge=0)
    """The same for refresh-index."""
    sample: SampleConfig = SampleConfig()

    @property
    def bounds(self) -> dict[str, Bound]:
        """Every limit, by the name of its value."""
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in fields if isinstance(value, Bound)}

    def cooldown(self, reaction: Reaction) -> timedelta:
        """Least time between two requests of `reaction`."""
        refresh = reaction is Reaction.REFRESH_INDEX
        return timedelta(hours=self.refresh_cooldown_hours if refresh else self.cooldown_hours)


@dataclass(frozen=True, slots=True)
class Value:
    """One watched number; None when it could not be measured, and `note` says why."""

    name: str
    value: float | None
    bound: Bound
    note: str = ""

    @property
    def over(self) -> bool:
        """Whether it is a breach; a number that is not finite is one."""
        if self.value is None:
            return False
        return not math.isfinite(self.value) or self.value > self.bound.limit

    @property
    def mark(self) -> str:
        """OVER, ok or not measured."""
        return "not measured" if self.value is None else "OVER" if self.over else "ok"


@dataclass(frozen=True)
class Report:
    """One pass over one store."""

    values: tuple[Value, ...]

    @classmethod
    def of(
        cls,
        config: MonitorConfig,
        values: Mapping[str, float | None],
        notes: Mapping[str, str],
    ) -> Report:
        """Every bound of `config` with its value; a name without value is not measured."""
        return cls(
            tuple(
                Value(name, values.get(name), bound, notes.get(name, ""))
                for name, bound in config.bounds.items()
            )
        )

    @property
    def over(self) -> tuple[Value, ...]:
        """The breaches."""
        return tuple(v for v in self.values if v.over)

    @property
    def metrics(self) -> dict[str, float]:
        """What a run logs: each value that was measured, and the number of breaches."""
        found = {f"drift/{v.name}": v.value for v in self.values if v.value is not None}
        return found | {"drift/breaches": float(len(self.over))}

    @property
    def reactions(self) -> dict[Reaction, tuple[Value, ...]]:
        """What is to be run, each once, with the breaches that ask for it.

        A judge and a retriever that are both to be trained are the whole chain: a retriever must be
        taught by the judge that it is released with.
        """
        asked: dict[Reaction, list[Value]] = {}
        for value in self.over:
            asked.setdefault(value.bound.reaction, []).append(value)
        parts = COVERED[Reaction.RETRAIN]
        if Reaction.RETRAIN in asked or all(part in asked for part in parts):
            whole = asked.setdefault(Reaction.RETRAIN, [])
            for part in parts:
                whole += asked.pop(part, [])
        return {reaction: tuple(asked[reaction]) for reaction in Reaction if reaction in asked}

    def rows(self) -> list[dict[str, Any]]:
        """One plain row a value."""
        return [
            {
                "measure": v.name,
                "value": _shown(v.value),
                "limit": v.bound.limit,
                "state": v.mark,
                "reaction": str(v.bound.reaction),
                "note": v.note,
            }
            for v in self.values
        ]

    def markdown(self, outcomes: Sequence[str] = ()) -> str:
        """The table, breaches first, and what became of them."""
        head = f"**{len(self.over)} of {len(self.values)} over their limit**"
        lines = [head if self.over else "**all within their limits**", ""]
        lines += ["| | measure | value | limit | reaction | note |", "| --- " * 6 + "|"]
        ordered = sorted(self.rows(), key=lambda row: row["state"] != "OVER")
        for row in ordered:
            value = "-" if row["value"] is None else f"{row['value']:.4g}"
            state = {"OVER": "❌ OVER", "ok": "✅ ok"}.get(row["state"], "➖ not measured")
            cells = [state, row["measure"], value, f"{row['limit']:g}", row["reaction"]]
            lines.append(f"| {' | '.join(cells)} | {row['note']} |")
        return "\n".join([*lines, "", *(f"* {line}" for line in outcomes)])


def _shown(value: float | None) -> float | None:
    """Four decimals; JSON has no number that is not finite."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


def cooling(
    reaction: Reaction, last: datetime | None, now: datetime, config: MonitorConfig
) -> datetime | None:
    """When `reaction` may be asked for again; None: now.

    last: when it, or one that covers it, was asked for.
    """
    if last is None:
        return None
    free = last + config.cooldown(reaction)
    return free if now < free else None
