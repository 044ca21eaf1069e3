"""Artifacts: what crosses a task boundary, how it is identified, and the MLflow store behind it.

Consumes stage identities and finished folders -> produces `ArtifactRef`s. One MLflow run holds one
artifact:

    <run>/artifacts/data/...        the files of the artifact (ArtifactRef.uri points here)
    <run>/artifacts/manifest.json   identity, and every file with size and sha256; written last

An artifact exists when its run is FINISHED, carries the fingerprint, and every file of the manifest
is there and whole. Everything else is missing, with a reason, and is made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlparse

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from models.errors import ArtifactError, ConfigError, explain
from models.files import replace_text
from tasks.blank import mlflow_database
from tasks.faults import Patient, if_absent, patiently, probe, sqlite_file
from tasks.processes import start_of
from tasks.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MANIFEST = "manifest.json"
DATA = "data"
TAG = "relearn."
SHA_BYTES = 1 << 20
"""Files up to this size are checked by sha256 whenever an artifact is served, larger ones by size:
a cached stage must cost milliseconds, and a cut-off write changes the size."""
SHORT = 12
"""Hex digits of a fingerprint that people read."""
IN_PLACE = ("s3",)
DIED = "the process died"
"""Why a run is given up whose process is gone."""
HISTORY = 20
"""Runs of the same stage looked at to explain what changed."""

Json = Any
"""Whatever `json` round-trips."""


class ArtifactRef(BaseModel):
    """A pointer to one immutable artifact; the only thing that crosses a task boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """What it holds: store, model, index, report ..."""
    name: str
    """The stage that made it."""
    version: str
    """The fingerprint's first 12 digits: what people read."""
    uri: str
    """Folder of its files. Circumstance: the same artifact made again lies elsewhere."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    parents: tuple[str, ...] = ()
    """The artifacts it was made from, each "name@fingerprint12"."""
    run_id: str = ""
    """MLflow run that made it."""

    @property
    def label(self) -> str:
        """`name@fingerprint12`, as written in parents, logs and reports."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Identity:
    """What a stage's result depends on.

    config: per input its JSON form. parents: per input the fingerprint(s), in the input's own form
    (one, a list, a mapping). labels: per parent "name@fingerprint12", keyed like "pairs" or
    "scores.0".
    """

    stage: str
    code_version: str
    config: Mapping[str, Json]
    parents: Mapping[str, Json]
    labels: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over stage, code version, config and parents' fingerprints.

        Independent of the order of keys; `labels` do not enter (they follow from `parents`).

        Raises:
            ConfigError: a value JSON cannot hold (NaN, a set, bytes).
        """
        content = {
            "stage": self.stage,
            "code_version": self.code_version,
            "config": self.config,
            "parents": self.parents,
        }
        try:
            text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                explain(f"{error} in the config of {self.stage}", "JSON values", "use plain types")
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> dict[str, Json]:
        """The form kept in manifests."""
        return {
            "stage": self.stage,
            "code_version": self.code_version,
            "config": dict(self.config),
            "parents": dict(self.labels),
            "fingerprint": self.fingerprint,
        }


def identify(stage: str, code_version: str, inputs: Mapping[str, object]) -> Identity:
    """Sort `inputs` into parents (anything made of ArtifactRefs) and config (everything else).

    Raises:
        ConfigError: a Path (a place is not an identity), or a value that is no JSON.
    """
    config: dict[str, Json] = {}
    parents: dict[str, Json] = {}
    labels: dict[str, str] = {}
    for name, value in inputs.items():
        refs = dict(refs_in(name, value))
        if refs:
            parents[name] = _parent_form(name, value)
            labels |= {key: ref.label for key, ref in refs.items()}
        else:
            config[name] = _config_form(name, value)
    return Identity(stage, code_version, config, parents, labels)


def refs_in(name: str, value: object) -> Iterator[tuple[str, ArtifactRef]]:
    """Every ArtifactRef in an input, keyed by its place: "pairs", "scores.0", "rows.bm25"."""
    if isinstance(value, ArtifactRef):
        yield name, value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from refs_in(f"{name}.{key}", value[key])
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from refs_in(f"{name}.{index}", item)


def _parent_form(name: str, value: object) -> Json:
    if isinstance(value, ArtifactRef):
        return value.fingerprint
    if isinstance(value, Mapping):
        return {str(key): _parent_form(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_parent_form(name, item) for item in value]
    if value is None:
        return None
    raise ConfigError(
        explain(f"{name} mixing artifacts and {value!r}", "artifacts or config", "split the input")
    )


def _config_form(name: str, value: object) -> Json:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        raise ConfigError(
            explain(
                f"the path {value} as input {name}",
                "content: a place is circumstance, not identity",
                "pass folder_digest(path) as the input and the path through Settings",
            )
        )
    if isinstance(value, Mapping):
        return {str(key): _config_form(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_config_form(name, item) for item in value]
    return value


def flatten(config: Mapping[str, Json]) -> dict[str, Json]:
    """Nested config -> dotted keys; an input called "config" gives its fields without a prefix,
    unless another input has the same name.

    >>> flatten({"config": {"beta": 0.1, "lora": {"r": 8}}, "seed": 1})
    {'beta': 0.1, 'lora.r': 8, 'seed': 1}
    >>> flatten({"config": {"seed": 0}, "seed": 1})
    {'config.seed': 0, 'seed': 1}
    """
    dotted = dict(_dotted(config, ""))
    out: dict[str, Json] = {}
    for key, value in dotted.items():
        short = key.removeprefix("config.")
        out[key if short in dotted else short] = value
    return out


def _dotted(value: Json, path: str) -> Iterator[tuple[str, Json]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _dotted(item, f"{path}.{key}" if path else key)
    else:
        yield path, value


def differences(now: Mapping[str, Json], before: Mapping[str, Json]) -> list[str]:
    """What changed between two identities (as `Identity.as_json`), one phrase each.

    >>> differences(
    ...     {"code_version": "1", "config": {"dpo": {"beta": 0.2}}, "parents": {}},
    ...     {"code_version": "1", "config": {"dpo": {"beta": 0.1}}, "parents": {}},
    ... )
    ['config changed: dpo.beta 0.1 -> 0.2']
    """
    out = []
    if now["code_version"] != before["code_version"]:
        out.append(f"code changed: version {before['code_version']} -> {now['code_version']}")
    new, old = flatten(now["config"]), flatten(before["config"])
    for key in sorted(new.keys() | old.keys()):
        if new.get(key, _ABSENT) != old.get(key, _ABSENT):
            shown = f"{_brief(old.get(key, _ABSENT))} -> {_brief(new.get(key, _ABSENT))}"
            out.append(f"config changed: {key} {shown}")
    new, old = now["parents"], before["parents"]
    for key in sorted(new.keys() | old.keys()):
        if new.get(key) != old.get(key):
            name = str(new.get(key) or old[key]).split("@")[0]
            what = "changed" if key in new and key in old else "added" if key in new else "removed"
            out.append(f"parent {name} {what}")
    return out


_ABSENT = "(absent)"


def _brief(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Lookup:
    """What the store knows about a fingerprint: a whole artifact, or why there is none."""

    ref: ArtifactRef | None
    reason: str = ""
    made: str = ""
    """When the artifact was made, local time, "2026-11-21 06:30:12"."""


def folder_digest(path: Path) -> str:
    """sha256 over the names and bytes of a file or of every file below a folder.

    The identity of raw input: pass it as a stage's input beside `Settings.data_dir`.

    Raises:
        ArtifactError: nothing there.
    """
    if not path.exists():
        raise ArtifactError(explain(f"no {path}", "a file or folder", "check --data"))
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        total.update(f"{name}\0{_sha256(file)}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def local_path(uri: str) -> Path | None:
    """The path of a file URI (or plain path), else None."""
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return Path(uri) if not parsed.scheme else None


@functools.lru_cache(maxsize=8)
def open_client(uri: str, home: Path, blanks_dir: Path) -> MlflowClient:
    """A client of the tracking store; two processes never create its tables at once."""
    import mlflow.store.db.utils
    from mlflow import MlflowClient

    # `patiently` tries again, and says it in a line: MLflow would take minutes over a database
    # that cannot be opened, and log a traceback each time that one is locked
    mlflow.store.db.utils.MAX_RETRY_COUNT = 1
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with FileLock(_lock_file(home, "mlflow")):
        if (file := sqlite_file(uri)) is not None:
            probe(file)
            if not file.is_file() or not file.stat().st_size:
                mlflow_database(file, blanks_dir)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # creates the tables of a server database
    return client


def _lock_file(home: Path, name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ConfigError(explain(f"the name {name!r}", "letters, digits, - and _", "fix --store"))
    folder = home / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.lock"


@dataclass(frozen=True)
class ArtifactStore:
    """The artifacts of one tracking store; new ones go into `settings.experiment`."""

    settings: Settings

    @property
    def client(self) -> MlflowClient:
        """The MLflow client of the tracking store, opened once a process.

        Its calls wait out faults that pass; those that stay are a StoreError (tasks/faults.py).
        """
        current = self.settings
        where = current.tracking_uri, current.home, current.blanks_dir
        inner = patiently(lambda: open_client(*where), current)
        return cast("MlflowClient", Patient(inner, current))

    @property
    def experiment_id(self) -> str:
        """Id of `settings.experiment`, made with an absolute artifact location if missing."""
        name = self.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with FileLock(self.lock_file("mlflow")):
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    location = f"{self.settings.artifact_uri.rstrip('/')}/{name}"
                    if_absent(
                        lambda: self.client.create_experiment(name, artifact_location=location)
                    )
                    found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise ArtifactError(
                explain(f"deleted experiment {name}", "an active one", "mlflow experiments restore")
            )
        return found.experiment_id

    def lock_file(self, name: str) -> Path:
        """File that processes on this machine lock to do `name` one at a time."""
        return _lock_file(self.settings.home, name)

    def scratch(self, fingerprint: str) -> Path:
        """Checkpoint folder of an artifact in the making."""
        return self.settings.home / "scratch" / fingerprint[:32]

    def search(self, condition: str, limit: int = HISTORY) -> list[Run]:
        """Runs that satisfy an MLflow filter, in all experiments, newest first."""
        ids = [e.experiment_id for e in self.client.search_experiments()]
        order = ["attributes.start_time DESC"]
        return list(self.client.search_runs(ids, condition, max_results=limit, order_by=order))

    def find(self, fingerprint: str) -> Lookup:
        """The whole artifact with this fingerprint, or why there is none ("" when never made)."""
        condition = f"tags.`{TAG}fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
        reason = ""
        for run in self.search(condition):
            trouble = self.damage(run)
            if not trouble:
                when = time.localtime(run.info.end_time / 1000)
                return Lookup(self.ref(run), made=time.strftime("%Y-%m-%d %H:%M:%S", when))
            reason = reason or trouble
        return Lookup(None, reason)

    def damage(self, run: Run) -> str:
        """What is wrong with a finished run's files, "" when nothing is."""
        manifest = self.manifest(run)
        if manifest is None:
            return f"files missing: {MANIFEST} of run {run.info.run_id}"
        root = local_path(run.info.artifact_uri)
        if root is None:
            return self._remote_damage(run, manifest["files"])
        for name, entry in manifest["files"].items():
            path = root / DATA / name
            if not path.is_file():
                return f"files missing: {name}"
            if path.stat().st_size != entry["bytes"]:
                return (
                    f"files altered: {name} has {path.stat().st_size} bytes, not {entry['bytes']}"
                )
            if "sha256" in entry and _sha256(path) != entry["sha256"]:
                return f"files altered: {name} has another content"
        return ""

    def _remote_damage(self, run: Run, files: Mapping[str, Mapping[str, Json]]) -> str:
        """Names and sizes only: content is not fetched to be checked."""
        sizes = dict(self._remote_sizes(run.info.run_id, DATA)) if files else {}
        for name, entry in files.items():
            got = sizes.get(f"{DATA}/{name}")
            if got is None:
                return f"files missing: {name}"
            if got != entry["bytes"]:
                return f"files altered: {name} has {got} bytes, not {entry['bytes']}"
        return ""

    def _remote_sizes(self, run_id: str, folder: str) -> Iterator[tuple[str, int]]:
        for item in self.client.list_artifacts(run_id, folder):
            if item.is_dir:
                yield from self._remote_sizes(run_id, item.path)
            else:
                yield item.path, item.file_size

    def manifest(self, run: Run) -> dict[str, Json] | None:
        """The run's manifest, or None when there is none or it cannot be read."""
        root = local_path(run.info.artifact_uri)
        path = self._remote_manifest(run.info.run_id) if root is None else root / MANIFEST
        try:
            manifest = json.loads(path.read_text()) if path else None
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and "files" in manifest else None

    def _remote_manifest(self, run_id: str) -> Path | None:
        """The manifest, fetched; None: the store answers and holds none."""
        from mlflow.exceptions import MlflowException

        folder = self.settings.home / "cache" / "manifests" / run_id
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return Path(self.client.download_artifacts(run_id, MANIFEST, str(folder)))
        except (MlflowException, OSError):
            # how a missing file is said differs from store to store; a list is the same everywhere
            if any(item.path == MANIFEST for item in self.client.list_artifacts(run_id)):
                raise
            return None

    def ref(self, run: Run) -> ArtifactRef:
        """The reference of a finished run, from its tags."""
        tags = run.data.tags
        fingerprint = tags[f"{TAG}fingerprint"]
        return ArtifactRef(
            kind=tags[f"{TAG}kind"],
            name=tags[f"{TAG}stage"],
            version=fingerprint[:SHORT],
            uri=f"{run.info.artifact_uri}/{DATA}",
            fingerprint=fingerprint,
            parents=tuple(dict.fromkeys(json.loads(tags[f"{TAG}parents"]).values())),
            run_id=run.info.run_id,
        )

    def commit(self, run_id: str, folder: Path, identity: Identity) -> ArtifactRef:
        """Move `folder` into the run, write the manifest last, finish the run.

        A local artifact root receives the files by rename when it is on the same disk: no copy.
        """
        manifest = identity.as_json() | {"files": describe(folder)}
        uri = self.client.get_run(run_id).info.artifact_uri
        root = local_path(uri)
        if root is None:
            self.client.log_artifacts(run_id, str(folder), DATA)
            self.client.log_text(run_id, json.dumps(manifest, indent=1), MANIFEST)
        else:
            root.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, root / DATA)
            replace_text(root / MANIFEST, json.dumps(manifest, indent=1))
        self.client.set_terminated(run_id, "FINISHED")
        return self.ref(self.client.get_run(run_id))

    def path(self, ref: ArtifactRef) -> Path:
        """A local folder with the files of `ref`; fetched once when the store is remote.

        Raises:
            ArtifactError: the files are not there any more.
        """
        local = local_path(ref.uri)
        if local is not None and local.is_dir():
            return local
        if local is not None:
            raise ArtifactError(
                explain(
                    f"no files of {ref.label} at {local}",
                    "the folder it was written to",
                    "run the pipeline again: a missing artifact is made again",
                )
            )
        return self._download(ref)

    def place(self, ref: ArtifactRef) -> Path | str:
        """The URI of `ref` where LanceDB and Arrow read it in place, else as `path`."""
        return ref.uri if urlparse(ref.uri).scheme in IN_PLACE else self.path(ref)

    def _download(self, ref: ArtifactRef) -> Path:
        import mlflow

        target = self.settings.home / "cache" / ref.fingerprint[:32]
        with FileLock(self.lock_file(f"cache-{ref.fingerprint[:32]}")):
            if not target.is_dir():
                partial = target.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                patiently(
                    lambda: mlflow.artifacts.download_artifacts(
                        artifact_uri=ref.uri,
                        dst_path=str(partial),
                        tracking_uri=self.settings.tracking_uri,
                    ),
                    self.settings,
                )
                inner = partial / DATA
                (inner if inner.is_dir() else partial).rename(target)
                shutil.rmtree(partial, ignore_errors=True)
        return target

    def why(self, identity: Identity) -> str:
        """Why an artifact that was never made is made now: what differs from the nearest run.

        Of the last runs of the same stage the one with the fewest differences is compared with.
        """
        condition = f"tags.`{TAG}stage` = '{identity.stage}' and attributes.status = 'FINISHED'"
        now = identity.as_json()
        found = [
            differences(now, manifest)
            for run in self.search(condition)
            if (manifest := self.manifest(run)) is not None and not self._beside(run)
        ]
        nearest = min(filter(None, found), key=len, default=["first time"])
        return "; ".join(nearest)

    def _beside(self, run: Run) -> bool:
        """Whether it belongs to the pipeline run that asks: nothing changed between the two."""
        parent = run.data.tags.get("mlflow.parentRunId")
        return parent is not None and parent == self.settings.pipeline_run

    def settle_dead(self) -> int:
        """Mark the runs of processes that died on this machine KILLED; returns how many.

        The record of a move of champions is none of them: it is carried out, not given up.
        """
        own = f"tags.`{TAG}process` LIKE '{socket.gethostname()} %'"
        dead = [
            run
            for run in self.search(f"{own} and attributes.status = 'RUNNING'", 1000)
            if not is_running(run.data.tags[f"{TAG}process"])
        ]
        for run in dead:
            self._give_up(run)
        return len(dead)

    def _give_up(self, run: Run, why: str = DIED) -> None:
        if self.client.get_run(run.info.run_id).info.status != "RUNNING":
            return  # it ended after it was listed
        self.client.set_tag(run.info.run_id, f"{TAG}error", why)
        self.client.set_terminated(run.info.run_id, "KILLED")

    def forget_unfinished(self, fingerprint: str, host: str, why: str = DIED) -> int:
        """Mark runs of a process that died on this machine KILLED; returns how many.

        Call it holding the fingerprint's lock: then no other living process can own them.
        """
        condition = f"tags.`{TAG}fingerprint` = '{fingerprint}' and attributes.status = 'RUNNING'"
        stale = [r for r in self.search(condition) if r.data.tags.get(f"{TAG}host") == host]
        for run in stale:
            self._give_up(run, why)
        return len(stale)


def this_process() -> str:
    """`<host> <pid> <start time>`: a pid alone is used again."""
    return f"{socket.gethostname()} {os.getpid()} {start_of(os.getpid())}"


def is_running(process: str) -> bool:
    """Whether a process of this machine, as `this_process` named it, still runs."""
    _, pid, start = process.rsplit(" ", 2)
    return start_of(int(pid)) == start


def describe(folder: Path) -> dict[str, dict[str, Json]]:
    """Every file below `folder`: size, and sha256 of the small ones.

    Raises:
        ArtifactError: a link: it could point outside and change under the artifact.
    """
    out: dict[str, dict[str, Json]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(explain(f"the link {path}", "plain files", "copy its target"))
        if path.is_file():
            size = path.stat().st_size
            entry: dict[str, Json] = {"bytes": size}
            if size <= SHA_BYTES:
                entry["sha256"] = _sha256(path)
            out[path.relative_to(folder).as_posix()] = entry
    return out
