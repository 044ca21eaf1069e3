"""The published index: one LanceDB table a store, and a tag that names the version that is served.

Consumes a built index (or a delta, see `refresh.py`) -> produces a new version of the table, and
moves the tag `published` to it once it is whole, measured and passed. The tag is one small file
that is replaced by a rename, so a reader sees the old version or the new one, never a mixture:

    <folder>/products.lance          all versions; unchanged data is shared between them
    <folder>/versions/<n>.json       Publication: what version n holds, how to search it
    <folder>/versions/<n>.npy        its probes
    <folder>/versions/<n>.parquet    their exact nearest products, for the next refresh
    <folder>/versions/left-<index>   the refreshes an index had when its last version was removed
    <folder>/pending                 the refresh that has begun to write, if any
    <folder>/undo                    the undo that has begun: versions taken back and served, if any
    <folder>/keep                    how many published versions stay, as last asked for

Order of a publish: rows -> indexes -> measured, gate -> record of the version -> tag -> clean-up. A
crash between any two leaves the tag where it was; the next run either finds the record
and moves the tag, or writes the version again. An undo is written down before its first step, and
whoever writes next takes the rest of its steps. Versions that were published and are kept carry a
tag `v<n>` of their own, which is what stops LanceDB's clean-up. That goes by age alone: nothing
younger than the oldest tagged version is removed. So when the version that a rollback goes to grows
older than the others, its rows are committed anew (the data is shared) and its tag follows them.

Writers hold a lock on the folder; readers hold none. A reader keeps the version it opened: it must
open again to see a newer one, and before `keep` further publishes have removed its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import ArtifactError, explain
from models.files import replace_bytes, replace_text
from models.index.build import index_all, measured_facts
from models.index.config import KEEP
from models.index.facts import IndexFacts
from models.index.lance import TABLE, LanceIndex, connect, open_table
from models.index.nearest import NearestProducts
from models.index.recall import check
from models.types import MetricSink

if TYPE_CHECKING:
    from lancedb.table import Table

log = logging.getLogger(__name__)
PUBLISHED = "published"
CLOCK_SLACK_S = 60.0
"""Versions this much older than the oldest kept one are removed: LanceDB reads the clock itself,
and refuses to clean up anything when a kept version counts as old."""
TAG_LISTINGS = 32
"""Times a reader lists the tags before it gives up; half a second in all."""
COPIED_ROWS = 4096
"""Rows in memory at once when an index is copied into the published table."""


class Origin(BaseModel):
    """Whose rows and vectors these are. All of it is the caller's: nothing here reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fingerprint: str
    """Identity of the built index; a part of a file's name."""
    label: str = ""
    """What people read."""
    encoder: str = ""
    """The encoder queries must be embedded with, and refreshed rows are."""
    note: str = ""


class Publication(BaseModel):
    """One version that is, was or is about to be published."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: int
    """LanceDB's number when it was made; later only the tag `v<n>` says where its rows are."""
    origin: Origin
    deltas: tuple[str, ...] = ()
    """Digests of the refreshes applied since `origin`, oldest first."""
    previous: int | None = None
    """The version that was served before this one."""
    way_back: int | None = None
    """The last version of another origin that was served before: a rollback goes there."""
    work: str
    """What made it, so that an interrupted publish is told from another one."""
    made_at: str
    facts: IndexFacts


class PublishedIndex:
    """The published table of one store.

    Args:
        keep: published versions that stay, from the next write on; the current one, its predecessor
            and the one that a rollback to the index before goes to always do. None: as many as
            before.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder, self._asked = folder, keep

    @property
    def keep(self) -> int:
        """Published versions that stay."""
        if self._asked is not None:
            return self._asked
        path = self.folder / "keep"
        return int(path.read_text(encoding="utf-8")) if path.is_file() else KEEP

    def current(self) -> Publication | None:
        """The served version, None when nothing was ever published."""
        tags = self._tags()
        kept, served = self._kept(tags), tags.get(PUBLISHED)
        return next((self._record(n) for n, held in kept.items() if held == served), None)

    def history(self) -> list[Publication]:
        """Every kept version that was served, the current one included; newest first."""
        listed = sorted(self._kept(self._tags()), reverse=True)
        return [found for v in listed if (found := self._if_kept(v)) is not None]

    def open(self, version: int | None = None) -> LanceIndex:
        """The served version (or a kept one), opened for searching.

        Raises:
            ArtifactError: nothing is published, or that version is not kept.
        """
        found = self.current() if version is None else self._known(version)
        if found is None:
            raise self._nothing()
        table = open_table(self.folder)
        table.checkout(self.held(found.version))
        return LanceIndex(table, found.facts.nprobes, found.facts.refine, found.facts.config.dim)

    def publish(
        self,
        source: Path | str,
        origin: Origin,
        sink: MetricSink,
        expected_rows: int | None = None,
    ) -> Publication:
        """Copy the index that `build_index` left in `source` (a folder, or the URI where it is kept
        now) into a new version and serve it.

        Nothing happens when it is the served one; an interrupted publish of it is finished.

        Raises:
            ArtifactError: no index in `source`. ConfigError: the copy does not pass the gate.
        """
        facts, probes_PD = IndexFacts.read(source)
        with self.writing():
            before = self.current()
            if before is not None and before.origin == origin and not before.deltas:
                log.info("published already: %s", origin.label or origin.fingerprint)
                return before
            work = f"publish {origin.fingerprint} over {before.version if before else 0}"
            found = self.finished(work)
            if found is None:
                table = self._copy(LanceIndex.open(source).table, facts)
                made, nearest = measured_facts(table, facts.kind, facts.config, probes_PD)
                check(made, facts.rows if expected_rows is None else expected_rows)
                found = self.record(table, origin, (), work, made, probes_PD, nearest)
            self.serve(found, sink)
            return found

    def restore(self, fingerprint: str) -> Publication | None:
        """Serve the newest kept version that came from the index `fingerprint`, with the refreshes
        it had; the served one stays when it did. None: no version of it is kept, nothing moved."""
        with self.writing():
            current = self.current()
            if current is not None and current.origin.fingerprint == fingerprint:
                return current
            kept = (p for p in self.history() if p.origin.fingerprint == fingerprint)
            found = next(kept, None)
            if found is not None:
                self._keep_current()
                self._move(found.version)
                log.info("version %d is published again: %s", found.version, found.origin.label)
            return found

    def lost(self, fingerprint: str) -> tuple[str, ...]:
        """Digests of the refreshes that the index `fingerprint` had when its last version was
        removed; none of an index that never was served, or is kept."""
        path = self._left(fingerprint)
        return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else ()

    def withdraw(self) -> None:
        """Serve nothing; the versions stay."""
        with self.writing():
            self._keep_current()
            tags = open_table(self.folder).tags if self._exists() else None
            if tags is not None and PUBLISHED in tags.list():
                tags.delete(PUBLISHED)

    def rollback(self, to: int | None = None) -> Publication:
        """Serve the version before the current one again, or the kept version `to`.

        Raises:
            ArtifactError: nothing is published, nothing came before, or `to` is not kept.
        """
        with self.writing():
            current = self.current()
            if current is None:
                raise self._nothing()
            target = current.previous if to is None else to
            if target is None:
                got = f"a rollback from version {current.version}, the first one published"
                raise ArtifactError(explain(got, "an earlier version", "publish another index"))
            found = self._known(target)
            self._keep_current()
            self._move(found.version)
            log.info("rolled back from version %d to %d", current.version, found.version)
            return found

    def undo_refresh(self) -> Publication:
        """Serve the version before the last refresh again, and forget the one with it: no rollback
        may come back to that. What is refreshed next begins at what is served.

        An undo that a crash cut off is finished instead, and nothing further is taken back.

        Raises:
            ArtifactError: nothing is published, the served version is as its index was built, or
                the version before is not kept.
        """
        with self._locked():
            if (served := self._finish_undo()) is not None:
                return served
            current = self.current()
            if current is None:
                raise self._nothing()
            if not current.deltas:
                built = current.origin.label or "its index"
                got = f"version {current.version}, which is {built} as built"
                do = "refresh it, or go back to the champions before: relearn rollback"
                raise ArtifactError(explain(got, "a refreshed version", do))
            before = None if current.previous is None else self._if_kept(current.previous)
            if before is None or (before.origin, before.deltas) != (
                current.origin,
                current.deltas[:-1],
            ):
                got = f"version {current.version}; the one before its last refresh is gone"
                do = (
                    "apply a delta with the right rows; how many versions stay from a refresh on "
                    "says relearn refresh --set refresh.keep=N"
                )
                raise ArtifactError(explain(got, "a kept version without that refresh", do))
            replace_text(self._undo, json.dumps([current.version, before.version]))
            self._finish_undo()
            return before

    # ------------------------------------------------------------ for writers, under the lock

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock; the system frees it when the process dies. An undo that a crash
        cut off is finished first."""
        with self._locked():
            self._finish_undo()
            yield

    def finished(self, work: str) -> Publication | None:
        """The newest version, when `work` made it and it only lacks the tag."""
        if not self._exists():
            return None
        version = int(open_table(self.folder).version)
        if not self._path(version).is_file():
            return None
        found = self._record(version)
        return found if found.work == work else None

    def record(
        self,
        table: Table,
        origin: Origin,
        deltas: tuple[str, ...],
        work: str,
        facts: IndexFacts,
        probes_PD: np.ndarray,
        nearest: NearestProducts,
    ) -> Publication:
        """Write down the newest version; it is not served yet."""
        before, way_back = self.current(), None
        if before is not None:
            same = before.origin.fingerprint == origin.fingerprint
            way_back = before.way_back if same else before.version
        made = Publication(
            version=int(table.version),
            origin=origin,
            deltas=deltas,
            previous=before.version if before else None,
            way_back=way_back,
            work=work,
            made_at=datetime.now().astimezone().isoformat(timespec="seconds"),
            facts=facts,
        )
        probes = io.BytesIO()
        np.save(probes, probes_PD)
        replace_bytes(self._path(made.version).with_suffix(".npy"), probes.getvalue())
        nearest.write(self._path(made.version).with_suffix(".parquet"))
        replace_text(self._path(made.version), made.model_dump_json(indent=1))
        return made

    def serve(self, made: Publication, sink: MetricSink) -> None:
        """Move the tag to a recorded version, then remove versions beyond the kept ones.

        Removing is no part of the move: where it fails, a warning says so and the next one does it.
        """
        self._keep_current()
        self._move(made.version)
        self.pending.unlink(missing_ok=True)
        log.info("version %d is published: %s", made.version, made.origin.label)
        sink.log({f"index/{name}": value for name, value in made.facts.numbers().items()})
        try:
            self._prune()
        except Exception as error:
            log.warning(
                "version %d is served, but older ones could not be removed: %s: %s; the next "
                "publish or refresh tries again. If that fails too, check the clock, the free "
                "space and the permissions of %s",
                made.version,
                type(error).__name__,
                error,
                self.folder,
            )

    def held(self, version: int) -> int:
        """LanceDB's number of the version that holds the rows of a published one."""
        return self._kept(self._tags()).get(version, version)

    @property
    def pending(self) -> Path:
        """Names the refresh whose rows the newest, unpublished version holds in part."""
        return self.folder / "pending"

    def probes(self, version: int) -> np.ndarray:
        """The probes a version was measured with [P, D]."""
        return np.load(self._path(version).with_suffix(".npy"), allow_pickle=False)

    def nearest(self, version: int) -> NearestProducts:
        """What is known of the probes' exact neighbours in a version."""
        path = self._path(version).with_suffix(".parquet")
        return NearestProducts.read(path, self.probes(version))

    # ------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock

        (self.folder / "versions").mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "writer.lock"):
            if self._asked is not None:
                replace_text(self.folder / "keep", str(self._asked))
            yield

    @property
    def _undo(self) -> Path:
        return self.folder / "undo"

    def _finish_undo(self) -> Publication | None:
        """Take the steps of the undo that was written down, those taken before as well; returns
        what is served then. None: no undo was begun."""
        if not self._undo.is_file():
            return None
        undone, before = json.loads(self._undo.read_text(encoding="utf-8"))
        self._move(before)
        tags = open_table(self.folder).tags
        if f"v{undone}" in tags.list():
            tags.delete(f"v{undone}")
        for kind in (".json", ".npy", ".parquet"):
            self._path(undone).with_suffix(kind).unlink(missing_ok=True)
        self._undo.unlink()
        log.info("the refresh to version %d is undone, version %d is served", undone, before)
        return self._record(before)

    def _copy(self, source: Table, facts: IndexFacts) -> Table:
        """The source's rows as a new version with indexes of its own; older versions stay."""
        self.pending.unlink(missing_ok=True)
        rows = source.search().limit(None).to_batches(COPIED_ROWS)
        wanted = pa.RecordBatchReader.from_batches(source.schema, iter(rows))
        table = connect(self.folder).create_table(TABLE, data=wanted, mode="overwrite")
        index_all(table, facts.kind, facts.config)
        return table

    def _exists(self) -> bool:
        """Whether any version was ever committed."""
        return any((self.folder / f"{TABLE}.lance" / "_versions").glob("*.manifest"))

    def _tags(self) -> dict[str, int]:
        """{tag: LanceDB's number}, as they stood at one moment.

        LanceDB lists the tags' names and then reads one after the other: a tag that a writer
        removes in between fails the listing, one that it moves mixes before and after. So readers,
        who hold no lock, list until two listings in a row agree.
        """
        if not self._exists():
            return {}
        tags, before, failed = open_table(self.folder).tags, None, None
        for attempt in range(TAG_LISTINGS):
            try:
                listed = {name: int(tag["version"]) for name, tag in tags.list().items()}
            except RuntimeError as error:  # LanceDB has no class of its own for it
                before, failed = None, error
            else:
                if listed == before:
                    return listed
                before = listed
            time.sleep(0.001 * attempt)
        got = f"tags in {self.folder} that changed during each of {TAG_LISTINGS} readings"
        do = "check that files there can be read, and try again"
        raise ArtifactError(explain(got, "two equal readings in a row", do)) from failed

    def _kept(self, tags: Mapping[str, int]) -> dict[int, int]:
        """{version: LanceDB's number of the one that holds its rows now}."""
        kept = {int(n[1:]): held for n, held in tags.items() if n[0] == "v" and n[1:].isdigit()}
        served = tags.get(PUBLISHED)
        if served is not None and served not in kept.values():
            kept[served] = served
        return kept

    def _keep_current(self) -> None:
        """Give the served version a tag of its own before `published` leaves it."""
        tags = self._tags()
        served = tags.pop(PUBLISHED, None)
        if served is not None and served not in tags.values():
            open_table(self.folder).tags.create(f"v{served}", served)

    def _move(self, version: int) -> None:
        tags, held = open_table(self.folder).tags, self.held(version)
        if PUBLISHED in tags.list():
            tags.update(PUBLISHED, held)
        else:
            tags.create(PUBLISHED, held)

    def _prune(self) -> None:
        """Drop the tags and records of versions beyond the kept ones, then their files."""
        kept, current = self._kept(self._tags()), self.current()
        assert current is not None, "called after the tag was moved"
        way_back = self._way_back(kept, current)
        newest = sorted(kept)[-self.keep :]
        stay = {v for v in kept if v in (*newest, current.version, current.previous, way_back)}
        table = open_table(self.folder)
        for version in sorted(kept.keys() - stay):
            found = self._record(version)
            replace_text(self._left(found.origin.fingerprint), json.dumps(found.deltas))
            table.tags.delete(f"v{version}")
        for path in (self.folder / "versions").iterdir():
            if path.stem.isdigit() and int(path.stem) not in stay:
                path.unlink()
        if way_back is not None and all(kept[way_back] <= kept[v] for v in stay):
            kept[way_back] = self._committed_anew(way_back)
        # local and naive; in the hour that comes twice it may read one hour too early, which keeps
        made = {v["version"]: v["timestamp"].astimezone(UTC) for v in table.list_versions()}
        age = datetime.now(UTC) - min(made[kept[v]] for v in stay)
        age = max(age, timedelta()) + timedelta(seconds=CLOCK_SLACK_S)
        table.optimize(cleanup_older_than=age, delete_unverified=True)

    def _way_back(self, kept: Mapping[int, int], current: Publication) -> int | None:
        """The kept version that a rollback to another index goes to, None when there is none."""
        if current.way_back is not None and current.way_back in kept:
            back = self._record(current.way_back).origin.fingerprint
            return max(v for v in kept if self._record(v).origin.fingerprint == back)
        mine = current.origin.fingerprint
        others = (v for v in kept if self._record(v).origin.fingerprint != mine)
        return max(others, default=None)

    def _committed_anew(self, version: int) -> int:
        """A new LanceDB version with the rows and indexes of a published one; takes its tag."""
        table = open_table(self.folder)
        table.checkout(self.held(version))
        table.restore()
        table.tags.update(f"v{version}", int(table.version))
        return int(table.version)

    def _left(self, fingerprint: str) -> Path:
        return self.folder / "versions" / f"left-{fingerprint}"

    def _path(self, version: int) -> Path:
        return self.folder / "versions" / f"{version}.json"

    def _record(self, version: int) -> Publication:
        try:
            return Publication.model_validate_json(self._path(version).read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            what = str(error).splitlines()[0]
            raise ArtifactError(
                explain(f"{what} for version {version}", "its record", "publish the index again")
            ) from None

    def _if_kept(self, version: int) -> Publication | None:
        """The record of a version that was listed; None when it has been removed since."""
        try:
            return self._record(version)
        except ArtifactError:
            if version in self._kept(self._tags()):
                raise
            return None

    def _known(self, version: int) -> Publication:
        kept = self._kept(self._tags())
        found = self._if_kept(version) if version in kept else None
        if found is None:
            have = ", ".join(map(str, sorted(kept.keys() - {version}))) or "none"
            raise ArtifactError(explain(f"version {version}", f"one of {have}", "choose one"))
        return found

    def _nothing(self) -> ArtifactError:
        got = f"nothing published in {self.folder}"
        return ArtifactError(explain(got, "a published index", "run `relearn run` first"))
