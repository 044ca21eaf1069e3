"""An OpenAI-compatible endpoint on the loopback, whose every answer a test decides."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from models.types import GRADE_NAMES

STEPS = {
    1: "category: mismatch\nattributes: none",
    2: "category: related\nattributes: none",
    3: "category: match\nattributes: colour yes, size no",
    4: "category: match\nattributes: colour yes",
}
"""Verdicts that go with a grade."""


@dataclass(frozen=True)
class Asked:
    """One request: its JSON body and its headers, names in lower case."""

    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def user(self) -> str:
        """The first user message."""
        return str(self.body["messages"][1]["content"])

    @property
    def grade(self) -> int:
        """The gold grade in the question."""
        found = re.findall(r"^The grade is (\d), ", self.user, re.MULTILINE)
        return int(found[-1])

    @property
    def item(self) -> str:
        """The item in the question."""
        return str(json.loads(self.user.split("\n")[0])["item"])

    @property
    def turn(self) -> int:
        """1 where the pair is asked for the first time, 2 the second."""
        return len(self.body["messages"]) // 2


@dataclass(frozen=True)
class Reply:
    """What the endpoint says: a completion with `text`, or `raw` bytes as they are."""

    text: str = ""
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    hang: bool = False


def good(asked: Asked) -> Reply:
    """The five steps for the grade that was given, with the known verdicts where there are."""
    known = "\n".join(asked.user.split("\n")[-2:])
    steps = known if known.startswith("category: ") else STEPS[asked.grade]
    return Reply(answer(asked.grade, steps))


def answer(grade: int, steps: str, item: str = "a thing") -> str:
    """Six lines."""
    return f"{grade}\nquery: a wish\nitem: {item}\n{steps}\ndecision: {GRADE_NAMES[grade]}"


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    """An error in the protocol's form."""
    raw = json.dumps({"error": {"message": message, "type": "test"}}).encode()
    return Reply(status=status, raw=raw, headers=headers)


class FakeEndpoint:
    """Answers with `script`; keeps every request, and how many were under way at once."""

    def __init__(self, script: Callable[[Asked], Reply] = good) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        """Stop, and let go of what hangs; a second time it does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _reply(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(asked)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            reply = self.script(asked)
            if reply.hang:
                self._closed.wait(30)
            return reply
        finally:
            with self._lock:
                self._under_way -= 1

    def _handler(endpoint) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {k.lower(): v for k, v in self.headers.items()}
                reply = endpoint._reply(Asked(body, headers))
                if reply.hang:
                    self.close_connection = True
                    return
                raw = completion(reply) if reply.raw is None else reply.raw
                self.send_response(reply.status)
                for name, value in {"content-type": "application/json", **reply.headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        return Handler


def completion(reply: Reply) -> bytes:
    """A chat completion as the protocol has it."""
    message = {"role": "assistant", "content": reply.text}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "fake"}
    return json.dumps(body | {"choices": [choice], "usage": usage}).encode()
