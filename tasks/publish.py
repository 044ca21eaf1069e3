"""The published index of a store: publish, refresh, roll back, open.

Consumes index artifacts and catalogue deltas -> moves the tag `published` of the store's one table
under `<home>/published/<store>`. Independent of registry aliases: whoever moves an alias calls
`publish` or `rollback` as well. Not stages: what is served is a state, and a state is never cached.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ArtifactError, ConfigError, explain
from models.index.config import RefreshConfig
from models.metrics import NullSink
from models.types import MetricSink
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.base import stored_weights
from tasks.lineage import find_artifact
from tasks.settings import settings

if TYPE_CHECKING:
    from models.index.lance import LanceIndex
    from models.index.published import Publication, PublishedIndex
    from models.index.refresh import RefreshCounts

INDEX_KIND = "index"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def publish(
    store_name: str,
    ref: ArtifactRef,
    *,
    artifacts: ArtifactStore | None = None,
    sink: MetricSink | None = None,
) -> Publication:
    """Serve the index `ref` from now on: copied, measured again, and only then tagged.

    Nothing happens when it is served already; an interrupted publish is finished.

    Raises:
        ArtifactError: not an index, or its files are gone. ConfigError: it does not pass its gate;
            what was served before still is.
    """
    from models.index.published import Origin

    artifacts = artifacts or ArtifactStore(settings())
    if ref.kind != INDEX_KIND:
        raise ArtifactError(explain(f"{ref.label}, a {ref.kind}", "an index", "pass the index"))
    origin = Origin(
        fingerprint=ref.fingerprint, label=ref.label, encoder=_encoder_of(artifacts, ref)
    )
    table = _table(store_name, artifacts)
    return table.publish(artifacts.path(ref), origin, sink or NullSink())


def rollback(
    store_name: str, to: int | None = None, *, artifacts: ArtifactStore | None = None
) -> Publication:
    """Serve the version before the current one again, or the kept version `to`.

    Raises:
        ArtifactError: there is no such version; the message lists those there are.
    """
    return _table(store_name, artifacts).rollback(to)


def published(store_name: str, *, artifacts: ArtifactStore | None = None) -> Publication | None:
    """What is served: version, origin (fingerprint, label, encoder) and facts; None: nothing."""
    return _table(store_name, artifacts).current()


def history(store_name: str, *, artifacts: ArtifactStore | None = None) -> list[Publication]:
    """Every version that can be rolled back to, and the current one; newest first."""
    return _table(store_name, artifacts).history()


def refresh(
    store_name: str,
    folder: Path,
    config: RefreshConfig,
    *,
    artifacts: ArtifactStore | None = None,
    sink: MetricSink | None = None,
) -> tuple[Publication, RefreshCounts]:
    """Apply the products delta in `folder` to the published index and serve the result.

    Raises:
        ArtifactError: nothing is published, or its encoder is gone. DataContractError: the delta
            cannot be read. ConfigError: the result does not pass the gate.
    """
    from models.index.refresh import refresh as apply
    from models.sources.delta import read_delta

    artifacts = artifacts or ArtifactStore(settings())
    table = _table(store_name, artifacts, config.keep)
    current = table.current()
    if current is None:
        raise _nothing(store_name, artifacts)
    delta = read_delta(folder)
    encode = _lazy_encoder(artifacts, current.origin.encoder)
    return apply(table, delta, encode, config, sink or NullSink())


def open_published(
    store_name: str, *, artifacts: ArtifactStore | None = None
) -> tuple[LanceIndex, str]:
    """The served index, and the weights that queries must be embedded with.

    Raises:
        ArtifactError: nothing is published, or the encoder's files are gone.
    """
    artifacts = artifacts or ArtifactStore(settings())
    table = _table(store_name, artifacts)
    current = table.current()
    if current is None:
        raise _nothing(store_name, artifacts)
    encoder = find_artifact(current.origin.encoder, store=artifacts)
    return table.open(current.version), stored_weights(artifacts, encoder)


def _table(
    store_name: str, artifacts: ArtifactStore | None, keep: int = RefreshConfig().keep
) -> PublishedIndex:
    from models.index.published import PublishedIndex

    if not _NAME.fullmatch(store_name):
        got = f"the store name {store_name!r}"
        raise ConfigError(explain(got, "lower-case letters, digits, - and _", "fix --store"))
    current = artifacts.settings if artifacts else settings()
    return PublishedIndex(current.home / "published" / store_name, keep)


def _encoder_of(artifacts: ArtifactStore, ref: ArtifactRef) -> str:
    """Label of the encoder an index was built with, from its manifest."""
    found = artifacts.find(ref.fingerprint)
    manifest = artifacts.manifest(artifacts.client.get_run(found.ref.run_id)) if found.ref else None
    if manifest is None or "encoder" not in manifest["parents"]:
        why = found.reason or "no encoder among its parents"
        raise ArtifactError(explain(f"{ref.label}: {why}", "a whole index", "build it again"))
    return str(manifest["parents"]["encoder"])


def _lazy_encoder(artifacts: ArtifactStore, label: str) -> Callable[[Sequence[str]], Any]:
    """The encoder behind `label`, loaded when the first text needs it: many deltas have none."""
    loaded: list[Callable[[Sequence[str]], Any]] = []

    def encode(texts: Sequence[str]) -> Any:
        if not loaded:
            from models.embedder.encoder import document_encoder, load_encoder

            weights = stored_weights(artifacts, find_artifact(label, store=artifacts))
            model = load_encoder(weights, artifacts.settings.torch_device)
            loaded.append(document_encoder(model, bf16=True))
        return loaded[0](texts)

    return encode


def _nothing(store_name: str, artifacts: ArtifactStore) -> ArtifactError:
    got = f"no published index of {store_name} under {artifacts.settings.home}"
    return ArtifactError(explain(got, "a published index", "run `relearn run --store ...` first"))
