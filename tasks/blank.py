"""Empty databases of Prefect and MLflow: made once a machine, copied into every new home.

Both libraries make theirs by running all their migrations: 9 s of CPU, while a run on a new home
waits. So the first empty one is kept in the folder `Settings.blanks_dir`, named by the library's
version, and a new home gets a copy. `make setup` makes both:

    python -m tasks.blank

A file appears whole or not at all. Where nothing can be kept, the database is made in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from tasks.settings import settings

Make = Callable[[Path], None]
"""Writes an empty database into a new sqlite file."""
PREFECT_SQLITE = "sqlite+aiosqlite:///"

log = logging.getLogger(__name__)


def mlflow_database(file: Path, blanks_dir: Path) -> None:
    """MLflow's tables in a new sqlite file.

    MLflow makes them in a hundred steps without a transaction; killed between two, it refuses the
    file for ever.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not _copied("mlflow", _migrated_mlflow, file, blanks_dir):
        _whole(file, _migrated_mlflow)


def prefect_database(address: str, blanks_dir: Path) -> None:
    """Prefect's tables in the sqlite file of this database address, where it is still to be made
    and its folder is there. All else, and what fails, is left to the server: it says so."""
    file = Path(address.removeprefix(PREFECT_SQLITE))
    known = address.startswith(PREFECT_SQLITE) and file.is_absolute() and "?" not in address
    if known and file.parent.is_dir() and not file.exists():
        _copied("prefect", _migrated_prefect, file, blanks_dir)


def _copied(library: str, make: Make, file: Path, blanks_dir: Path) -> bool:
    try:
        kept = _kept(library, make, blanks_dir)
        _whole(file, lambda partial: _copy(kept, partial), over=False)
    except Exception as error:  # a full or read-only disk, in the libraries' own words
        log.info("no empty database of %s to copy: %s", library, error)
        return False
    return True


def _kept(library: str, make: Make, folder: Path) -> Path:
    """The empty database of the installed version, made if there is no sound one."""
    file = folder / f"{library}-{version(library)}.db"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{library}.lock"):
        if not _sound(file):
            _whole(file, make)
    return file


def _whole(file: Path, make: Make, over: bool = True) -> None:
    """`file` as `make` writes it, in one step; what a killed process left of it goes first.

    over: also where there is one by now. Else it is another program's, and stays.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        for left in file.parent.glob(f"{partial.name}*"):
            left.unlink()
        make(partial)
        with contextlib.closing(sqlite3.connect(partial)) as database:
            # one file, which can be read where nothing can be written; Prefect sets its own mode
            database.execute("PRAGMA journal_mode=DELETE")
        if over or not file.exists() or not file.stat().st_size:
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source)) as kept,
        contextlib.closing(sqlite3.connect(target)) as new,
    ):
        kept.backup(new)


def _sound(file: Path) -> bool:
    if not file.is_file():
        return False
    with contextlib.closing(sqlite3.connect(file)) as database:
        try:
            checked = database.execute("PRAGMA quick_check").fetchone()
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError:
            return False
    return checked == ("ok",) and tables > (0,)


def _migrated_mlflow(file: Path) -> None:
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    engine = create_sqlalchemy_engine(f"sqlite:///{file}")
    _initialize_tables(engine)
    engine.dispose()


def _migrated_prefect(file: Path) -> None:
    from prefect.server.database import provide_database_interface
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, temporary_settings

    async def migrate() -> None:
        database = provide_database_interface()
        await database.create_db()
        await (await database.engine()).dispose()

    with temporary_settings({PREFECT_API_DATABASE_CONNECTION_URL: f"{PREFECT_SQLITE}{file}"}):
        asyncio.run(migrate())


def main() -> None:
    """Keep both, as `python -m tasks.blank` after an installation, where they can be kept."""
    folder = settings().blanks_dir
    for library, make in (("prefect", _migrated_prefect), ("mlflow", _migrated_mlflow)):
        try:
            _kept(library, make, folder)
        except OSError as error:
            print(f"setup: no empty databases in {folder} ({error}): each new home makes its own")
            return


if __name__ == "__main__":
    main()
