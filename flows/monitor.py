"""Monitor and react: has today's data moved away from what the champions were trained on?

Consumes a `Chain`, and the champions of its store -> produces a report in MLflow and Prefect, and
an event a reaction that is due; the automations of infra/prefect.yaml run the deployments.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from prefect import flow, task

from flows.data import data_folder, prepare_data
from flows.recipes import PipelineConfig
from flows.scheduled import RUN_NAME, Chain, artifacts_of
from models.evaluation.monitor import Report
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.monitor import (
    MONITOR,
    drift,
    index_age,
    label_age,
    react,
    read_drift,
    show,
    trained_on,
)
from tasks.registry import CHAMPION, nothing_of
from tasks.release import Release, finish_pending, release_of
from tasks.settings import prepare_environment, settings
from tasks.stage import MlflowSink, pipeline

PAST = "the published index is today's"


@dataclass(frozen=True)
class MonitorResult:
    """One pass."""

    report: Report
    outcomes: list[str]
    """What became of each reaction, in words."""
    run_id: str
    """The MLflow run with its numbers."""


@flow(name="monitor", flow_run_name=RUN_NAME)
def monitor(chain: Chain) -> MonitorResult:
    """Compare today's data and the served index with the champions' data, and ask for what is due.

    Raises:
        ArtifactError: there are no champions yet, or their training data is gone.
    """
    prepare_environment(settings())
    return watch(chain, datetime.now(UTC))


def watch(chain: Chain, now: datetime, past: bool = False) -> MonitorResult:
    """One pass inside a flow.

    past: the data is that of an earlier day, so the served index is left out, and nothing is asked
    for.
    """
    config = chain.config
    artifacts = artifacts_of(config.name)
    finish_pending(config.name, artifacts=artifacts)
    champions = release_of(config.name, CHAMPION, artifacts=artifacts)
    if champions is None:
        raise nothing_of(config.name, "champion", store=artifacts)
    with data_folder(chain.data), pipeline(f"monitor {config.name}", config.name) as current:
        today = prepare_data(config.data)
        report = _measure(config, today, champions, now, past, artifacts)
        client = artifacts.client
        client.set_tag(current.run_id, MONITOR, config.name)
        client.set_tag(current.run_id, f"{MONITOR}.state", "over" if report.over else "ok")
        sink = MlflowSink(client, current.run_id)
        sink.log(report.metrics)
        sink.flush()
        client.log_dict(current.run_id, report.rows(), "tables/monitor.json")
        outcomes = [f"data as on {now:%Y-%m-%d}: nothing is asked for"] if past else []
        if not past:
            parameters = {"chain": chain.model_dump(mode="json")}
            ask = task(name="react", persist_result=False)(react)
            outcomes = ask(
                config.name,
                report,
                config.monitor,
                parameters,
                champions,
                current.run_id,
                now,
                artifacts=artifacts,
            )
        client.log_text(current.run_id, report.markdown(outcomes), "reports/monitor.md")
        show(config.name, report, outcomes)
    return MonitorResult(report, outcomes, current.run_id)


def _measure(
    config: PipelineConfig,
    today: ArtifactRef,
    champions: Release,
    now: datetime,
    past: bool,
    artifacts: ArtifactStore,
) -> Report:
    judge, encoder, index = (champions.parts[r].ref for r in ("judge", "embedder", "index"))
    found = drift(
        sample=config.monitor.sample,
        max_new_tokens=config.judge.answers.max_new_tokens,
        today=today,
        reference=trained_on(encoder, artifacts=artifacts),
        judge_reference=trained_on(judge, artifacts=artifacts),
        judge=judge,
        encoder=encoder,
        index=index,
    )
    values, notes = read_drift(artifacts.path(found))
    data_dir = settings().data_dir
    age, said = label_age(config.data.source, data_dir, today, now, artifacts)
    values["label_age_days"], notes["label_age_days"] = age, said
    if past:
        notes |= dict.fromkeys(("index_stale_share", "index_lag_hours"), PAST)
    else:
        served, how = index_age(config.name, today, now, artifacts)
        values |= served
        notes |= how
    return Report.of(config.monitor, values, notes)
