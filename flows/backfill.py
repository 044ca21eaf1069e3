"""Past dates, run again: a flow on the data as it was at the end of each day.

Consumes a `Chain` of tables whose rows are dated and a `Span` of days -> produces what the flow
makes, a day after the other, oldest first.

Idempotent: stages are found by content, so a day that was run, or a day on which nothing changed,
is taken from the cache; a backfill that was cut off goes on where it stopped. Live champions are
never touched: `retrain` registers, compares and publishes under the name `<store>-backfill` and
asks nobody about a borderline candidate, `evaluate-champion` and `monitor` only measure, and a past
pass asks for nothing.

Collisions: a second backfill is cancelled while one is active (infra/prefect.yaml). A retraining on
its schedule may run beside it: the two share stages, each of which is made once, and no names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flows.monitor import watch
from flows.release import unattended
from flows.scheduled import Chain, evaluate_champion, retrain
from models.errors import ConfigError, RelearnError, explain
from models.sources import TablesSource
from tasks.settings import prepare_environment, settings

SUFFIX = "-backfill"
"""Of the name that a backfilled `retrain` registers under."""

log = logging.getLogger(__name__)


class Span(BaseModel):
    """Which days, and what is run on each."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    from_date: date
    """First day; the data is that of its end, midnight UTC."""
    to_date: date
    """Last day, inclusive."""
    flow: Literal["evaluate-champion", "monitor", "retrain"] = "evaluate-champion"
    """What is run: measure today's champions, measure drift, or train under <store>-backfill."""
    every_days: int = Field(1, ge=1)
    """Days from one run to the next."""
    undated: tuple[Literal["products", "judgments", "interactions"], ...] = ()
    """Tables without dates that are taken as they are today; others without dates are refused."""

    @model_validator(mode="after")
    def _in_order(self) -> Span:
        if self.to_date < self.from_date:
            raise ValueError(f"to_date {self.to_date} lies before from_date {self.from_date}")
        return self

    @property
    def days(self) -> Iterator[date]:
        """The days, oldest first."""
        for offset in range(0, (self.to_date - self.from_date).days + 1, self.every_days):
            yield self.from_date + timedelta(days=offset)


@flow(name="backfill", flow_run_name="{chain.store} {span.flow} {span.from_date} {span.to_date}")
def backfill(chain: Chain, span: Span) -> list[dict[str, Any]]:
    """Run a flow on the data of past days.

    Returns:
        a row a day: day, rows kept of each table, result.

    Raises:
        ConfigError: a store whose files carry no dates. DataContractError: a table without dates,
            or a day before its first row; the days before stay done.
    """
    prepare_environment(settings())
    source = chain.config.data.source
    if not isinstance(source, TablesSource) or chain.data is None:
        got = f"a backfill of the store {chain.store} with data {chain.data}"
        do = "use store tables and a data folder whose rows have updated_at or timestamp"
        raise ConfigError(explain(got, "dated tables", do))
    rows = []
    for day in span.days:
        try:
            rows.append(_run(chain, source, Path(chain.data).expanduser(), span, day))
        except RelearnError as error:
            error.add_note(f"backfill of {day}; {len(rows)} days before it are done")
            raise
        log.info("backfill %s: %s", day, rows[-1])
    return rows


def _run(chain: Chain, source: TablesSource, folder: Path, span: Span, day: date) -> dict[str, Any]:
    from models.sources.dates import as_of

    work = settings().home / "work"
    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=work, prefix=f"backfill-{day}-") as place:
        kept = as_of(source, folder, Path(place), day, span.undated)
        for name, found in kept.items():
            log.info("backfill %s: %s %s", day, name, asdict(found))
        then = chain.model_copy(update={"data": place})
        result = _result(then, span, datetime.combine(day + timedelta(days=1), time(), UTC))
    return {"day": day.isoformat(), **{name: k.rows for name, k in kept.items()}, "result": result}


def _result(then: Chain, span: Span, end: datetime) -> dict[str, Any]:
    """What a flow made of a day, as plain numbers and labels."""
    if span.flow == "monitor":
        return watch(then, end, past=True).report.metrics
    if span.flow == "evaluate-champion":
        tables = evaluate_champion(then)
        overall = {n: [r for r in t if r["segment"] == "all"][-1] for n, t in tables.items()}
        judge, retrieval = overall["judge"], overall["retrieval"]
        return {"macro_f1": judge["macro_f1"], "ndcg@10": retrieval["ndcg@10"]}
    name = f"name={then.config.name}{SUFFIX}"
    with unattended():
        released = retrain(then.model_copy(update={"changes": (*then.changes, name)}))
    action = None if released.action is None else str(released.action)
    return {"artifacts": [r["artifact"] for r in released.registered], "action": action}
