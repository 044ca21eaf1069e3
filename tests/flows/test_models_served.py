"""`mlflow models serve` of the champions for real: rows in over HTTP, grades and products out.

Run it with `make test-live`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import pytest

from tests.live import environment, fetch, free_port, served, wait_for

if TYPE_CHECKING:
    from tests.flows.conftest import Chain

START_S = 400


@contextmanager
def endpoint(chain: Chain, model: str, log: Path) -> Iterator[str]:
    """The address that answers for the champion of `model`."""
    port = free_port()
    options = f"--env-manager local --host 127.0.0.1 --port {port} --workers 1".split()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{model}@champion"]
    uri = chain.artifacts.settings.tracking_uri
    # mlflow looks for uvicorn on the PATH
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"MLFLOW_TRACKING_URI": uri, "RELEARN_DEVICE": "cpu", "PATH": path}
    env = environment(chain.home, more)
    with served([*command, *options], env, log) as server:
        url = f"http://127.0.0.1:{port}"

        def ready() -> bytes | None:
            assert server.poll() is None, log.read_text()
            return fetch(f"{url}/ping")

        wait_for(ready, lambda answer: answer is not None, START_S)
        yield f"{url}/invocations"


def ask(url: str, columns: list[str], data: list[list[Any]], **params: Any) -> list[dict[str, Any]]:
    body = {"dataframe_split": {"columns": columns, "data": data}, "params": params}
    answer = fetch(url, json.dumps(body).encode())
    assert answer is not None
    rows: list[dict[str, Any]] = json.loads(answer)["predictions"]
    return rows


@pytest.mark.live
def test_the_champions_answer_over_http(chain: Chain, tmp_path: Path) -> None:
    with endpoint(chain, "synthetic-smoke-judge", tmp_path / "judge.log") as url:
        pairs = [["red couch", "Red velvet sofa"], ["red couch", "Blue desk lamp"]]
        rows = ask(url, ["query", "title"], pairs)
        assert len(rows) == 2
        for row in rows:
            assert row["grade"] in (1, 2, 3, 4) and row["tier"] in ("Good", "Mid", "Bad")
            assert sum(row[f"p{g}"] for g in (1, 2, 3, 4)) == pytest.approx(1, abs=1e-4)
        with pytest.raises(HTTPError) as refused:
            ask(url, ["query"], [["red couch"]])
        assert refused.value.code == 400 and b"title" in refused.value.read()
    with endpoint(chain, "synthetic-smoke-index", tmp_path / "index.log") as url:
        rows = ask(url, ["query"], [["red couch"], ["lamp"]], k=3)
        assert [(r["query"], r["rank"]) for r in rows] == [
            (q, n) for q in ("red couch", "lamp") for n in (1, 2, 3)
        ]
        assert all(r["product_id"] and r["title"] for r in rows)
        assert rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
