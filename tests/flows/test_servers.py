"""The whole chain on PostgreSQL and an S3 endpoint, as infra/compose.yaml has it, on loopback.

Run it with `make test-live`; it needs Debian's package postgresql and the extra `servers`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.flows.conftest import SMALLER
from tests.live import REPOSITORY, free_port, ours, relearn

RUN_S = 1200


def servers(action: str, folder: Path) -> None:
    """The script, as a person calls it."""
    command = [sys.executable, "infra/servers.py", action, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def addresses() -> Iterator[dict[str, str]]:
    """PostgreSQL and S3, and the variables that name them."""
    pytest.importorskip("moto", reason="no S3 server here: pip install '.[servers]'")
    pytest.importorskip("psycopg2", reason="no PostgreSQL driver here: pip install '.[servers]'")
    if not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    # not below tmp_path, which only its owner can enter: the cluster runs as another user
    with tempfile.TemporaryDirectory(prefix="relearn-servers-") as name:
        folder = Path(name) / "servers"
        folder.parent.chmod(0o711)
        servers("start", folder)
        lines = (folder / "env").read_text().splitlines()
        assert (folder / "env").stat().st_mode & 0o077 == 0
        try:
            yield dict(line.split("=", 1) for line in lines)
        finally:
            servers("stop", folder)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose processes are gone afterwards, whatever the test did."""
    folder = tmp_path / "home"
    yield folder
    for process in ours(folder):
        process.kill()


@pytest.mark.live
def test_the_chain_on_postgresql_and_s3(
    addresses: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ports = ("--port-prefect", str(free_port()), "--port-mlflow", str(free_port()))
    done = relearn(home, "up", *ports, env=addresses)
    assert done.returncode == 0, done.stdout + done.stderr
    changes = [word for change in SMALLER for word in ("--set", change)]
    done = relearn(home, "run", "--recipe", "smoke", *changes, env=addresses, limit_s=RUN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Champion by this run (first)" in done.stdout
    assert not list(home.rglob("*.db")), "state lies in PostgreSQL, not in sqlite files"
    assert not (home / "artifacts").exists(), "artifacts lie in the bucket"

    for name, value in addresses.items():
        monkeypatch.setenv(name, value)
    assert flow_runs(addresses["PREFECT_API_DATABASE_CONNECTION_URL"]) > 0
    the_index_reads_in_place(home, tmp_path)

    found = relearn(home, "search", "red couch", "--store", "synthetic-smoke", env=addresses)
    assert found.returncode == 0 and "red couch" in found.stdout, found.stdout + found.stderr
    stopped = relearn(home, "down", env=addresses)
    assert stopped.returncode == 0 and ours(home) == []


def flow_runs(url: str) -> int:
    """Completed flow runs, counted in Prefect's own table."""
    from sqlalchemy import create_engine, text

    engine = create_engine(url.replace("+asyncpg", "+psycopg2"))
    with engine.connect() as connection:
        query = text("SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'")
        return int(connection.execute(query).scalar_one())


def the_index_reads_in_place(home: Path, tmp_path: Path) -> None:
    """LanceDB reads the champion's table from the bucket; a copy of it answers the same."""
    import boto3

    from models.index.lance import LanceIndex
    from tasks import registry
    from tasks.artifacts import ArtifactStore
    from tasks.settings import settings

    store = ArtifactStore(settings(home=home, experiment="synthetic-smoke"))
    assert store.settings.tracking_uri.startswith("postgresql")
    champion = registry.champion("synthetic-smoke-index", store=store)
    assert champion is not None and champion.ref.uri.startswith("s3://relearn/artifacts/")
    assert store.place(champion.ref) == champion.ref.uri
    remote, local = LanceIndex.open(champion.ref.uri), LanceIndex.open(store.path(champion.ref))
    assert len(remote) == len(local) > 0
    vectors = np.random.default_rng(0).normal(size=(4, local.vectors()[1].shape[1]))
    assert remote.search(vectors, 5) == local.search(vectors, 5)
    # and it is the bucket that is read: without the object there is nothing
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    prefix = champion.ref.uri.removeprefix("s3://relearn/")
    facts = client.get_object(Bucket="relearn", Key=f"{prefix}/index.json")["Body"].read()
    assert json.loads(facts)["rows"] == len(local)
