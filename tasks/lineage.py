"""Where a model comes from: the chain of artifacts below it, down to the raw files.

Consumes the name of a registered model or an artifact -> produces a `rich` tree.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from models.errors import ArtifactError, explain
from tasks import registry
from tasks.artifacts import SHORT, TAG, ArtifactRef, ArtifactStore, flatten
from tasks.registry import Registered
from tasks.settings import settings

if TYPE_CHECKING:
    from mlflow.entities import Run
    from rich.tree import Tree

SHOWN_FIELDS = 6
"""Config fields shown a stage."""
_SAFE = re.compile(r"[\w.\-]+")


def lineage(name: str, *, store: ArtifactStore | None = None) -> Tree:
    """The tree of `name`: a registered model ("judge", "judge@candidate", "judge/3"), else the
    newest artifact of a stage ("judge_dpo") or one artifact ("judge_dpo@0123456789ab").

    A registered model without alias or number is its champion, else its newest version.

    Raises:
        ArtifactError: nothing has that name; the message lists what there is.
    """
    from rich.tree import Tree

    store = store or ArtifactStore(settings())
    model = _model(store, name)
    run = run_of(store, model.ref.label if model else name)
    if run is None:
        known = ", ".join(_known(store)) or "nothing yet"
        raise ArtifactError(explain(f"the name {name!r}", f"one of {known}", "choose one"))
    tree = Tree(_title(model)) if model else Tree(_line(store, run))
    if model:
        _grow(store, tree.add(_line(store, run)), run, {})
    else:
        _grow(store, tree, run, {})
    return tree


def find_artifact(label: str, *, store: ArtifactStore | None = None) -> ArtifactRef:
    """The artifact "stage@fingerprint prefix", or the newest one of a stage.

    Raises:
        ArtifactError: no finished run made it, or its run was deleted.
    """
    store = store or ArtifactStore(settings())
    run = run_of(store, label)
    if run is None:
        raise ArtifactError(explain(f"no run that made {label}", "one in MLflow", "make it again"))
    return store.ref(run)


def _grow(store: ArtifactStore, node: Tree, run: Run, seen: dict[str, int]) -> None:
    """Add the parents of `run`; an artifact that appears again is named, not repeated."""
    parents = store.ref(run).parents
    for label in parents:
        parent = run_of(store, label)
        if parent is None:
            node.add(f"{label} [red](no run: deleted from MLflow)[/red]")
        elif label in seen:
            node.add(f"{label} [dim](see above)[/dim]")
        else:
            seen[label] = 1
            _grow(store, node.add(_line(store, parent)), parent, seen)


def _model(store: ArtifactStore, name: str) -> Registered | None:
    base, _, which = name.replace("/", "@").partition("@")
    if not _SAFE.fullmatch(base):
        return None
    if which:
        return registry.get(base, which, store=store)
    every = registry.versions(base, store=store)
    best = next((r for r in every if registry.CHAMPION in r.aliases), None)
    return best or next(iter(every), None)


def run_of(store: ArtifactStore, label: str) -> Run | None:
    """The newest finished run of a stage, or of "stage@fingerprint prefix"."""
    stage, _, prefix = label.partition("@")
    if not _SAFE.fullmatch(stage) or (prefix and not re.fullmatch("[0-9a-f]+", prefix)):
        return None
    condition = f"tags.`{TAG}stage` = '{stage}' and attributes.status = 'FINISHED'"
    if prefix:
        condition += f" and tags.`{TAG}fingerprint` LIKE '{prefix}%'"
    return next(iter(store.search(condition, limit=1)), None)


def _title(model: Registered) -> str:
    aliases = " ".join(f"@{a}" for a in model.aliases)
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in sorted(model.metrics.items()))
    return f"[bold]{model.name} version {model.version}[/bold] {aliases}  [dim]{numbers}[/dim]"


def _line(store: ArtifactStore, run: Run) -> str:
    """One artifact: label, when, how long, on which commit, and what identifies it."""
    from rich.markup import escape

    ref, manifest = store.ref(run), store.manifest(run)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.info.end_time / 1000))
    seconds = (run.info.end_time - run.info.start_time) / 1000
    commit = run.data.tags.get("mlflow.source.git.commit", "")[:SHORT]
    fields = flatten(manifest["config"]) if manifest else {}
    shown = [f"{k}={v}" for k, v in list(fields.items())[:SHOWN_FIELDS]]
    more = f", and {len(fields) - len(shown)} more" if len(fields) > len(shown) else ""
    trouble = store.damage(run)
    return "".join(
        [
            f"[cyan]{escape(ref.label)}[/cyan] {ref.kind}, {when}, {seconds:.1f} s",
            f", commit {commit}" if commit else "",
            f"\n[dim]{escape(', '.join(shown))}{more}[/dim]" if shown else "",
            f"\n[red]{escape(trouble)}[/red]" if trouble else "",
        ]
    )


def _known(store: ArtifactStore) -> list[str]:
    models = [m.name for m in store.client.search_registered_models()]
    runs = store.search(f"tags.`{TAG}stage` != '' and attributes.status = 'FINISHED'", limit=200)
    return sorted({*models, *(r.data.tags[f"{TAG}stage"] for r in runs)})
