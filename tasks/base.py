"""Base models: a named set of weights as an artifact that points at it, or a tiny built one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from models.errors import explain
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.settings import settings
from tasks.stage import StageContext, stage

TINY = "tiny"
"""Name of the random models that the smoke recipe builds from the store's own text."""


def base_content(name: str) -> str:
    """Identity of the weights behind `name`; "" for tiny ones, which are built from the store."""
    if name == TINY:
        return ""
    from models.lm.weights import fingerprint, resolve

    return fingerprint(resolve(name, settings().weights_dir))


@stage(name="base_model", kind="base", code_version="1")
def base_model(
    ctx: StageContext,
    name: str,
    role: Literal["judge", "embedder"],
    content: str,
    store: ArtifactRef | None = None,
) -> None:
    """Point at the weights `name`; for `tiny`, build random ones with a tokenizer of the store."""
    (ctx.out / "base.json").write_text(json.dumps({"name": name, "content": content}))
    if name != TINY:
        return
    from models.store import Store
    from models.text import product_text

    assert store is not None, explain("no store for a tiny model", "a store", "pass one")
    data = Store.read(ctx.open(store) / "store")
    corpus = [product_text(p) for p in list(data.product_by_id.values())[:2000]]
    corpus += [q.text for q in data.query_by_id.values()]
    if role == "embedder":
        from models.embedder.tiny import build_tiny_encoder

        build_tiny_encoder(ctx.out / "weights", corpus)
        return
    from models.lm.tiny import build_tiny_lm
    from models.teacher.template import write

    corpus += [write(pair, "respond_then_think") for pair in data.pairs("train")[:2000]]
    build_tiny_lm(ctx.out / "weights", corpus)


def weights_path(ctx: StageContext, ref: ArtifactRef) -> str:
    """Folder or hub id of the weights that `ref` holds or points at."""
    return stored_weights(ctx.store, ref)


def stored_weights(store: ArtifactStore, ref: ArtifactRef) -> str:
    """The same, outside a stage."""
    return weights_in(store.path(ref), ref.name, store.settings.weights_dir)


def weights_in(folder: Path, stage_name: str, weights_dir: Path) -> str:
    """The same, of the artifact that the stage `stage_name` left in `folder`."""
    if stage_name != "base_model":
        return str(folder)
    if (folder / "weights").is_dir():
        return str(folder / "weights")
    from models.lm.weights import resolve

    name = json.loads((folder / "base.json").read_text())["name"]
    return resolve(name, weights_dir)
