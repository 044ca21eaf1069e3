"""One pass of the monitor: what today's data looks like to the champions, and what that asks for.

Consumes today's store and the champions of the registry -> produces the values of
`models/evaluation/monitor.py`, their table in MLflow and Prefect, and an event a reaction.

The reference is the store that a champion was trained on, from its lineage. What needs a model is a
stage: as long as data and champions are the same it is made once, and an hourly pass costs nothing.
What hangs on the clock or on the served index is measured each time.

An event is asked for again only after the cooldown. When that was is a tag of the pass's MLflow
run, so it outlives this process and Prefect's database. Without a server nothing is sent and
nothing is tagged: the pass says what it would have asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from models.errors import ArtifactError, explain
from models.evaluation.monitor import (
    COVERED,
    MonitorConfig,
    Reaction,
    Report,
    SampleConfig,
    cooling,
)
from models.sources import SourceConfig, SyntheticSource, TablesSource
from tasks.artifacts import TAG, ArtifactRef, ArtifactStore
from tasks.ingest import open_store
from tasks.lineage import find_artifact
from tasks.publish import staleness
from tasks.stage import StageContext, stage
from tasks.temporary import lasting_server

if TYPE_CHECKING:
    from tasks.release import Release

EVENT = "relearn.drift"
STORE_RESOURCE = "relearn.store."
"""Prefix of an event's resource id; the store's name follows."""
REACTION_LABEL = "relearn.deployment"
"""Label of an event's resource: the deployment it asks for. The automations match on it."""
MONITOR = f"{TAG}monitor"
"""Tag of a pass's run: the store's name."""
ASKED = f"{TAG}monitor.asked."
"""Tag of a pass's run, a reaction each: when its event was sent (ISO 8601, UTC)."""
FILE = "drift.json"

log = logging.getLogger(__name__)


def trained_on(ref: ArtifactRef, *, artifacts: ArtifactStore) -> ArtifactRef:
    """The store that a champion was trained on: the artifact `store` among its parents.

    Raises:
        ArtifactError: its manifest or that artifact is gone.
    """
    manifest = artifacts.manifest(artifacts.client.get_run(ref.run_id))
    label = (manifest or {}).get("parents", {}).get("store")
    if label is None:
        got = f"no store among the parents of {ref.label}"
        raise ArtifactError(explain(got, "the data it was trained on", "run the pipeline again"))
    return find_artifact(label, store=artifacts)


@stage(name="drift", kind="report", code_version="5")
def drift(
    ctx: StageContext,
    sample: SampleConfig,
    max_new_tokens: int,
    today: ArtifactRef,
    reference: ArtifactRef,
    judge_reference: ArtifactRef,
    judge: ArtifactRef,
    encoder: ArtifactRef,
    index: ArtifactRef,
) -> Mapping[str, float]:
    """Drift of queries and products between training data and today's, and the judge's doubts.

    reference: the store of encoder and index. judge_reference: the judge's, mostly the same.
    max_new_tokens: of a decoded response.
    """
    from models.evaluation.drift import mean_shift, mmd
    from tasks.live import Champions, table_drift

    before, now = open_store(ctx, reference), open_store(ctx, today)
    champions = Champions(ctx, judge, encoder, index)
    values, notes = table_drift(before, now, sample)
    then_ND, now_MD = (champions.vectors(store, sample.queries) for store in (before, now))
    values["query_mmd"] = mmd(then_ND, now_MD)
    values["query_mean_shift"] = mean_shift(then_ND, now_MD)
    taught = before if judge_reference == reference else open_store(ctx, judge_reference)
    views = [champions.view(store, sample, max_new_tokens) for store in (taught, now)]
    judged, said = compare_views(*views)
    values |= judged
    notes |= said
    notes["query_mmd"] = f"{len(then_ND)} and {len(now_MD)} queries"
    body = {"values": values, "notes": notes}
    (ctx.out / FILE).write_text(json.dumps(body, indent=1), encoding="utf-8")
    return {f"drift/{name}": value for name, value in values.items() if value is not None}


def compare_views(
    then: Mapping[str, float | None], now: Mapping[str, float | None]
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Differences of two `judge_view`s towards more doubt, and what they were made of."""
    values: dict[str, float | None] = {}
    notes = {}
    for name, key, sign in (
        ("confidence_drop", "confidence", -1.0),
        ("entropy_rise", "entropy", 1.0),
        ("contradiction_rise", "contradiction", 1.0),
    ):
        a, b = then[key], now[key]
        if a is None or b is None:
            values[name] = None
            notes[name] = "no decoded response states a grade and verdicts"
        else:
            values[name] = sign * (b - a) + 0.0  # no -0
            notes[name] = f"{a:.3f} on training queries, {b:.3f} today"
    return values, notes


def read_drift(folder: Any) -> tuple[dict[str, float | None], dict[str, str]]:
    """Values and notes of a drift artifact."""
    body = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return body["values"], body["notes"]


def label_age(
    source: SourceConfig, data_dir: Any, today: ArtifactRef, now: datetime, artifacts: ArtifactStore
) -> tuple[float | None, str]:
    """Days since the newest judgment or interaction; None, with the reason, where there are no
    dates."""
    if isinstance(source, SyntheticSource):
        return None, "a generated store has no label dates"
    if isinstance(source, TablesSource):
        from models.sources.dates import newest

        dates = newest(source, data_dir, now)
    else:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        path = artifacts.path(today) / "store" / "interactions.parquet"
        moments = pq.read_table(path, columns=["timestamp"])["timestamp"]
        past = moments.filter(pc.less_equal(moments, pa.scalar(now.replace(tzinfo=None))))
        last = pc.max(past).as_py()
        dates = {} if last is None else {"interactions": last.replace(tzinfo=UTC)}
    if not dates:
        return None, "no dates in judgments or interactions"
    age = (now - max(dates.values())).total_seconds() / 86_400
    said = ", ".join(f"newest of {name} {when:%Y-%m-%d %H:%M}" for name, when in dates.items())
    return max(0.0, age), said


def index_age(
    store_name: str, today: ArtifactRef, now: datetime, artifacts: ArtifactStore
) -> tuple[dict[str, float | None], dict[str, str]]:
    """Stale share and lag of the published index against today's catalogue."""
    served, found = staleness(store_name, today, artifacts=artifacts)
    age = (now - datetime.fromisoformat(served.made_at)).total_seconds() / 3600
    said = (
        f"{len(found.missing)} missing, {len(found.changed)} changed, {len(found.gone)} gone "
        f"of {found.products}" + (f"; {len(found.kept)} faulty today" if found.kept else "")
    )
    return (
        {"index_stale_share": found.share, "index_lag_hours": max(0.0, age) if found.stale else 0},
        {
            "index_stale_share": said,
            "index_lag_hours": f"version {served.version} made {served.made_at}",
        },
    )


def react(
    store_name: str,
    report: Report,
    config: MonitorConfig,
    parameters: Mapping[str, Any],
    release: Release,
    run_id: str,
    now: datetime,
    *,
    artifacts: ArtifactStore,
) -> list[str]:
    """Send an event for each reaction that is due; returns what became of each, in words.

    parameters: of the deployment to run; the automations take them from the event's payload.
    run_id: the pass's MLflow run, which keeps when an event was sent.
    """
    said = []
    with FileLock(artifacts.lock_file(f"monitor-{store_name}")):
        for reaction, values in report.reactions.items():
            why = ", ".join(v.name for v in values)
            last = last_asked(store_name, reaction, artifacts=artifacts)
            free = cooling(reaction, last, now, config)
            if free is not None:
                said.append(
                    f"{reaction} not asked for again before {free:%Y-%m-%d %H:%M} UTC, asked for "
                    f"{last:%Y-%m-%d %H:%M} ({why})"
                )
            elif send(store_name, reaction, report, parameters, release, run_id):
                artifacts.client.set_tag(run_id, f"{ASKED}{reaction}", now.isoformat())
                verb = "told" if reaction is Reaction.NONE else f"{reaction} asked for"
                said.append(f"{verb}: {why}")
            else:
                what = "told" if reaction is Reaction.NONE else f"asked for {reaction}"
                said.append(
                    f"no Prefect server: would have {what} ({why}); start one with relearn up"
                )
    return said


def last_asked(store_name: str, reaction: Reaction, *, artifacts: ArtifactStore) -> datetime | None:
    """When `reaction`, or one that does it as well, was last asked for."""
    found = []
    for other in (reaction, *(r for r, parts in COVERED.items() if reaction in parts)):
        tag = f"{ASKED}{other}"
        condition = f"tags.`{MONITOR}` = '{store_name}' and tags.`{tag}` != ''"
        runs = artifacts.search(condition)
        found += [datetime.fromisoformat(run.data.tags[tag]) for run in runs]
    return max(found, default=None)


def send(
    store_name: str,
    reaction: Reaction,
    report: Report,
    parameters: Mapping[str, Any],
    release: Release,
    run_id: str,
) -> bool:
    """Emit the event of a reaction; False where there is no server to take it."""
    from prefect.events import emit_event

    if not lasting_server():
        return False
    values = report.reactions[reaction]
    sent = emit_event(
        event=EVENT,
        resource={
            "prefect.resource.id": f"{STORE_RESOURCE}{store_name}",
            "prefect.resource.name": store_name,
            REACTION_LABEL: str(reaction),
        },
        related=[
            {
                "prefect.resource.id": f"relearn.model.{part.name}.{part.version}",
                "prefect.resource.role": "champion",
                "prefect.resource.name": part.ref.label,
            }
            for part in release.parts.values()
        ],
        payload={
            **parameters,
            "mlflow_run": run_id,
            "breaches": [
                {"measure": v.name, "value": v.value, "limit": v.bound.limit, "note": v.note}
                for v in values
            ],
        },
    )
    return sent is not None


def show(store_name: str, report: Report, outcomes: Sequence[str]) -> None:
    """Table and report in Prefect's pages; what is only shown may fail: MLflow has it too."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    key = f"monitor-{store_name.replace('_', '-')}"
    said = f"{len(report.over)} of {len(report.values)} over their limit"
    try:
        create_table_artifact(table=report.rows(), key=f"{key}-values", description=said)
        create_markdown_artifact(markdown=report.markdown(outcomes), key=key, description=said)
    except Exception as error:
        log.warning("Prefect does not show the monitor's report: %s", error)
