"""Publishing: old or new, never a mixture; and what a killed process leaves behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lancedb.table import LanceTable

from models.errors import ArtifactError, ConfigError
from models.index import published as module
from models.index.build import build_index, measured_facts
from models.index.config import IndexConfig, RefreshConfig
from models.index.facts import IndexFacts
from models.index.lance import open_table
from models.index.nearest import NearestProducts
from models.index.published import Origin, Publication, PublishedIndex
from models.index.refresh import NEVER, refresh
from models.metrics import ListSink
from models.schemas import QUARANTINE
from models.sources.delta import Delta
from models.types import Product

ROWS = 60
DIM = 8
QUICK = IndexConfig(sample=4, batch_size=20)


def products(mark: str, count: int = ROWS) -> list[Product]:
    return [Product(f"p{i:03d}", f"{mark} thing{i}", brand=mark) for i in range(count)]


def encode(texts: Sequence[str]) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=DIM) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built indexes a .. f; every row of one says its name."""
    folder = tmp_path_factory.mktemp("sources")
    for mark in "abcdef":
        build_index(encode, products(mark), QUICK, folder / mark, ListSink())
    return folder


def origin(mark: str) -> Origin:
    return Origin(fingerprint=mark, label=f"index@{mark}", encoder="e")


def delta(mark: str, count: int = 30) -> Delta:
    return Delta(tuple(products(mark, count)), ("p059",), f"delta-{mark}", QUARANTINE.empty_table())


def marks(table: PublishedIndex) -> set[str]:
    """The brands in what is served."""
    index = table.open()
    ids, _ = index.search(np.ones((1, DIM)), 1000)
    return {p.brand for p in index.products(ids[0]).values()}


def publish_all(folder: Path, sources: Path, names: str, keep: int = 3) -> PublishedIndex:
    """A table to which indexes a, b, ... were published in turn."""
    table = PublishedIndex(folder / "published", keep)
    for name in names:
        table.publish(sources / name, origin(name), ListSink())
    return table


def test_what_is_published_is_what_was_built(tmp_path: Path, sources: Path) -> None:
    table, sink = PublishedIndex(tmp_path / "published"), ListSink()
    assert table.current() is None and table.history() == []
    made = table.publish(sources / "a", origin("a"), sink)
    assert table.current() == made and made.facts.rows == ROWS and made.previous is None
    assert sink.series("index/recall_at_10") == [1.0]
    ids, vectors = table.open().vectors()
    assert ids == [p.product_id for p in products("a")]
    assert np.array_equal(vectors, encode([f"a thing{i}" for i in range(ROWS)]))
    assert table.open().search_text("thing7", 1)[0][0] == "p007"


def test_publishing_the_served_index_again_does_nothing(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    before = table.current()
    assert table.publish(sources / "a", origin("a"), ListSink()) == before
    assert table.current() == before


def test_rollback_serves_the_version_before(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "abc")
    first, second, third = (p.version for p in reversed(table.history()))
    assert marks(table) == {"c"}
    assert table.rollback().version == second and marks(table) == {"b"}
    assert table.rollback().version == first and marks(table) == {"a"}
    with pytest.raises(ArtifactError, match="the first one published"):
        table.rollback()
    assert table.rollback(third).version == third and marks(table) == {"c"}
    with pytest.raises(ArtifactError, match=f"version 99; expected one of {first}, {second}"):
        table.rollback(99)


def test_a_refresh_can_be_taken_back_and_a_built_index_cannot(
    tmp_path: Path, sources: Path
) -> None:
    table = publish_all(tmp_path, sources, "ab", keep=6)
    with pytest.raises(ArtifactError, match=r"as built.*refreshed version.*relearn rollback"):
        table.undo_refresh()
    built = table.current()
    refresh_all(table, "wx")
    assert brands(table) == "b" * 29 + "x" * 30
    assert table.undo_refresh() == table.current() and brands(table) == "b" * 29 + "w" * 30
    refresh_all(table, "y")
    assert brands(table) == "b" * 29 + "y" * 30, "what comes after begins at what is served"
    assert table.undo_refresh() == table.current() and brands(table) == "b" * 29 + "w" * 30
    assert table.undo_refresh() == built == table.current()
    with pytest.raises(ArtifactError, match="as built"):
        table.undo_refresh()
    with pytest.raises(ArtifactError, match="nothing published"):
        PublishedIndex(tmp_path / "empty").undo_refresh()


def test_what_was_undone_does_not_come_back(tmp_path: Path, sources: Path) -> None:
    """A rollback serves an index as refreshed as it was left, not as it was before an undo."""
    table = publish_all(tmp_path, sources, "a")
    built = table.current()
    refresh_all(table, "w")
    assert table.undo_refresh() == built
    table.publish(sources / "b", origin("b"), ListSink())
    assert table.restore("a") == built == table.current() and marks(table) == {"a"}
    refresh_all(table, "w")
    assert brands(table) == "a" * 29 + "w" * 30, "the same delta can be applied again"


def test_an_index_published_again_is_no_refresh(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    refresh_all(table, "w")
    table.publish(sources / "a", origin("a"), ListSink())
    with pytest.raises(ArtifactError, match="as built"):
        table.undo_refresh()
    assert marks(table) == {"a"}


def test_an_undo_beyond_what_is_kept_says_what_to_do(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a", keep=1)
    refresh_all(table, "vwx")
    table.undo_refresh()
    with pytest.raises(ArtifactError, match=r"is gone.*apply a delta.*refresh --set refresh\.keep"):
        table.undo_refresh()
    assert brands(table) == "a" * 29 + "w" * 30


def test_after_a_rollback_the_next_publish_goes_back_to_what_was_served(
    tmp_path: Path, sources: Path
) -> None:
    table = publish_all(tmp_path, sources, "ab")
    table.rollback()
    table.publish(sources / "c", origin("c"), ListSink())
    assert marks(table) == {"c"}
    table.rollback()
    assert marks(table) == {"a"}, "b was served before a, and was rolled back"


def test_an_index_is_served_again_as_refreshed_as_it_was(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    first = table.current()
    fresh, _ = refresh(table, delta("z"), lambda _: encode, RefreshConfig(), ListSink())
    assert table.restore("a") == fresh, "what is served stays, deltas and all"
    assert table.restore("b") is None and table.current() == fresh
    table.publish(sources / "b", origin("b"), ListSink())
    assert table.restore("a") == fresh == table.current() != first
    assert brands(table) == "a" * 29 + "z" * 30
    assert {p.origin.fingerprint for p in table.history()} == {"a", "b"}, "b is kept"


def refresh_all(table: PublishedIndex, names: str) -> Publication:
    """Deltas applied in turn; what is served then."""
    for name in names:
        made, _ = refresh(table, delta(name), lambda _: encode, RefreshConfig(), ListSink())
    return made


def test_the_index_before_outlives_every_refresh_of_the_one_after(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOCK_SLACK_S", 0.3)
    table = publish_all(tmp_path, sources, "a")
    left = refresh_all(table, "uvw")
    table.publish(sources / "b", origin("b"), ListSink())
    for name in "ijklmnopqr":
        served = refresh_all(table, name)
    left_over = len(table.open().table.list_versions())
    assert left_over < served.version / 2, "what lies between the two is removed"
    assert [p.origin.fingerprint for p in table.history()] == ["b", "b", "b", "a"]

    assert table.restore("a") == left == table.current()
    assert brands(table) == "a" * 29 + "w" * 30
    assert table.open().search_text("thing40", 1)[0][0] == "p040"
    refresh_all(table, "x")
    assert brands(table) == "a" * 29 + "x" * 30
    assert table.rollback() == left and brands(table) == "a" * 29 + "w" * 30
    assert table.restore("b") == served and brands(table) == "b" * 29 + "r" * 30


def test_the_index_before_is_the_one_served_before_not_the_newest_other_one(
    tmp_path: Path, sources: Path
) -> None:
    table = publish_all(tmp_path, sources, "a")
    left = refresh_all(table, "u")
    table.publish(sources / "b", origin("b"), ListSink())
    table.restore("a")
    table.publish(sources / "c", origin("c"), ListSink())
    refresh_all(table, "xyz")
    assert table.restore("b") is None
    assert table.restore("a") == left and brands(table) == "a" * 29 + "u" * 30


def test_a_refresh_after_a_rollback_is_served_again_after_the_next_one(
    tmp_path: Path, sources: Path
) -> None:
    table = publish_all(tmp_path, sources, "ab")
    table.restore("a")
    left = refresh_all(table, "u")
    table.restore("b")
    refresh_all(table, "xyz")
    assert table.restore("a") == left and brands(table) == "a" * 29 + "u" * 30


def test_what_was_lost_with_a_removed_index_is_known(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    refresh_all(table, "uv")
    table.publish(sources / "b", origin("b"), ListSink())
    table.publish(sources / "c", origin("c"), ListSink())
    refresh_all(table, "xyz")
    assert table.restore("a") is None and table.restore("b") is not None
    assert table.lost("a") == ("delta-u", "delta-v") and table.lost("f") == ()


def test_what_is_withdrawn_is_not_served_and_can_be_again(tmp_path: Path, sources: Path) -> None:
    PublishedIndex(tmp_path / "empty").withdraw()
    table = publish_all(tmp_path, sources, "a")
    made = table.current()
    table.withdraw()
    table.withdraw()
    assert table.current() is None
    with pytest.raises(ArtifactError, match="nothing published"):
        table.open()
    assert table.restore("a") == made and marks(table) == {"a"}


def test_old_versions_go_and_their_files_with_them(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOCK_SLACK_S", 0.5)
    table = publish_all(tmp_path, sources, "ab", keep=2)
    old = table.history()[-1]
    sizes = []
    for mark in "cdef":
        time.sleep(0.6)  # what is younger than the slack stays
        table.publish(sources / mark, origin(mark), ListSink())
        files = [p for p in (table.folder / "products.lance" / "data").iterdir()]
        sizes.append(len(files))
    assert [p.origin.fingerprint for p in table.history()] == ["f", "e"]
    assert sizes[-1] == sizes[0] <= 3, "one data file a kept version, and the one it replaces"
    with pytest.raises(ArtifactError, match="expected one of"):
        table.open(old.version)
    records = {int(p.stem) for p in (table.folder / "versions").glob("*.json")}
    assert records == {p.version for p in table.history()}


def test_a_clean_up_that_fails_fails_nothing_and_is_made_up_for(
    tmp_path: Path,
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "CLOCK_SLACK_S", 0.3)
    table = publish_all(tmp_path, sources, "a", keep=2)
    real = LanceTable.optimize

    def optimize(self: LanceTable, *, cleanup_older_than: timedelta, **more: Any) -> None:
        if cleanup_older_than != NEVER:
            raise RuntimeError("no space left")
        real(self, cleanup_older_than=cleanup_older_than, **more)

    monkeypatch.setattr(LanceTable, "optimize", optimize)
    for name in "bcd":
        made = table.publish(sources / name, origin(name), ListSink())
        assert table.current() == made
    assert refresh_all(table, "x") == table.current()
    said = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 4 and "no space left" in said[-1].getMessage()
    before = len(table.open().table.list_versions())
    monkeypatch.setattr(LanceTable, "optimize", real)
    time.sleep(0.5)
    refresh_all(table, "yz")
    assert len(table.open().table.list_versions()) < before
    assert table.restore("c") is not None, "it was served before d"


class Clock:
    """A `datetime` that knows one moment."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def now(self, tz: tzinfo | None = None) -> datetime:
        """That moment; local and naive without a zone."""
        return self.moment.astimezone(tz) if tz else self.moment.astimezone().replace(tzinfo=None)


def test_a_clock_that_was_set_back_stops_no_clean_up(
    tmp_path: Path,
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = publish_all(tmp_path, sources, "ab", keep=2)
    monkeypatch.setattr(module, "datetime", Clock(datetime.now(UTC) - timedelta(hours=2)))
    table.publish(sources / "c", origin("c"), ListSink())
    assert [p.origin.fingerprint for p in table.history()] == ["c", "b"]
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.fixture
def central_europe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time with a summer's hour, whatever the machine's is."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("made", "now"),
    [("2026-10-25T00:50", "2026-10-25T01:10"), ("2026-03-29T00:59", "2026-03-29T01:19")],
    ids=["an hour that comes twice", "an hour left out"],
)
def test_the_age_of_a_version_is_elapsed_time(
    tmp_path: Path,
    sources: Path,
    monkeypatch: pytest.MonkeyPatch,
    central_europe: None,
    made: str,
    now: str,
) -> None:
    table, ages = publish_all(tmp_path, sources, "a"), []
    then, today = (datetime.fromisoformat(moment).replace(tzinfo=UTC) for moment in (made, now))
    real = LanceTable.list_versions
    stamp = datetime.fromtimestamp(then.timestamp()) + timedelta()  # as LanceDB makes them
    monkeypatch.setattr(
        LanceTable, "list_versions", lambda self: [v | {"timestamp": stamp} for v in real(self)]
    )
    monkeypatch.setattr(
        LanceTable, "optimize", lambda self, **how: ages.append(how["cleanup_older_than"])
    )
    monkeypatch.setattr(module, "datetime", Clock(today))
    table.publish(sources / "b", origin("b"), ListSink())
    assert ages == [timedelta(minutes=20, seconds=module.CLOCK_SLACK_S)]


def test_a_copy_that_fails_the_gate_is_not_served(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = publish_all(tmp_path, sources, "a")

    def worse(*args: Any, **kw: Any) -> tuple[IndexFacts, NearestProducts]:
        facts, nearest = measured_facts(*args, **kw)
        return facts.model_copy(update={"recall_at_10": 0.5}), nearest

    monkeypatch.setattr(module, "measured_facts", worse)
    with pytest.raises(
        ConfigError, match=r"got recall@10 0\.500 .*expected at least 0\.97; do this"
    ):
        table.publish(sources / "b", origin("b"), ListSink())
    assert marks(table) == {"a"}
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"60 rows .*expected 61"):
        table.publish(sources / "b", origin("b"), ListSink(), expected_rows=ROWS + 1)
    assert marks(table) == {"a"}
    table.publish(sources / "b", origin("b"), ListSink())
    assert marks(table) == {"b"} and len(table.history()) == 2


def test_tags_that_change_while_they_are_listed_are_listed_again(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LanceDB reads one tag's file after the other; a writer removes or moves some in between."""
    table = publish_all(tmp_path, sources, "ab")
    first, second = (p.version for p in reversed(table.history()))
    tags = type(open_table(table.folder).tags)
    whole = {"published": {"version": second}, f"v{first}": {"version": first}}
    mixed = {"published": {"version": first + 100}, f"v{first}": {"version": first}}
    gone = RuntimeError(f"lance error: Not found: _refs/tags/v{first}.json")
    answers: list[Any] = [mixed, gone, mixed, whole, gone, whole, whole]

    def listing(self: Any) -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(tags, "list", listing)
    current = table.current()
    assert current is not None and current.version == second
    assert len(answers) == 1, "no answer before two equal ones in a row"

    answers[:] = [gone]
    with pytest.raises(ArtifactError, match="expected two equal readings in a row"):
        table.current()


def test_a_version_removed_while_they_are_listed_is_no_history(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = publish_all(tmp_path, sources, "abc")
    oldest = table.history()[-1].version
    listed = table._tags()
    later = {name: held for name, held in listed.items() if name != f"v{oldest}"}
    table._path(oldest).unlink()
    with pytest.raises(ArtifactError, match=f"for version {oldest}"):
        table.history()  # it is kept still: its record is lost
    answers: list[dict[str, int]] = []
    monkeypatch.setattr(table, "_tags", lambda: answers.pop(0) if answers else later)
    answers.append(listed)
    assert [p.version for p in table.history()] == sorted(table._kept(later), reverse=True)
    answers.append(listed)
    with pytest.raises(ArtifactError, match=f"got version {oldest}; expected one of"):
        table.open(oldest)


def test_a_reader_sees_one_version_whole(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    held, done, seen, wrong = table.open(), threading.Event(), [], []

    def read() -> None:
        while not done.is_set():
            try:
                found = marks(table)
            except Exception as error:
                wrong.append(repr(error))
                return
            (seen if len(found) == 1 else wrong).append(str(found))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for mark in "bcd":
        table.publish(sources / mark, origin(mark), ListSink())
    table.rollback()
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert len(seen) >= 4 and len(set(seen)) >= 2, "readers ran while versions changed"
    assert len(held) == ROWS
    assert next(iter(held.products(["p000"]).values())).brand == "a", "an open index stays"


# kill -9

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import tests.unit.test_published_index as t
from models.index import build, published, refresh
from models.metrics import ListSink

def kill_at(owner, name, call, before):
    real, calls = getattr(owner, name), []
    def wrapped(*args, **kw):
        calls.append(1)
        if before and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        out = real(*args, **kw)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return out
    setattr(owner, name, wrapped)

folder, point = Path({folder!r}), {point!r}
table = published.PublishedIndex(folder / "published")
if point == "build: second batch":
    kill_at(t, "encode", 2, True)
    build.build_index(t.encode, t.products("b"), t.QUICK, folder / "b", ListSink())
elif point == "refresh: first merge":
    kill_at(refresh, "_delete", 1, True)
elif point == "refresh: before the tag":
    kill_at(published.PublishedIndex, "serve", 1, True)
elif point == "publish: rows, no indexes":
    kill_at(published, "index_all", 1, True)
elif point == "publish: before the tag":
    kill_at(published.PublishedIndex, "serve", 1, True)
elif point == "publish: after the tag":
    kill_at(published.PublishedIndex, "_move", 1, False)
if point.startswith("publish"):
    table.publish(Path({source!r}), t.origin("b"), ListSink())
elif point.startswith("refresh"):
    config = t.RefreshConfig(batch_size=10)
    refresh.refresh(table, t.delta("b"), lambda _: t.encode, config, ListSink())
"""


def killed(folder: Path, sources: Path, point: str) -> None:
    """Run the work in a process that kills itself at `point`."""
    root = str(Path(__file__).resolve().parents[2])
    code = KILLED.format(root=root, folder=str(folder), source=str(sources / "b"), point=point)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    "point",
    ["publish: rows, no indexes", "publish: before the tag", "publish: after the tag"],
)
def test_a_killed_publish_is_finished_by_the_next(
    tmp_path: Path, sources: Path, point: str
) -> None:
    table = publish_all(tmp_path, sources, "a")
    killed(tmp_path, sources, point)
    assert marks(table) == ({"b"} if point.endswith("after the tag") else {"a"})
    newest = table.open().table.list_versions()[-1]["version"]
    made = table.publish(sources / "b", origin("b"), ListSink())
    assert marks(table) == {"b"} and len(table.open()) == ROWS
    assert (made.version == newest) == (point != "publish: rows, no indexes"), "no work twice"
    assert [p.origin.fingerprint for p in table.history()] == ["b", "a"]
    assert table.rollback().origin == origin("a") and marks(table) == {"a"}


def brands(table: PublishedIndex) -> str:
    """The first letters of the rows' brands, sorted."""
    rows = table.open().products([f"p{i:03d}" for i in range(ROWS)]).values()
    return "".join(sorted(p.brand for p in rows))


def test_a_killed_refresh_is_finished_by_the_next(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    killed(tmp_path, sources, "refresh: first merge")
    assert brands(table) == "a" * ROWS
    other = PublishedIndex(shutil.copytree(table.folder, tmp_path / "copy"))
    made, counts = refresh(table, delta("b"), lambda _: encode, RefreshConfig(), ListSink())
    assert counts.encoded == 0, "the killed process had merged every row"
    assert made == table.current() and made.deltas == ("delta-b",)
    assert brands(table) == "a" * 29 + "b" * 30
    # another delta than the half-done one: nothing of that one may leak into it
    refresh(other, delta("c", count=3), lambda _: encode, RefreshConfig(), ListSink())
    assert brands(other) == "a" * 56 + "c" * 3


def test_an_interrupted_refresh_is_forgotten_once_another_index_is_published(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = publish_all(tmp_path, sources, "a")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("models.index.refresh._delete", stop)
    with pytest.raises(KeyboardInterrupt):
        refresh(table, delta("b"), lambda _: encode, RefreshConfig(), ListSink())
    monkeypatch.undo()
    table.publish(sources / "c", origin("c"), ListSink())
    table.rollback()
    refresh(table, delta("b"), lambda _: encode, RefreshConfig(), ListSink())
    assert brands(table) == "a" * 29 + "b" * 30, "nothing of c"


def test_a_refresh_killed_before_its_tag_is_only_tagged(tmp_path: Path, sources: Path) -> None:
    table = publish_all(tmp_path, sources, "a")
    killed(tmp_path, sources, "refresh: before the tag")
    assert brands(table) == "a" * ROWS
    newest = table.open().table.list_versions()[-1]["version"]
    made, _ = refresh(table, delta("b"), lambda _: encode, RefreshConfig(), ListSink())
    assert made.version == newest and brands(table) == "a" * 29 + "b" * 30


def test_a_killed_build_is_no_index_and_is_built_again(tmp_path: Path, sources: Path) -> None:
    killed(tmp_path, sources, "build: second batch")
    table = PublishedIndex(tmp_path / "published")
    with pytest.raises(ArtifactError, match="build the index again"):
        table.publish(tmp_path / "b", origin("b"), ListSink())
    build_index(encode, products("b"), QUICK, tmp_path / "b", ListSink())
    table.publish(tmp_path / "b", origin("b"), ListSink())
    assert brands(table) == "b" * ROWS
