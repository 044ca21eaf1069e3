"""An MLflow tracking server on loopback, behind a proxy that fails or hangs on request."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

START_S = 900.0


class Proxy(ThreadingHTTPServer):
    """Passes requests on; the next `failing` ones get HTTP 500, the next `hanging` no answer."""

    daemon_threads = True

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.passing = 0
        """Requests that are still passed on before the trouble begins."""
        self.failing = self.hanging = 0
        self.seen = 0
        self.lock = threading.Lock()
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def trouble(self, after: int = 0, failing: int = 0, hanging: int = 0) -> None:
        """From the request number `after` on: so many 500s, or so many without an answer."""
        with self.lock:
            self.passing, self.failing, self.hanging, self.seen = after, failing, hanging, 0

    def next_is(self) -> str:
        """What becomes of the request that just came."""
        with self.lock:
            self.seen += 1
            if self.passing > 0:
                self.passing -= 1
            elif self.failing > 0:
                self.failing -= 1
                return "fail"
            elif self.hanging > 0:
                self.hanging -= 1
                return "hang"
            return "pass"


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        what = self.server.next_is()
        if what == "hang":
            self.server.closed.wait(120)
            self.close_connection = True
        elif what == "fail":
            self._answer(500, b'{"error_code": "INTERNAL_ERROR", "message": "chaos"}')
        else:
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=120)
            kind = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
            upstream.request(self.command, self.path, body, kind)
            answer = upstream.getresponse()
            self._answer(answer.status, answer.read())
            upstream.close()

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _any

    def _answer(self, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the cases say what they saw."""


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[Proxy]:
    """A server with a database of its own below `folder`, and the proxy before it."""
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--default-artifact-root", f"{folder}/artifacts", "--no-serve-artifacts"]
    with (folder / "server.log").open("w") as log:
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight more processes
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    proxy = Proxy(port)
    try:
        _wait(port, server, folder / "server.log")
        yield proxy
    finally:
        proxy.closed.set()
        proxy.shutdown()
        proxy.server_close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # it is thrown away, and starts more processes
        server.wait()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    ask = build_opener(ProxyHandler({})).open
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), ask(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the MLflow server did not start:\n{log.read_text()[-2000:]}")
