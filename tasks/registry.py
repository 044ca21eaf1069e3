"""Registered models: which version is the candidate, which is the champion.

Consumes ArtifactRefs -> produces MLflow model versions with the fingerprint as a tag. The source is
the run's artifact folder, which MLflow loads as a model where tasks/pyfuncs.py has a loader for the
kind, else (and in versions older than that) the data folder in it. The same fingerprint is never
registered twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from filelock import FileLock

from models.errors import ArtifactError, explain
from tasks.artifacts import DATA, SHORT, TAG, ArtifactRef, ArtifactStore
from tasks.faults import if_absent, if_present
from tasks.pyfuncs import servable, write_model
from tasks.settings import settings
from tasks.stage import metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE = "candidate"
CHAMPION = "champion"
METRIC_TAG = "metric."
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for no such model or version, and for no such alias. Any other error is none: a
champion that cannot be asked for is not a missing one."""


@dataclass(frozen=True)
class Registered:
    """One version of a registered model."""

    name: str
    version: str
    ref: ArtifactRef
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers it was registered with; what a gate compares."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags given by the caller; relearn's own are left out."""
    aliases: tuple[str, ...] = ()


def register(
    name: str,
    ref: ArtifactRef,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    *,
    alias: str | None = CANDIDATE,
    store: ArtifactStore | None = None,
) -> str:
    """Make `ref` a version of model `name` with `alias`, if any; returns the version number.

    The fingerprint's existing version is taken when its files are whole; its metrics and tags are
    brought up to date. A version whose files are gone is replaced; its aliases and tags, such as
    that it was withdrawn, move with it.

    Raises:
        ArtifactError: the files of `ref` are gone.
    """
    store = store or _store()
    found = store.find(ref.fingerprint)
    if found.ref is None:
        why = found.reason or "no finished run"
        raise ArtifactError(explain(f"{ref.label}: {why}", "a whole artifact", "run it again"))
    ref = found.ref
    source = write_model(store, ref) if servable(ref) else ref.uri
    with FileLock(store.lock_file(f"registry-{name}")):
        _ensure_model(store.client, name)
        wanted = _tags(metrics, tags)
        same = _versions_of(store.client, name, ref.fingerprint)
        kept = next((v for v in same if _data_uri(v.source) == ref.uri), None)
        if kept is None:
            _create(store.client, name, ref, source, wanted)
            # more than one where an answer was lost and the request was sent again
            same = _versions_of(store.client, name, ref.fingerprint)
            whole = (v for v in same if _data_uri(v.source) == ref.uri)
            kept = min(whole, key=lambda v: int(v.version))
        version = str(kept.version)
        for key, value in wanted.items():
            if kept.tags.get(key) != value:
                store.client.set_model_version_tag(name, version, key, value)
        for stale in same:
            if str(stale.version) != version:
                _replace(store.client, name, stale, version, kept.tags.keys() | wanted.keys())
        if alias is not None:
            store.client.set_registered_model_alias(name, alias, version)
    return version


def champion(name: str, *, store: ArtifactStore | None = None) -> Registered | None:
    """The version with alias `champion`, None when there is none."""
    return get(name, CHAMPION, store=store)


def get(name: str, alias: str, *, store: ArtifactStore | None = None) -> Registered | None:
    """The version of `name` with `alias` (or of that number), None when there is none."""
    from mlflow.exceptions import MlflowException

    store = store or _store()
    try:
        if alias.isdigit():
            found = store.client.get_model_version(name, alias)
        else:
            found = store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None
    return _registered(found, found.aliases)


def set_alias(name: str, alias: str, version: str, *, store: ArtifactStore | None = None) -> None:
    """Point `alias` of model `name` at `version`.

    Raises:
        ArtifactError: no such version.
    """
    store = store or _store()
    if get(name, version, store=store) is None:
        have = ", ".join(r.version for r in versions(name, store=store)) or "none"
        raise ArtifactError(explain(f"{name} version {version}", f"one of {have}", "choose one"))
    store.client.set_registered_model_alias(name, alias, version)


def delete_alias(name: str, alias: str, *, store: ArtifactStore | None = None) -> None:
    """Take `alias` off model `name`; nothing happens where it has none."""
    store = store or _store()
    if alias in _aliases(store.client, name):
        store.client.delete_registered_model_alias(name, alias)


def versions(name: str, *, store: ArtifactStore | None = None) -> list[Registered]:
    """Every version of `name`, newest first; empty when the model is not registered."""
    store = store or _store()
    names: dict[str, list[str]] = defaultdict(list)
    for alias, number in _aliases(store.client, name).items():
        names[number].append(alias)
    found = store.client.search_model_versions(f"name = '{_quoted(name)}'")
    ordered = sorted(found, key=lambda v: int(v.version), reverse=True)
    ours = (v for v in ordered if f"{TAG}fingerprint" in v.tags)
    return [_registered(v, names[str(v.version)]) for v in ours]


def _store() -> ArtifactStore:
    return ArtifactStore(settings())


def _quoted(name: str) -> str:
    if "'" in name:
        raise ArtifactError(explain(f"the model name {name!r}", "one without quotes", "rename it"))
    return name


def _ensure_model(client: MlflowClient, name: str) -> None:
    if not client.search_registered_models(f"name = '{_quoted(name)}'", max_results=1):
        description = "Made by relearn; see `relearn lineage`."
        if_absent(lambda: client.create_registered_model(name, description=description))


def _versions_of(client: MlflowClient, name: str, fingerprint: str) -> list[ModelVersion]:
    found = client.search_model_versions(f"name = '{_quoted(name)}'")
    return [v for v in found if v.tags.get(f"{TAG}fingerprint") == fingerprint]


def _data_uri(source: str) -> str:
    """The artifact's folder behind a version's source."""
    return source if source.endswith(f"/{DATA}") else f"{source}/{DATA}"


def _create(
    client: MlflowClient, name: str, ref: ArtifactRef, source: str, tags: Mapping[str, str]
) -> None:
    own = {
        f"{TAG}fingerprint": ref.fingerprint,
        f"{TAG}kind": ref.kind,
        f"{TAG}stage": ref.name,
        f"{TAG}parents": " ".join(ref.parents),
    }
    client.create_model_version(
        name, source=source, run_id=ref.run_id or None, tags={**tags, **own}, description=ref.label
    )


def _replace(
    client: MlflowClient, name: str, stale: ModelVersion, version: str, has: Set[str]
) -> None:
    """Move the aliases and the missing tags of a version whose files are gone, then delete it.

    has: tags of its successor.
    """
    for key, value in stale.tags.items():
        if key not in has:
            client.set_model_version_tag(name, version, key, value)
    for alias, number in _aliases(client, name).items():
        if number == str(stale.version):
            client.set_registered_model_alias(name, alias, version)
    if_present(lambda: client.delete_model_version(name, str(stale.version)))


def _tags(metrics: Mapping[str, float] | None, tags: Mapping[str, str] | None) -> dict[str, str]:
    numbers = {
        f"{METRIC_TAG}{metric_name(key)}": repr(float(value))
        for key, value in (metrics or {}).items()
    }
    return numbers | dict(tags or {})


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias -> version number. Version searches do not fill aliases in; the model does."""
    found = client.search_registered_models(f"name = '{_quoted(name)}'", max_results=1)
    return {k: str(v) for k, v in found[0].aliases.items()} if found else {}


def _registered(version: ModelVersion, aliases: Iterable[str]) -> Registered:
    tags, number = dict(version.tags), str(version.version)
    fingerprint = tags[f"{TAG}fingerprint"]
    ref = ArtifactRef(
        kind=tags[f"{TAG}kind"],
        name=tags[f"{TAG}stage"],
        version=fingerprint[:SHORT],
        uri=_data_uri(version.source),
        fingerprint=fingerprint,
        parents=tuple(tags.get(f"{TAG}parents", "").split()),
        run_id=version.run_id or "",
    )
    return Registered(
        name=version.name,
        version=number,
        ref=ref,
        metrics={
            key.removeprefix(METRIC_TAG): float(value)
            for key, value in tags.items()
            if key.startswith(METRIC_TAG)
        },
        tags={k: v for k, v in tags.items() if not k.startswith((METRIC_TAG, TAG))},
        aliases=tuple(sorted(aliases)),
    )


def nothing_of(store_name: str, what: str, *, store: ArtifactStore) -> ArtifactError:
    """That a store has no `what`, and which other stores there are."""
    models = store.client.search_registered_models(max_results=1000)
    index = "-index"  # every store has one, of this name
    names = {m.name.removesuffix(index) for m in models if m.name.endswith(index)} - {store_name}
    got = f"no {what} of {store_name} under {store.settings.home}"
    do = "relearn run --store ... first, or the deployment retrain/retrain"
    if not names:
        return ArtifactError(explain(got, f"a {what}", do))
    expected = f"a store that has one (there are {', '.join(sorted(names))})"
    return ArtifactError(explain(got, expected, f"name it with --store, or {do}"))
