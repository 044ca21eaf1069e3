"""The published index of a store: publish, serve, refresh, open.

Consumes index artifacts and catalogue deltas -> moves the tag `published` of the store's one table
under `<home>/published/<store>`. Which index is served is the registry's word: `tasks/release.py`
calls `serve` in every move of the champions, and in its repair. Only a refresh makes a version that
the registry does not know; it keeps the origin, so it counts as the champion's index.
Not stages: what is served is a state, and a state is never cached.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ArtifactError, ConfigError, explain
from models.metrics import NullSink
from models.types import MetricSink
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.base import stored_weights
from tasks.lineage import find_artifact
from tasks.registry import nothing_of
from tasks.settings import settings

if TYPE_CHECKING:
    from models.index.config import RefreshConfig
    from models.index.difference import Difference
    from models.index.lance import LanceIndex
    from models.index.published import Publication, PublishedIndex
    from models.index.refresh import Changes, RefreshCounts
    from models.sources.delta import Delta

log = logging.getLogger(__name__)
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
    return table.publish(artifacts.place(ref), origin, sink or NullSink())


def serve(store_name: str, ref: ArtifactRef | None, *, artifacts: ArtifactStore) -> None:
    """Bring what is published in line with the champion index `ref`; None: there is no champion.

    What is served stays when it came from `ref`, with every refresh it had. Otherwise the newest
    kept version that came from `ref` is served again, as refreshed as it was when it was left, and
    without one the artifact, as it was built. Of the index served before this one a version is
    always kept. Deltas applied to another index since are not in these rows: their texts have other
    vectors there. `relearn refresh` brings them in again, and what the artifact as built lacks.

    Raises:
        As `publish`.
    """
    table = _table(store_name, artifacts)
    if ref is None:
        return table.withdraw()
    before = table.current()
    applied = set() if before is None else set(before.deltas)
    now = table.restore(ref.fingerprint)
    if now is None:
        applied |= set(table.lost(ref.fingerprint))
        now = publish(store_name, ref, artifacts=artifacts)
    if missing := applied - set(now.deltas):
        log.warning(
            "%s is served without %d refreshes that it or the index before had; apply them again: "
            "relearn refresh --store %s --data DIR",
            now.origin.label,
            len(missing),
            store_name,
        )


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
    encoding: str = "utf-8",
    artifacts: ArtifactStore | None = None,
    sink: MetricSink | None = None,
) -> tuple[Publication, RefreshCounts]:
    """Apply the products delta in `folder` to the published index and serve the result.

    encoding: of a CSV.

    Raises:
        ArtifactError: nothing is published, or its encoder is gone. DataContractError: the delta
            cannot be read. ConfigError: the result does not pass the gate.
    """
    from models.sources.delta import read_delta

    artifacts = artifacts or ArtifactStore(settings())
    if published(store_name, artifacts=artifacts) is None:
        raise _nothing(store_name, artifacts)
    return _apply(store_name, read_delta(folder, encoding), config, artifacts, sink)


def refresh_to(
    store_name: str,
    catalogue: ArtifactRef,
    config: RefreshConfig,
    *,
    artifacts: ArtifactStore | None = None,
    sink: MetricSink | None = None,
) -> tuple[Publication, RefreshCounts]:
    """Make the published index hold the products of the store `catalogue`, no other ones but those
    whose rows are in the store's quarantine: they stay as they were.

    Raises:
        As `refresh`. ConfigError: more than `config.max_deleted` of the products would go.
    """
    artifacts = artifacts or ArtifactStore(settings())
    folder = artifacts.path(catalogue)
    table = _table(store_name, artifacts)

    def delta(base: Publication) -> Delta:
        return _difference(table, base, folder).delta(config.max_deleted)

    return _apply(store_name, delta, config, artifacts, sink)


def undo_refresh(store_name: str, *, artifacts: ArtifactStore | None = None) -> Publication:
    """Serve the version before the last refresh of the published index again.

    Raises:
        ArtifactError: nothing is published, or the served version is no refresh.
    """
    artifacts = artifacts or ArtifactStore(settings())
    table = _table(store_name, artifacts)
    if table.current() is None:
        raise _nothing(store_name, artifacts)
    return table.undo_refresh()


def staleness(
    store_name: str, catalogue: ArtifactRef, *, artifacts: ArtifactStore | None = None
) -> tuple[Publication, Difference]:
    """What is served, and how it differs from the products of the store `catalogue`.

    Raises:
        ArtifactError: nothing is published.
    """
    artifacts = artifacts or ArtifactStore(settings())
    table = _table(store_name, artifacts)
    current = table.current()
    if current is None:
        raise _nothing(store_name, artifacts)
    return current, _difference(table, current, artifacts.path(catalogue))


def _difference(table: PublishedIndex, served: Publication, catalogue: Path) -> Difference:
    """How the version `served` differs from the products in the folder of a store artifact."""
    import pyarrow.parquet as pq

    from models.index.difference import difference
    from models.schemas import QUARANTINE_FILE
    from models.store import stream_products

    products, _ = stream_products(catalogue / "store")
    path = catalogue / QUARANTINE_FILE
    quarantine = pq.read_table(path) if path.is_file() else None
    chars = served.facts.config.max_text_chars
    return difference(table.open(served.version), products, chars, quarantine)


def _apply(
    store_name: str,
    delta: Delta | Changes,
    config: RefreshConfig,
    artifacts: ArtifactStore,
    sink: MetricSink | None,
) -> tuple[Publication, RefreshCounts]:
    from models.index.refresh import refresh as apply

    table = _table(store_name, artifacts, config.keep)  # the table remembers what was asked for
    encoder_of = partial(_lazy_encoder, artifacts)
    return apply(table, delta, encoder_of, config, sink or NullSink())


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
    store_name: str, artifacts: ArtifactStore | None, keep: int | None = None
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
    return nothing_of(store_name, "published index", store=artifacts)
