"""Releases: judge, embedder and index of a store are champions together, or not at all.

Consumes ArtifactRefs -> produces model versions, the alias `champion` on all three, and one MLflow
run a move. That run is the intent record and the history at once:

1. It is opened RUNNING with the sets before and after as tags: one write, all or nothing.
2. The published index moves (`PUBLISHERS`), then the three aliases, then the versions' tags. Each
   step may be repeated.
3. The run is FINISHED. A crash before that leaves it RUNNING, and `finish_pending`, which every run
   and command calls first, carries it out. An error on the way moves everything back: FAILED.

One move at a time: a file lock under the home. A promotion names the champion that its decision
was made against and is refused when there is another one by now.
"""

from __future__ import annotations

import enum
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout

from models.errors import ArtifactError, ConfigError, StoreError, explain
from tasks import registry
from tasks.artifacts import TAG, ArtifactRef, ArtifactStore
from tasks.evaluate import JUDGE_TABLE, RETRIEVAL_TABLE, overall, read_table
from tasks.publish import serve
from tasks.registry import CANDIDATE, CHAMPION, Registered

if TYPE_CHECKING:
    from mlflow.entities import Run

ROLES = ("judge", "embedder", "index")
TABLE_OF = {"judge": JUDGE_TABLE, "retrieval": RETRIEVAL_TABLE}
MOVE = f"{TAG}move"
"""Tag of a move's run: the store's name."""
WITHDRAWN = "withdrawn"
"""Tag of a version that was rolled back from: when and why."""
PROMOTED = "promoted"
"""Tag of a version that became champion: when and how."""
INDEX_RECALL = "index_recall"
"""Metric of an index version: its recall@10 against the exact index."""
HISTORY = 500
"""Moves looked at."""


class Publish(Protocol):
    """Puts an index where it is served from; without one, nothing is served. Must be repeatable:
    after a crash it is called again, and on an error once more with the index from before."""

    def __call__(
        self, store_name: str, ref: ArtifactRef | None, *, artifacts: ArtifactStore
    ) -> object: ...


PUBLISHERS: tuple[Publish, ...] = (serve,)
"""What else moves with the aliases."""

log = logging.getLogger(__name__)


class Action(enum.StrEnum):
    """Why a set became champion."""

    FIRST = "first"
    PROMOTED = "promoted"
    APPROVED = "approved"
    FORCED = "forced"
    ROLLED_BACK = "rolled back"


class Moved(enum.StrEnum):
    """How a promotion ended."""

    DONE = "done"
    OVERTAKEN = "overtaken"
    """Another champion than the one decided against; nothing was touched."""


@dataclass(frozen=True)
class Release:
    """A judge, an embedder and an index that move together."""

    parts: Mapping[str, Registered]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Identity of each part."""
        return {role: part.ref.fingerprint for role, part in self.parts.items()}

    @property
    def version(self) -> str:
        """The index's number: an index has one embedder. Where a judge was released alone, the
        sets before and after share it."""
        return self.parts["index"].version

    @property
    def title(self) -> str:
        """`judge 3, embedder 4, index 4`."""
        return ", ".join(f"{role} {self.parts[role].version}" for role in ROLES)


@dataclass(frozen=True)
class Move:
    """One change of champions; before is None for the first."""

    run_id: str
    action: Action
    before: Mapping[str, str] | None
    after: Mapping[str, str]
    reason: str
    started_ms: int

    @property
    def when(self) -> str:
        """Local time, to the minute."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started_ms / 1000))


def model_name(store_name: str, role: str) -> str:
    """Registered model name of one store's judge, embedder or index."""
    return f"{store_name}-{role}"


def register_candidates(
    store_name: str,
    refs: Mapping[str, ArtifactRef],
    evaluations: Mapping[str, ArtifactRef],
    *,
    artifacts: ArtifactStore,
) -> Release:
    """Make every ref a version with alias `candidate`; who becomes champion is for the gate.

    refs: {role: artifact}. What was not made is the champion's: its versions, which name their
    evaluations, get the alias `candidate` as well. A set that is the champion's already takes the
    alias from no other: that one may be waiting for a person.
    evaluations: `judge` of the role judge, `retrieval` of embedder and index.

    Raises:
        ArtifactError: a part was not made and there is no champion to take it from.
    """
    kept: Mapping[str, Registered] = {}
    if missing := [role for role in ROLES if role not in refs]:
        kept = _champion_parts(store_name, missing, artifacts)
    numbers = {
        kind: _numbers(overall(read_table(artifacts.path(ref), TABLE_OF[kind])))
        for kind, ref in evaluations.items()
    }
    tags = {f"evaluation_{k}": ref.label for k, ref in evaluations.items()}
    parts = {}
    for role in ROLES:
        name = model_name(store_name, role)
        if role in refs:
            metrics = numbers["judge" if role == "judge" else "retrieval"]
            if role == "index":
                metrics = metrics | _index_recall(refs[role], artifacts)
            version = registry.register(
                name, refs[role], metrics, tags, alias=None, store=artifacts
            )
        else:
            version = kept[role].version
        made = registry.get(name, version, store=artifacts)
        assert made is not None, "it was registered above"
        parts[role] = made
    made_now = Release(parts)
    champion = release_of(store_name, CHAMPION, artifacts=artifacts)
    waiting = release_of(store_name, CANDIDATE, artifacts=artifacts)
    if waiting is None or champion is None or made_now.fingerprints != champion.fingerprints:
        for part in parts.values():
            registry.set_alias(part.name, CANDIDATE, part.version, store=artifacts)
    return made_now


def _champion_parts(
    store_name: str, missing: Sequence[str], artifacts: ArtifactStore
) -> Mapping[str, Registered]:
    found = release_of(store_name, CHAMPION, artifacts=artifacts)
    if found is None:
        got = f"no {' and '.join(missing)}, and no champion of {store_name} to take it from"
        do = "run the whole chain once: relearn run --store ..."
        raise ArtifactError(explain(got, "champions", do))
    return found.parts


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if isinstance(v, int | float) and v == v}


def _index_recall(index: ArtifactRef, artifacts: ArtifactStore) -> dict[str, float]:
    """What the index stage measured; {} when it did not."""
    found = artifacts.client.get_run(index.run_id).data.metrics.get("recall_at_10")
    return {} if found is None else {INDEX_RECALL: float(found)}


def release_of(store_name: str, alias: str, *, artifacts: ArtifactStore) -> Release | None:
    """The set with `alias`, None when one of the three has none."""
    parts = {
        role: registry.get(model_name(store_name, role), alias, store=artifacts) for role in ROLES
    }
    found = {role: part for role, part in parts.items() if part is not None}
    return Release(found) if len(found) == len(ROLES) else None


def candidates(store_name: str, *, artifacts: ArtifactStore) -> Release:
    """The set with alias `candidate`.

    Raises:
        ArtifactError: nothing was registered.
    """
    found = release_of(store_name, CANDIDATE, artifacts=artifacts)
    if found is None:
        raise registry.nothing_of(store_name, "candidate", store=artifacts)
    return found


def named(
    store_name: str, judge: str | None, index: str | None, *, artifacts: ArtifactStore
) -> Release:
    """The set of a judge and an index by their version numbers, of which one may be None.

    Without `judge`, the one that taught the index's embedder; without `index`, the champion's.

    Raises:
        ConfigError: no such version.
        ArtifactError: what it was made with is not registered.
    """
    every = {r: registry.versions(model_name(store_name, r), store=artifacts) for r in ROLES}
    parts: dict[str, Registered] = {}
    if index is None:
        parts |= _champion_parts(store_name, ("embedder", "index"), artifacts)
    else:
        parts["index"] = _numbered(every["index"], index, "--index")
        parts["embedder"] = _parent(parts["index"], every["embedder"])
    if judge is not None:
        parts["judge"] = _numbered(every["judge"], judge, "--judge")
    elif index is not None:
        parts["judge"] = _parent(parts["embedder"], every["judge"])
    return Release({role: parts[role] for role in ROLES})


def _numbered(versions: Sequence[Registered], number: str, option: str) -> Registered:
    found = next((v for v in versions if v.version == number), None)
    if found is None:
        have = ", ".join(v.version for v in versions) or "none"
        raise ConfigError(explain(f"{option} {number}", f"one of {have}", "see relearn versions"))
    return found


def _parent(child: Registered, versions: Sequence[Registered]) -> Registered:
    found = next((v for v in versions if v.ref.label in child.ref.parents), None)
    if found is None:
        got = f"nothing registered that {child.name} {child.version} was made with"
        raise ArtifactError(explain(got, "its parent", "run the pipeline again"))
    return found


def release_with(
    store_name: str, fingerprints: Mapping[str, str], *, artifacts: ArtifactStore
) -> Release | None:
    """The set of these artifacts as it is registered now, None when a version is gone."""
    parts = {}
    for role in ROLES:
        every = registry.versions(model_name(store_name, role), store=artifacts)
        part = next((v for v in every if v.ref.fingerprint == fingerprints.get(role)), None)
        if part is None:
            return None
        parts[role] = part
    return Release(parts)


def promote(
    store_name: str,
    candidate: Release,
    champion: Release | None,
    action: Action,
    reason: str,
    *,
    artifacts: ArtifactStore,
    publishers: Sequence[Publish] | None = None,
) -> Moved:
    """Make `candidate` the champion, if `champion` still is it.

    Raises:
        ArtifactError: files of the candidate are gone; nothing was touched.
    """
    with FileLock(_lock(store_name, artifacts)):
        _finish_pending(store_name, artifacts, publishers)
        now = release_of(store_name, CHAMPION, artifacts=artifacts)
        expected = None if champion is None else champion.fingerprints
        if (None if now is None else now.fingerprints) != expected:
            return Moved.OVERTAKEN
        _make_move(store_name, candidate, now, action, reason, artifacts, publishers)
    return Moved.DONE


def rollback(
    store_name: str,
    to: str | None = None,
    reason: str = "",
    *,
    artifacts: ArtifactStore,
    publishers: Sequence[Publish] | None = None,
) -> tuple[Release, Release]:
    """Make an earlier champion the champion again: (from, to). What is left is marked withdrawn.

    Its index is served as it was when it was left: with the refreshes it had, without later ones.
    Of the index before, that version is kept; where one from further back is not, it is the
    artifact, without any (`tasks.publish.serve`).

    to: number of an index that was champion (the last set with it, apart from the champion); None:
    the champion promoted before this one that was not withdrawn.

    Raises:
        ArtifactError: no champion, no earlier one, or files that are gone.
        ConfigError: `to` is the champion, or never was one.
    """
    with FileLock(_lock(store_name, artifacts)):
        _finish_pending(store_name, artifacts, publishers)
        now = release_of(store_name, CHAMPION, artifacts=artifacts)
        if now is None:
            raise registry.nothing_of(store_name, "champion", store=artifacts)
        moves = history(store_name, artifacts=artifacts)
        past = _past(store_name, moves, artifacts)
        target = _chosen(past, to, now) if to else _previous(past, moves, now)
        why = reason or f"rolled back to {target.title}"
        _make_move(store_name, target, now, Action.ROLLED_BACK, why, artifacts, publishers)
    return now, target


def finish_pending(
    store_name: str,
    *,
    artifacts: ArtifactStore,
    publishers: Sequence[Publish] | None = None,
    wait: bool = True,
) -> list[Move]:
    """Carry out the moves that a crash left unfinished; returns them. Nothing to do: one query.

    wait: for a move that is under way. A reader need not: its process lives, nothing is to repair.
    """
    if not _moves(store_name, artifacts, "RUNNING"):
        return []
    try:
        with FileLock(_lock(store_name, artifacts), timeout=-1 if wait else 0):
            return _finish_pending(store_name, artifacts, publishers)
    except Timeout:
        return []


def serve_champion(
    store_name: str, *, artifacts: ArtifactStore, publishers: Sequence[Publish] | None = None
) -> None:
    """Publish the champion's index where something else is served, or nothing: a lost folder."""
    with FileLock(_lock(store_name, artifacts)):
        _finish_pending(store_name, artifacts, publishers)
        now = release_of(store_name, CHAMPION, artifacts=artifacts)
        if now is not None:
            _publish(store_name, now.parts["index"].ref, artifacts, publishers)


def history(store_name: str, *, artifacts: ArtifactStore) -> list[Move]:
    """Every finished move, oldest first."""
    return _moves(store_name, artifacts, "FINISHED")


def _lock(store_name: str, artifacts: ArtifactStore) -> str:
    return str(artifacts.lock_file(f"promotion-{store_name}"))


def _moves(store_name: str, artifacts: ArtifactStore, status: str) -> list[Move]:
    quoted = store_name.replace("'", "")
    condition = f"tags.`{MOVE}` = '{quoted}' and attributes.status = '{status}'"
    return [_move(run) for run in reversed(artifacts.search(condition, HISTORY))]


def _move(run: Run) -> Move:
    tags = run.data.tags
    return Move(
        run_id=run.info.run_id,
        action=Action(tags[f"{MOVE}.action"]),
        before=json.loads(tags[f"{MOVE}.before"]),
        after=json.loads(tags[f"{MOVE}.after"]),
        reason=tags[f"{MOVE}.reason"],
        started_ms=run.info.start_time,
    )


def _make_move(
    store_name: str,
    after: Release,
    before: Release | None,
    action: Action,
    reason: str,
    artifacts: ArtifactStore,
    publishers: Sequence[Publish] | None,
) -> None:
    for part in after.parts.values():
        found = artifacts.find(part.ref.fingerprint)
        if found.ref is None:
            why = f"{part.name} version {part.version}: {found.reason or 'no finished run'}"
            raise ArtifactError(explain(why, "a whole artifact", "relearn run makes it again"))
    tags = {
        "mlflow.runName": f"champion: {after.title}",
        MOVE: store_name,
        f"{MOVE}.action": str(action),
        f"{MOVE}.before": json.dumps(None if before is None else before.fingerprints),
        f"{MOVE}.after": json.dumps(after.fingerprints),
        f"{MOVE}.reason": reason[:4000],
    }
    if artifacts.settings.pipeline_run:
        tags["mlflow.parentRunId"] = artifacts.settings.pipeline_run
    run = artifacts.client.create_run(artifacts.experiment_id, tags=tags)
    _carry_out(store_name, _move(run), artifacts, publishers)


def _finish_pending(
    store_name: str, artifacts: ArtifactStore, publishers: Sequence[Publish] | None
) -> list[Move]:
    """Call it holding the lock: then a RUNNING move has lost its process."""
    done = []
    for move in _moves(store_name, artifacts, "RUNNING"):
        log.warning("a move of %s's champions was cut off; carrying it out", store_name)
        try:
            _carry_out(store_name, move, artifacts, publishers)
        except StoreError:
            raise  # neither carried out nor taken back: the next run does it
        except Exception as error:
            log.warning("it cannot be carried out: %s", error)
        else:
            done.append(move)
    return done


def _carry_out(
    store_name: str, move: Move, artifacts: ArtifactStore, publishers: Sequence[Publish] | None
) -> None:
    """Move everything, or everything back on an error; may be called again after a crash.

    What can neither be carried out nor taken back has FAILED as well: tried again later, it would
    undo what was promoted meanwhile.
    """
    try:
        after = _resolved(store_name, move.after, artifacts)
        _point(store_name, after, artifacts, publishers)
    except Exception as error:
        artifacts.client.set_tag(move.run_id, f"{TAG}error", f"{type(error).__name__}: {error}")
        try:
            _take_back(store_name, move, artifacts, publishers)
        except StoreError:
            raise  # it stays RUNNING: the next run does it
        except Exception as problem:
            log.error(
                "nor can it be taken back (%s): judge, embedder and index may be of two sets; "
                "look at relearn versions, then relearn promote or relearn rollback --to V",
                problem,
            )
        artifacts.client.set_terminated(move.run_id, "FAILED")
        raise
    _mark(store_name, move, after, artifacts)
    artifacts.client.set_terminated(move.run_id, "FINISHED")


def _take_back(
    store_name: str, move: Move, artifacts: ArtifactStore, publishers: Sequence[Publish] | None
) -> None:
    if move.before is None:
        _point_nowhere(store_name, artifacts, publishers)
        return
    before = _resolved(store_name, move.before, artifacts)
    _point(store_name, before, artifacts, publishers)


def _resolved(
    store_name: str, fingerprints: Mapping[str, str], artifacts: ArtifactStore
) -> Release:
    release = release_with(store_name, fingerprints, artifacts=artifacts)
    if release is None:
        got = f"no version of {store_name} with {dict(fingerprints)}"
        raise ArtifactError(explain(got, "registered versions", "relearn run registers them again"))
    return release


def _point(
    store_name: str,
    release: Release,
    artifacts: ArtifactStore,
    publishers: Sequence[Publish] | None,
) -> None:
    _publish(store_name, release.parts["index"].ref, artifacts, publishers)
    for part in (release.parts[role] for role in ROLES):
        registry.set_alias(part.name, CHAMPION, part.version, store=artifacts)


def _point_nowhere(
    store_name: str, artifacts: ArtifactStore, publishers: Sequence[Publish] | None
) -> None:
    _publish(store_name, None, artifacts, publishers)
    for role in ROLES:
        registry.delete_alias(model_name(store_name, role), CHAMPION, store=artifacts)


def _publish(
    store_name: str,
    index: ArtifactRef | None,
    artifacts: ArtifactStore,
    publishers: Sequence[Publish] | None,
) -> None:
    for put in PUBLISHERS if publishers is None else publishers:
        put(store_name, index, artifacts=artifacts)


def _mark(store_name: str, move: Move, after: Release, artifacts: ArtifactStore) -> None:
    """Tags of the versions: champions are promoted, what a rollback leaves is withdrawn."""
    client = artifacts.client
    for part in after.parts.values():
        how = f"{move.when} {move.action}"
        client.set_model_version_tag(part.name, part.version, PROMOTED, how)
        if WITHDRAWN in part.tags:
            client.delete_model_version_tag(part.name, part.version, WITHDRAWN)
    if move.action is not Action.ROLLED_BACK or move.before is None:
        return
    before = release_with(store_name, move.before, artifacts=artifacts)
    for role, part in before.parts.items() if before else ():
        if part.ref.fingerprint != move.after[role]:
            why = f"{move.when} {move.reason}"
            client.set_model_version_tag(part.name, part.version, WITHDRAWN, why)


def _past(store_name: str, moves: Sequence[Move], artifacts: ArtifactStore) -> list[Release]:
    """The sets that were promoted, oldest first, as far as they are registered still."""
    sets = [move.before for move in moves[:1] if move.before]
    sets += [move.after for move in moves if move.action is not Action.ROLLED_BACK]
    found = (release_with(store_name, s, artifacts=artifacts) for s in sets)
    return [release for release in found if release is not None]


def _previous(past: Sequence[Release], moves: Sequence[Move], now: Release) -> Release:
    """The champion that `now` took the place of, or else the last one promoted before `now` was;
    none with a withdrawn part."""
    promoted = [m for m in moves if m.action is not Action.ROLLED_BACK]
    came = next((m.before for m in reversed(promoted) if m.after == now.fingerprints), None)
    places = [i for i, r in enumerate(past) if r.fingerprints == now.fingerprints]
    earlier = past[: places[-1]] if places else []
    for release in (*(r for r in past if r.fingerprints == came), *reversed(earlier)):
        if release.fingerprints != now.fingerprints and not withdrawn_parts(release):
            return release
    got = f"no champion before {now.title} that was not withdrawn"
    raise ArtifactError(explain(got, "an earlier champion", "relearn versions, then --to V"))


def _chosen(past: Sequence[Release], to: str, now: Release) -> Release:
    others = {r.version: r for r in past if r.fingerprints != now.fingerprints}
    if to not in others:
        have = ", ".join(others) or "no other"
        got = f"--to {to}" + (", the champion" if to == now.version else "")
        do = "choose one; `relearn promote` promotes a candidate that never was champion"
        raise ConfigError(explain(got, f"an index version that was champion ({have})", do))
    return others[to]


def withdrawn_parts(release: Release) -> tuple[str, ...]:
    """Parts that were rolled back from, e.g. ("judge 3",)."""
    return tuple(
        f"{role} {release.parts[role].version}"
        for role in ROLES
        if WITHDRAWN in release.parts[role].tags
    )


def withdrawn_teacher(
    store_name: str, embedder: Registered, *, artifacts: ArtifactStore
) -> Registered | None:
    """The withdrawn judge that taught `embedder`, if one did."""
    judges = registry.versions(model_name(store_name, "judge"), store=artifacts)
    return next(
        (j for j in judges if WITHDRAWN in j.tags and j.ref.label in embedder.ref.parents), None
    )


def registered_rows(store_name: str, release: Release, *, artifacts: ArtifactStore) -> list[Any]:
    """One row a model, with its aliases as they are now."""
    now = release_with(store_name, release.fingerprints, artifacts=artifacts)
    assert now is not None, "it was registered by this run"
    return [
        {
            "model": part.name,
            "version": part.version,
            "alias": ", ".join(part.aliases),
            "artifact": part.ref.label,
        }
        for part in now.parts.values()
    ]


def version_rows(store_name: str, *, artifacts: ArtifactStore) -> list[dict[str, Any]]:
    """Every version, newest first by role: aliases, metrics, what it was made with, its decision.

    Raises:
        ArtifactError: the store has none.
    """
    every = {r: registry.versions(model_name(store_name, r), store=artifacts) for r in ROLES}
    if not any(every.values()):
        raise registry.nothing_of(store_name, "version", store=artifacts)
    by_label = {v.ref.label: (role, v) for role in ROLES for v in every[role]}
    flags: dict[str, str] = {}
    rows = []
    for role in ROLES:
        for version in every[role]:
            made_with = [by_label[p] for p in version.ref.parents if p in by_label]
            flags[version.ref.label] = _flag(version, made_with, flags)
            rows.append(
                {
                    "role": role,
                    "version": version.version,
                    "alias": ", ".join(version.aliases),
                    "metrics": version.metrics,
                    "made_with": ", ".join(f"{r} {v.version}" for r, v in made_with),
                    "decision": version.tags.get("decision", ""),
                    "promoted": version.tags.get(PROMOTED, ""),
                    "flag": flags[version.ref.label],
                }
            )
    return rows


def _flag(
    version: Registered, made_with: Sequence[tuple[str, Registered]], flags: Mapping[str, str]
) -> str:
    """Withdrawn itself, or made with something that is or was."""
    if WITHDRAWN in version.tags:
        return f"withdrawn {version.tags[WITHDRAWN]}"
    bad = [f"{role} {v.version}" for role, v in made_with if flags.get(v.ref.label)]
    return f"made with withdrawn {', '.join(bad)}" if bad else ""
