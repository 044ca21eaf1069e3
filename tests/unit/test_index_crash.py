"""A crash before any change of the disk: what is served stays whole, the next run ends the work.

Every call that changes a file is counted, and the n-th one raises instead of happening; n goes from
the first to the last. `kill -9` in the middle of such a call is in test_published_index.py.
"""

from __future__ import annotations

import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.errors import ArtifactError
from models.index import refresh
from models.index.build import build_index
from models.index.config import IndexConfig, RefreshConfig
from models.index.lance import LanceIndex
from models.index.nearest import NearestProducts
from models.index.published import Origin, PublishedIndex
from models.metrics import ListSink
from models.schemas import QUARANTINE
from models.sources.delta import Delta
from models.types import Product

ROWS, DIM = 30, 8
CONFIG = IndexConfig(kind="ivf_flat", sample=4, batch_size=10)
WRITES = {
    "lancedb.db.LanceDBConnection": ["create_table"],
    "lancedb.table.LanceTable": ["create_index", "drop_index", "delete", "restore", "optimize"],
    "lancedb.table.Tags": ["create", "update", "delete"],
    "lancedb.merge.LanceMergeInsertBuilder": ["execute"],
    "numpy": ["save"],
    "pathlib.Path": ["unlink", "replace"],
    "pyarrow.parquet": ["write_table"],
    "shutil": ["rmtree"],
}


class Crash(BaseException):
    """A process that dies."""


def products(mark: str, count: int = ROWS) -> list[Product]:
    return [Product(f"p{i:03d}", f"{mark} thing{i}", brand=mark) for i in range(count)]


def encode(texts: Any) -> np.ndarray:
    """A vector that depends on the text alone."""
    rows = np.stack([np.random.default_rng(list(t.encode())).normal(size=DIM) for t in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def origin(mark: str) -> Origin:
    return Origin(fingerprint=mark, label=mark, encoder="e")


def delta(mark: str, count: int) -> Delta:
    """`count` products renamed, the last of the catalogue deleted."""
    return Delta(tuple(products(mark, count)), ("p029",), mark, QUARANTINE.empty_table())


def apply(table: PublishedIndex, change: Delta, size: int = 8) -> None:
    refresh.refresh(table, change, lambda _: encode, RefreshConfig(batch_size=size), ListSink())


def brands(index: LanceIndex) -> str:
    """One letter a row, sorted."""
    found = index.products([p.product_id for p in products("")])
    return "".join(sorted(p.brand for p in found.values()))


def check_neighbours(table: PublishedIndex) -> None:
    """Of every kept version, what is known of its probes' neighbours is of that version's rows."""
    for made in table.history():
        known = table.nearest(made.version)
        true = NearestProducts.scan(table.open(made.version).vector_batches(), known.probes_PD)
        assert known.ids, made
        for row, scores, whole, cosines in zip(
            known.ids, known.scores, true.ids, true.scores, strict=False
        ):
            assert row == whole[: len(row)], made
            assert scores == pytest.approx(cosines[: len(row)], abs=1e-6)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built indexes a and b, and a table that serves a and served b before."""
    folder = tmp_path_factory.mktemp("start")
    table = PublishedIndex(folder / "published", keep=2)
    for mark in "ba":
        build_index(encode, products(mark), CONFIG, folder / mark, ListSink())
        table.publish(folder / mark, origin(mark if mark == "a" else "old"), ListSink())
    return folder


def crash_at(number: int, work: Callable[[], object]) -> tuple[list[str], bool]:
    """Run `work`; its `number`-th change of the disk raises. What happened, and if it ended."""
    happened: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kw: Any) -> Any:
            if len(happened) == number:
                raise Crash
            happened.append(name)
            return real(*args, **kw)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in WRITES.items():
            for name in names:
                real = pkgutil.resolve_name(f"{owner}.{name}")
                short = f"{owner.rsplit('.', 1)[-1]}.{name}"
                patch.setattr(f"{owner}.{name}", counted(short, real))
        try:
            work()
        except Crash:
            return happened, False
    return happened, True


def every_crash(
    start: Path, folder: Path, work: Callable[[Path], object]
) -> Iterator[tuple[Path, list[str], bool]]:
    """A copy of `start` a crash, after it: folder, changes before it, and if there was none."""
    ended, number = False, 0
    while not ended:
        copy = shutil.copytree(start, folder / str(number))
        happened, ended = crash_at(number, lambda copy=copy: work(copy))
        yield copy, happened, ended
        shutil.rmtree(copy)
        number += 1


def test_publish(start: Path, tmp_path: Path) -> None:
    def publish(folder: Path) -> None:
        table = PublishedIndex(folder / "published", keep=2)
        table.publish(folder / "b", origin("b"), ListSink())

    for folder, happened, _ in every_crash(start, tmp_path, publish):
        table = PublishedIndex(folder / "published", keep=2)
        moved = "Tags.update" in happened
        assert brands(table.open()) == ("b" if moved else "a") * ROWS, happened
        publish(folder)
        assert brands(table.open()) == "b" * ROWS
        assert [p.origin.fingerprint for p in table.history()][:2] == ["b", "a"]
        assert table.current().facts.unindexed_rows == 0  # type: ignore[union-attr]
        check_neighbours(table)
    assert happened.count("LanceTable.create_index") == 1 + 1 + 4
    assert {"LanceDBConnection.create_table", "Tags.create", "Tags.delete"} <= {*happened}


def test_refresh(start: Path, tmp_path: Path) -> None:
    """Twice: again with the same delta, and with another one, into which nothing may leak."""
    for folder, happened, _ in every_crash(
        start, tmp_path, lambda f: apply(PublishedIndex(f / "published", keep=2), delta("b", 20))
    ):
        table = PublishedIndex(folder / "published", keep=2)
        moved = "Tags.update" in happened
        assert brands(table.open()) == ("a" * 9 + "b" * 20 if moved else "a" * ROWS), happened
        other = PublishedIndex(shutil.copytree(table.folder, folder / "copy"), keep=2)
        apply(table, delta("b", 20))
        made = table.current()
        assert made is not None and made.deltas == ("b",)
        assert brands(table.open()) == "a" * 9 + "b" * 20
        assert (made.facts.rows, made.facts.unindexed_rows) == (29, 0)
        # every row of this delta is written after the last training, before the crash or after
        assert made.facts.rows_since == 0 and made.facts.trained_rows == 29
        apply(other, delta("c", 3))
        check_neighbours(table)
        check_neighbours(other)
        assert brands(other.open()) == ("a" * 9 + "b" * 17 if moved else "a" * 26) + "c" * 3
    assert happened.count("LanceMergeInsertBuilder.execute") == 3
    assert {"LanceTable.delete", "LanceTable.optimize", "Tags.create"} <= {*happened}


def test_refresh_whose_rows_join_the_partitions(start: Path, tmp_path: Path) -> None:
    """Few enough rows that the vector index is not trained anew, neither at once nor afterwards."""
    new = Product("p030", "d thing30", brand="d")
    few = Delta((*products("d", 3), new), ("p029",), "d", QUARANTINE.empty_table())

    def refresh_few(folder: Path) -> None:
        apply(PublishedIndex(folder / "published", keep=2), few, size=2)

    for folder, happened, _ in every_crash(start, tmp_path, refresh_few):
        table = PublishedIndex(folder / "published", keep=2)
        moved = "Tags.update" in happened
        assert brands(table.open()) == ("a" * 26 + "d" * 3 if moved else "a" * ROWS), happened
        other = PublishedIndex(shutil.copytree(table.folder, folder / "copy"), keep=2)
        again, ended = crash_at(100, lambda folder=folder: refresh_few(folder))
        assert ended and "LanceTable.create_index" not in [*happened, *again]
        made = table.current()
        assert made is not None and made.deltas == ("d",)
        facts = made.facts
        assert (facts.rows, facts.trained_rows, facts.rows_since) == (ROWS - 1 + 1, ROWS, 4)
        assert (facts.unindexed_rows, facts.recall_at_10) == (0, 1.0)
        ids = ["p028", "p029", "p030"]
        found = {p.product_id: p.brand for p in table.open().products(ids).values()}
        assert found == {"p028": "a", "p030": "d"}
        assert table.open().search(encode(["d thing30"]), 1)[0] == [["p030"]], (
            "found through its partition"
        )
        apply(other, Delta(tuple(products("e", 2)), (), "e", QUARANTINE.empty_table()))
        rest = "a" * 26 + "d" if moved else "a" * 28
        assert brands(other.open()) == rest + "ee", "nothing of the one that died"
        check_neighbours(table)
        check_neighbours(other)
    assert happened.count("LanceMergeInsertBuilder.execute") == 2


@pytest.fixture(scope="module")
def refreshed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table that serves a after the refreshes w and x; b was served in between."""
    folder = shutil.copytree(start, tmp_path_factory.mktemp("refreshed") / "start")
    table = PublishedIndex(folder / "published", keep=4)
    apply(table, delta("w", 10))
    apply(table, delta("x", 5))
    table.restore("old")
    table.restore("a")
    return folder


def test_undo_of_a_refresh(refreshed: Path, tmp_path: Path) -> None:
    """Finished by a repeated undo, which may die as well, or by the next refresh; and no more than
    that one refresh is taken back."""
    with_x, without_x = "a" * 19 + "w" * 5 + "x" * 5, "a" * 19 + "w" * 10

    def undo(folder: Path) -> None:
        PublishedIndex(folder / "published", keep=4).undo_refresh()

    for folder, happened, ended in every_crash(refreshed, tmp_path, undo):
        table = PublishedIndex(folder / "published", keep=4)
        begun, moved = happened.count("Path.replace") == 2, "Tags.update" in happened
        assert brands(table.open()) == (without_x if moved else with_x), happened
        other = PublishedIndex(shutil.copytree(table.folder, folder / "copy"), keep=4)
        if not ended:
            crash_at(2, lambda folder=folder: undo(folder))
            undo(folder)
        made = table.current()
        assert made is not None and made.deltas == ("w",), happened
        assert brands(table.open()) == without_x, happened
        table.restore("old")
        assert table.restore("a") == made, "what was undone is not restored"
        assert [p.deltas for p in table.history()] == [("w",), (), ()]
        files = [*(table.folder / "versions").iterdir()]
        assert len(files) == 3 * 3, "a record, its probes, their neighbours"
        check_neighbours(table)
        apply(other, delta("y", 1))
        wanted = ("w", "y") if begun else ("w", "x", "y")
        assert other.current().deltas == wanted, happened  # type: ignore[union-attr]
        rest = without_x[:-1] if begun else with_x[:-1]
        assert brands(other.open()) == rest + "y", happened
        check_neighbours(other)
    assert happened[2:] == ["Tags.update", "Tags.delete"] + ["Path.unlink"] * 4


def test_a_delta_applied_again_after_an_undo(start: Path, tmp_path: Path) -> None:
    """Where the first time died between its tag and its end, the undone version's number is used
    again; nothing of the undone one is."""

    few = Delta(tuple(products("v", 3)), (), "v", QUARANTINE.empty_table())

    def refresh_few(folder: Path) -> None:
        apply(PublishedIndex(folder / "published", keep=2), few)

    reused = set()
    for folder, happened, _ in every_crash(start, tmp_path, refresh_few):
        if "Tags.update" not in happened:
            continue
        table = PublishedIndex(folder / "published", keep=2)
        first = table.current()
        table.undo_refresh()
        refresh_few(folder)
        made = table.current()
        assert first is not None and made is not None and made.deltas == ("v",)
        reused.add(made.version == first.version)
        assert brands(table.open()) == "a" * 27 + "v" * 3
        check_neighbours(table)
    assert reused == {True, False}


def test_a_delta_that_changes_nothing(refreshed: Path, tmp_path: Path) -> None:
    """What is served keeps its record, and its way back."""
    same = Delta(tuple(products("x", 5)), (), "same", QUARANTINE.empty_table())

    def refresh_same(folder: Path) -> None:
        apply(PublishedIndex(folder / "published", keep=4), same)

    for folder, happened, _ in every_crash(refreshed, tmp_path, refresh_same):
        table = PublishedIndex(folder / "published", keep=4)
        before = table.current()
        refresh_same(folder)
        assert before is not None and table.current() == before, happened
        assert not table.pending.exists()
        assert table.undo_refresh().deltas == ("w",)
    assert happened == ["Path.replace", "Path.replace", "Path.unlink"]


MOVES: dict[str, tuple[Callable[[PublishedIndex], object], str]] = {
    "rollback": (PublishedIndex.rollback, "b"),
    "restore": (lambda table: table.restore("old"), "b"),
    "withdraw": (PublishedIndex.withdraw, ""),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_of_what_is_served(start: Path, tmp_path: Path, name: str) -> None:
    """The last step is the move; before it the versions are only kept."""
    move, mark = MOVES[name]

    def moved_in(folder: Path) -> None:
        move(PublishedIndex(folder / "published", keep=2))

    for folder, happened, ended in every_crash(start, tmp_path, moved_in):
        table = PublishedIndex(folder / "published", keep=2)
        assert ended or brands(table.open()) == "a" * ROWS, happened
        if not ended:
            moved_in(folder)
        assert (brands(table.open()) if table.current() else "") == mark * ROWS
        assert {p.origin.fingerprint for p in table.history()} == {"a", "old"}
        assert table.restore("a") is not None and brands(table.open()) == "a" * ROWS
    last = "Tags.delete" if name == "withdraw" else "Tags.update"
    assert happened == ["Path.replace", "Tags.create", last]


def test_build_over_an_older_index(start: Path, tmp_path: Path) -> None:
    """Whole or refused: a half-written table never comes with the facts of the one before."""

    def build(folder: Path) -> None:
        build_index(encode, products("c", 20), CONFIG, folder / "a", ListSink())

    for folder, happened, ended in every_crash(start, tmp_path, build):
        try:
            found = brands(LanceIndex.open(folder / "a"))
            assert found == ("c" * 20 if ended else "a" * ROWS), happened
            assert ended or happened == []
        except ArtifactError:
            assert not ended
        build(folder)
        assert brands(LanceIndex.open(folder / "a")) == "c" * 20
    assert ended and happened[-1] == "Path.replace"
