"""What a home holds: MLflow's sqlite file, manifests and bytes, read without relearn's own code.

Only LanceDB tables are opened by it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lancedb.table import Table

TIMED = re.compile(
    r"^stage/|latency|duration|(_s|_ms|per_s|step_time|rollout_share)$"
    r"|^judge/pairs_computed$|^judge_cache/hit_rate$"
)
"""Metrics that two undisturbed runs do not share, and those of the judge's cache on disk, which
keeps what a killed run had computed."""
DATED = "data_docs/"
"""Great Expectations' pages hold the time of the validation."""
TABLE = "products.lance"
"""LanceDB draws names; its rows are compared instead."""


@dataclass
class State:
    """Everything is keyed by content, so that two homes compare.

    artifacts: fingerprint -> {file: sha256}; metrics: fingerprint -> {name: last value};
    versions: model -> fingerprints in order of their numbers; champions: model -> fingerprint;
    published: store -> (fingerprint, sha256 of the served rows).
    """

    stages: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, dict[str, str]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    versions: dict[str, list[str]] = field(default_factory=dict)
    champions: dict[str, str] = field(default_factory=dict)
    published: dict[str, tuple[str, str]] = field(default_factory=dict)

    def differences(self, other: State) -> list[str]:
        """What differs from `other`, a phrase each."""
        out = []
        for fingerprint in sorted(self.artifacts.keys() ^ other.artifacts.keys()):
            name = self.stages.get(fingerprint) or other.stages[fingerprint]
            out.append(f"{name}@{fingerprint[:12]} is in one of the two homes alone")
        for fingerprint in sorted(self.artifacts.keys() & other.artifacts.keys()):
            name = f"{self.stages[fingerprint]}@{fingerprint[:12]}"
            files = _unequal(self.artifacts[fingerprint], other.artifacts[fingerprint])
            numbers = _unequal(self.metrics[fingerprint], other.metrics[fingerprint])
            out += [f"{name}: other content in {', '.join(files[:5])}"] if files else []
            out += [f"{name}: other metrics {', '.join(numbers[:5])}"] if numbers else []
        for what in ("versions", "champions", "published"):
            if getattr(self, what) != getattr(other, what):
                out.append(f"{what}: {getattr(self, what)} instead of {getattr(other, what)}")
        return out


def _unequal(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    return sorted(k for k in one.keys() | two.keys() if one.get(k) != two.get(k))


def read(home: Path, at_rest: bool) -> tuple[State, list[str]]:
    """The state, and what is wrong with it.

    at_rest: nothing runs or was cut off: no run may be open and nothing lie in staging.
    """
    state, wrong = State(), []
    database = home / "mlflow.db"
    if not database.is_file() or not database.stat().st_size:
        return state, wrong
    with closing(sqlite3.connect(database, timeout=60)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'model_versions'").fetchone():
            return state, wrong  # killed while the tables were made
        wrong += _artifacts(db, state)
        wrong += _versions(db, state)
        open_runs = db.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()[0]
    if at_rest:
        wrong += [f"{open_runs} runs are still RUNNING"] if open_runs else []
        for folder in ("work", "scratch"):
            left = [p.name for p in (home / folder).glob("*")]
            wrong += [f"{folder}/ still holds {', '.join(left)}"] if left else []
        wrong += [f"{p} is left" for p in home.glob("cache/*.partial")]
        wrong += _published(home, state)
    return state, wrong


def _artifacts(db: sqlite3.Connection, state: State) -> list[str]:
    wrong = []
    rows = db.execute(
        "SELECT r.run_uuid, f.value, s.value, r.artifact_uri FROM runs r"
        " JOIN tags f ON f.run_uuid = r.run_uuid AND f.key = 'relearn.fingerprint'"
        " JOIN tags s ON s.run_uuid = r.run_uuid AND s.key = 'relearn.stage'"
        " WHERE r.status = 'FINISHED'"
    ).fetchall()
    for fingerprint, count in Counter(row[1] for row in rows).items():
        if count > 1:
            wrong.append(f"{fingerprint[:12]} was made {count} times")
    for run, fingerprint, stage, uri in rows:
        root = Path(uri.removeprefix("file://"))
        files, trouble = _whole(root)
        wrong += [f"{stage}@{fingerprint[:12]}: {t}" for t in trouble]
        state.stages[fingerprint] = stage
        state.artifacts[fingerprint] = files
        numbers = db.execute("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", (run,))
        state.metrics[fingerprint] = {k: v for k, v in numbers if not TIMED.search(k)}
    return wrong


def _whole(root: Path) -> tuple[dict[str, str], list[str]]:
    """Digests of an artifact's files, and what its manifest says otherwise."""
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return {}, [f"no manifest ({error})"]
    digests, wrong = {}, []
    present = {
        p.relative_to(root / "data").as_posix() for p in (root / "data").rglob("*") if p.is_file()
    }
    wrong += [f"{n} is not in the manifest" for n in sorted(present - manifest.keys())]
    for name, entry in manifest.items():
        if name not in present:
            wrong.append(f"{name} is missing")
            continue
        raw = (root / "data" / name).read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        if len(raw) != entry["bytes"] or digest != entry.get("sha256", digest):
            wrong.append(f"{name} is not what the manifest says")
        if name == "index.json":
            digest = _untimed(raw)
        if not name.startswith((DATED, f"{TABLE}/")):
            digests[name] = digest
    if (root / "data" / TABLE).is_dir():
        from models.index.lance import open_table

        digests[TABLE] = rows_digest(open_table(root / "data"))
    return digests, wrong


def _untimed(raw: bytes) -> str:
    facts = {k: v for k, v in json.loads(raw).items() if not TIMED.search(k)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _versions(db: sqlite3.Connection, state: State) -> list[str]:
    wrong = []
    rows = db.execute(
        "SELECT v.name, v.version, t.value FROM model_versions v JOIN model_version_tags t"
        " ON t.name = v.name AND t.version = v.version AND t.key = 'relearn.fingerprint'"
        " WHERE v.current_stage != 'Deleted_Internal' ORDER BY v.name, v.version"
    ).fetchall()
    for model, _, fingerprint in rows:
        state.versions.setdefault(model, []).append(fingerprint)
        if fingerprint not in state.artifacts:
            wrong.append(f"a version of {model} has no finished artifact")
    for model, found in state.versions.items():
        if len(set(found)) < len(found):
            wrong.append(f"{model} has a version twice")
    number = {(model, version): fingerprint for model, version, fingerprint in rows}
    aliases = db.execute(
        "SELECT name, version FROM registered_model_aliases WHERE alias = 'champion'"
    )
    state.champions = {m: number.get((m, int(v)), f"version {v}, gone") for m, v in aliases}
    return wrong


def _published(home: Path, state: State) -> list[str]:
    from models.errors import ArtifactError
    from models.index.published import PublishedIndex

    wrong = []
    for folder in sorted((home / "published").glob("*")):
        table = PublishedIndex(folder)
        try:
            current = table.current()
        except ArtifactError as error:
            wrong.append(f"{folder.name}: {error}")
            continue
        if current is None:
            wrong.append(f"nothing of {folder.name} is published")
            continue
        rows = table.open().table.count_rows()
        if rows != current.facts.rows:
            wrong.append(f"{folder.name} serves {rows} rows, not {current.facts.rows}")
        if table.pending.exists():
            wrong.append(f"{table.pending} is left")
        if state.champions.get(f"{folder.name}-index") != current.origin.fingerprint:
            wrong.append(f"{folder.name} serves another index than the champion")
        state.published[folder.name] = (
            current.origin.fingerprint,
            rows_digest(table.open().table),
        )
    return wrong


def rows_digest(table: Table) -> str:
    """sha256 over the rows of a LanceDB table, in the order of their product ids."""
    rows = table.to_arrow().sort_by("product_id")
    total = hashlib.sha256()
    for batch in rows.combine_chunks().to_batches():
        total.update(json.dumps(batch.to_pylist(), sort_keys=True, default=str).encode())
    return total.hexdigest()
