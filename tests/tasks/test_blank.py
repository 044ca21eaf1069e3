"""Empty databases that are made once and copied."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tasks import blank


def tables(file: Path) -> list[tuple[str]]:
    with sqlite3.connect(file) as database:
        return database.execute("SELECT name FROM sqlite_master").fetchall()


def made(path: Path) -> None:
    """A database in the journal mode that Prefect sets."""
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (x)")
    database.commit()
    database.close()


def unmade(path: Path) -> None:
    raise AssertionError(f"{path} is made again")


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one" / "a.db", tmp_path / "two" / "a.db"


def test_the_second_home_gets_a_copy(tmp_path: Path, homes: tuple[Path, Path]) -> None:
    one, two = homes
    assert blank._copied("prefect", made, one, tmp_path / "blanks")
    with sqlite3.connect(one) as database:
        database.execute("INSERT INTO t VALUES (1)")
    assert blank._copied("prefect", unmade, two, tmp_path / "blanks")
    assert [p.name for p in two.parent.iterdir()] == ["a.db"], "whole, and nothing beside it"
    assert tables(two) == [("t",)]
    with sqlite3.connect(two) as database:
        assert database.execute("SELECT count(*) FROM t").fetchone() == (0,)


@pytest.mark.parametrize("content", [b"", b"not a database", None])
def test_a_damaged_one_is_made_again(
    tmp_path: Path, homes: tuple[Path, Path], content: bytes | None
) -> None:
    folder = tmp_path / "blanks"
    assert blank._copied("prefect", made, homes[0], folder)
    (kept,) = folder.glob("*.db")
    kept.write_bytes(kept.read_bytes()[:5000] if content is None else content)
    assert blank._copied("prefect", made, homes[1], folder)
    assert tables(homes[1]) == tables(kept) == [("t",)]


def test_a_kept_one_belongs_to_its_version(
    tmp_path: Path, homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert blank._copied("prefect", made, homes[0], tmp_path / "blanks")
    monkeypatch.setattr(blank, "version", lambda library: "99")
    made_again = []

    def other(path: Path) -> None:
        made_again.append(path)
        made(path)

    assert blank._copied("prefect", other, homes[1], tmp_path / "blanks")
    assert len(made_again) == 1


def test_what_another_program_made_meanwhile_stays(
    tmp_path: Path, homes: tuple[Path, Path]
) -> None:
    def overtaken(path: Path) -> None:
        made(path)
        homes[0].write_bytes(b"another server's, which is writing it")

    blank._copied("prefect", overtaken, homes[0], tmp_path / "blanks")
    assert homes[0].read_bytes().startswith(b"another")
    homes[1].write_bytes(b"")
    assert blank._copied("prefect", unmade, homes[1], tmp_path / "blanks")
    assert tables(homes[1]) == [("t",)]


def test_setting_up_goes_on_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder can be here")
    monkeypatch.setenv("RELEARN_BLANKS_DIR", str(tmp_path / "file" / "blanks"))
    blank.main()
    assert "each new home makes its own" in capsys.readouterr().out


def test_where_nothing_can_be_kept_it_is_made_in_place(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder can be here")
    blank.mlflow_database(tmp_path / "home" / "mlflow.db", blocked / "blanks")
    assert ("experiments",) in tables(tmp_path / "home" / "mlflow.db")


def test_what_is_prefects_own_stays_with_prefect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blank, "_migrated_prefect", made)
    there = tmp_path / "there.db"
    there.write_bytes(b"")
    for address in (
        f"sqlite+aiosqlite:///{there}",
        f"sqlite+aiosqlite:///{tmp_path}/none/prefect.db",
        f"sqlite+aiosqlite:///{tmp_path}/a.db?cache=shared",
        "sqlite+aiosqlite:///:memory:",
        "postgresql+asyncpg://u@127.0.0.1/prefect",
    ):
        blank.prefect_database(address, tmp_path / "blanks")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.db"]
    blank.prefect_database(f"sqlite+aiosqlite:///{tmp_path}/new.db", tmp_path / "blanks")
    assert tables(tmp_path / "new.db") == [("t",)]
