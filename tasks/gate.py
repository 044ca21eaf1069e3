"""The gate at work: what is known of candidate and champion, the decision, and where it is kept.

Consumes registered releases -> produces a `Verdict`: the decision of `models.evaluation.gate`, and
an MLflow run with decision.json and the table of reasons; the versions' tags point at that run.

A champion that was measured on another evaluation set (new labels, new products) is measured again
on the candidate's: the same stages, with the settings in the manifests of the candidate's own
evaluation. Test queries are chosen by a hash of their text, so the champion trained on none of
them. Where that fails, the candidate is held and the reason says what to do.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from models.errors import ArtifactError, RelearnError, StoreError, TransientError, explain
from models.evaluation.gate import Contender, Decision, GateConfig, decide
from models.evaluation.outcomes import Outcomes
from models.index.config import IndexConfig
from tasks.artifacts import TAG, ArtifactRef, ArtifactStore
from tasks.embedder import index_catalogue
from tasks.evaluate import RetrievalEvalConfig, evaluate_judge, evaluate_retrieval
from tasks.judge import AnswersConfig, judge_answers
from tasks.lineage import run_of
from tasks.registry import CHAMPION
from tasks.release import INDEX_RECALL, Release, release_of, withdrawn_parts, withdrawn_teacher

DECISION = "decision"
"""Tag of a version: the outcome of its last comparison; `decision_run` has the reasons."""
DECISION_RUN = "decision_run"
CONFIG = f"{TAG}gate.config"
"""Tag of a decision's run: the `GateConfig` it was made with."""
FILE = "decision.json"
REPORT = "decision.md"
EVALUATION = {
    "judge": ("judge", "evaluation_judge"),
    "retrieval": ("embedder", "evaluation_retrieval"),
}
"""What is compared -> the role whose version names its evaluation, and the tag that does."""

Call = Callable[..., ArtifactRef]
"""How a stage is run: `Stage.make`, or `Stage.__call__` inside a flow."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """A decision about `candidate`, made against `champion`."""

    candidate: Release
    champion: Release | None
    decision: Decision


def compare(
    store_name: str,
    candidate: Release,
    config: GateConfig,
    *,
    artifacts: ArtifactStore,
    call: Call,
) -> Verdict:
    """Decide about `candidate` against the champion as it is now."""
    champion = release_of(store_name, CHAMPION, artifacts=artifacts)
    ours = contender(store_name, candidate, champion, artifacts=artifacts)
    theirs = None
    if champion is not None:
        theirs = contender(store_name, champion, artifacts=artifacts)
        if candidate.fingerprints != champion.fingerprints:
            theirs = _on_the_same_sets(ours, theirs, candidate, champion, artifacts, call)
    return Verdict(candidate, champion, decide(ours, theirs, config))


def contender(
    store_name: str,
    release: Release,
    champion: Release | None = None,
    *,
    artifacts: ArtifactStore,
) -> Contender:
    """What is known of a release: its own evaluations, its index's recall, its lineage.

    champion: an embedder that is champion already may stay with a judge that did not teach it.
    """
    parts = release.parts
    taught = withdrawn_teacher(store_name, parts["embedder"], artifacts=artifacts)
    withdrawn = withdrawn_parts(release)
    if taught is not None and f"judge {taught.version}" not in withdrawn:
        withdrawn += (f"judge {taught.version}, which taught the embedder",)
    return Contender(
        labels={role: part.ref.label for role, part in parts.items()},
        outcomes=_outcomes(release, artifacts),
        index_recall=parts["index"].metrics.get(INDEX_RECALL),
        broken_lineage=_broken_lineage(release, champion),
        withdrawn=withdrawn,
    )


def _broken_lineage(release: Release, champion: Release | None) -> str:
    judge, embedder, index = (release.parts[role].ref for role in ("judge", "embedder", "index"))
    broken = []
    stays = champion is not None and _same(release, champion, "embedder")
    if judge.label not in embedder.parents and not stays:
        broken.append(f"{embedder.label} was not taught by {judge.label}")
    if embedder.label not in index.parents:
        broken.append(f"{index.label} was not built with {embedder.label}")
    return "; ".join(broken)


def _same(one: Release, other: Release, role: str) -> bool:
    return one.parts[role].ref.fingerprint == other.parts[role].ref.fingerprint


def _outcomes(release: Release, artifacts: ArtifactStore) -> dict[str, Outcomes]:
    """What its own evaluations kept; without those that are gone or older than the gate."""
    found = {}
    for what, (role, tag) in EVALUATION.items():
        with contextlib.suppress(ArtifactError):
            ref = _artifact(release.parts[role].tags.get(tag, ""), artifacts)
            found[what] = Outcomes.read(artifacts.path(ref))
    return found


def _artifact(label: str, artifacts: ArtifactStore) -> ArtifactRef:
    run = run_of(artifacts, label) if label else None
    if run is None:
        raise ArtifactError(
            explain(f"no run of {label!r}", "an artifact", "run the pipeline again")
        )
    return artifacts.ref(run)


def _on_the_same_sets(
    ours: Contender,
    theirs: Contender,
    candidate: Release,
    champion: Release,
    artifacts: ArtifactStore,
    call: Call,
) -> Contender:
    """`theirs` measured on the candidate's sets where it was measured on others."""
    for what, measure in (("judge", _measure_judge), ("retrieval", _measure_retrieval)):
        own, other = ours.outcomes.get(what), theirs.outcomes.get(what)
        if own is None or (other is not None and other.evaluation_set == own.evaluation_set):
            continue
        log.info("measuring the champion's %s on the candidate's evaluation set", what)
        try:
            evaluation = measure(candidate, champion, artifacts, call)
            measured = {what: Outcomes.read(artifacts.path(evaluation))}
            theirs = replace(theirs, outcomes={**theirs.outcomes, **measured})
        except (StoreError, TransientError):
            raise  # the same command goes on; a decision now would stand
        except (RelearnError, ValidationError, KeyError) as error:
            why = f"the champion cannot be measured on the candidate's set ({error})"
            do = "run the pipeline again, or relearn promote --force --reason ..."
            theirs = replace(theirs, not_comparable=f"{why}; do this: {do}")
    return theirs


def _measure_judge(
    candidate: Release, champion: Release, artifacts: ArtifactStore, call: Call
) -> ArtifactRef:
    """The champion judge, by its own prompt and threshold, on the pairs the candidate answered."""
    evaluation = _artifact(candidate.parts["judge"].tags["evaluation_judge"], artifacts)
    _, parents = _recipe(evaluation, artifacts)
    answers = next(label for place, label in parents.items() if place.startswith("answers."))
    config, _ = _recipe(_artifact(answers, artifacts), artifacts)
    store = _artifact(parents["store"], artifacts)
    judge = champion.parts["judge"].ref
    asked = AnswersConfig.model_validate(config["config"] | {"reasoning_pairs": 0})
    made = call(judge_answers, config=asked, prompt=judge, judge=judge, store=store)
    return call(evaluate_judge, answers={"champion": made}, judge=judge, store=store)


def _measure_retrieval(
    candidate: Release, champion: Release, artifacts: ArtifactStore, call: Call
) -> ArtifactRef:
    """The champion encoder over the candidate's catalogue and queries, in an index like its own."""
    evaluation = _artifact(candidate.parts["embedder"].tags["evaluation_retrieval"], artifacts)
    config, parents = _recipe(evaluation, artifacts)
    store, encoder = _artifact(parents["store"], artifacts), champion.parts["embedder"].ref
    index = call(
        index_catalogue,
        config=index_config(champion.parts["index"].ref, artifacts),
        encoder=encoder,
        store=store,
    )
    return call(
        evaluate_retrieval,
        config=RetrievalEvalConfig.model_validate(config["config"] | {"judged_queries": 0}),
        encoders={"champion": encoder},
        indexes={"champion": index},
        judge=candidate.parts["judge"].ref,
        store=store,
    )


def index_config(index: ArtifactRef, artifacts: ArtifactStore) -> IndexConfig:
    """The settings that an index was built with.

    Raises:
        ArtifactError: its manifest is gone. ValidationError: it is of another version of relearn.
    """
    built, _ = _recipe(index, artifacts)
    return IndexConfig.model_validate(built["config"])


def _recipe(ref: ArtifactRef, artifacts: ArtifactStore) -> tuple[dict[str, Any], dict[str, str]]:
    """Config and parents' labels of an artifact, from its manifest."""
    manifest = artifacts.manifest(artifacts.client.get_run(ref.run_id))
    if manifest is None:
        raise ArtifactError(explain(f"no manifest of {ref.label}", "one", "run the pipeline again"))
    return manifest["config"], manifest["parents"]


def record(
    store_name: str, verdict: Verdict, config: GateConfig, *, artifacts: ArtifactStore
) -> str:
    """Keep the decision: an MLflow run with its JSON and report, tags on the versions that are not
    champion already.

    Returns:
        the run's id; "" for a candidate that is the champion, whose own decision stays.
    """
    candidate, champion, decision = verdict.candidate, verdict.champion, verdict.decision
    if champion is not None and candidate.fingerprints == champion.fingerprints:
        return ""
    tags = {
        "mlflow.runName": f"gate: {decision.outcome}",
        f"{TAG}gate": store_name,
        f"{TAG}gate.outcome": str(decision.outcome),
        f"{TAG}gate.summary": decision.summary[:4000],
        CONFIG: config.model_dump_json(),
    }
    if artifacts.settings.pipeline_run:
        tags["mlflow.parentRunId"] = artifacts.settings.pipeline_run
    client = artifacts.client
    run_id: str = client.create_run(artifacts.experiment_id, tags=tags).info.run_id
    body = decision.as_json() | {
        "candidate": _named(candidate),
        "champion": None if champion is None else _named(champion),
        "config": config.model_dump(),
    }
    client.log_text(run_id, json.dumps(body, indent=1, ensure_ascii=False), FILE)
    client.log_text(run_id, decision.as_markdown(), REPORT)
    client.set_terminated(run_id, "FINISHED")
    said = f"{decision.outcome} {time.strftime('%Y-%m-%d %H:%M')}: {decision.summary}"[:1000]
    for role, part in candidate.parts.items():
        if champion is not None and _same(candidate, champion, role):
            continue
        client.set_model_version_tag(part.name, part.version, DECISION, said)
        client.set_model_version_tag(part.name, part.version, DECISION_RUN, run_id)
    return run_id


def _named(release: Release) -> dict[str, str]:
    return {part.name: f"{part.version} ({part.ref.label})" for part in release.parts.values()}


def config_of(candidate: Release, *, artifacts: ArtifactStore) -> GateConfig:
    """The gate's settings of the candidate's own run; the defaults where there was none.

    A part that is the champion's names the decision about the champion: the newest one counts.
    """
    found = {part.tags.get(DECISION_RUN, "") for part in candidate.parts.values()} - {""}
    if not found:
        return GateConfig()
    runs = [artifacts.client.get_run(run_id) for run_id in found]
    newest = max(runs, key=lambda run: int(run.info.start_time))
    return GateConfig.model_validate_json(newest.data.tags[CONFIG])
