"""The CoT data set: one response a pair, written once and kept [TaoSR1 s3.1].

Consumes pairs, rules and a teacher -> produces responses.jsonl with a row {query_id, product_id,
response, source} a pair, in pair order, responses grade first. source is `store` (the judgment's
own reasoning, where it passes `check`), `chat` or `template`; beside a chat teacher `template`
marks an unusable answer that was replaced.

Answers of an endpoint are journalled as they come: a process that dies loses those under way, and
the next one asks for the missing ones only. Replaced ones are not journalled, so they get another
chance.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from models.errors import ArtifactError, ConfigError, RelearnError, explain
from models.rules.base import RuleBase
from models.teacher.chat import ASKS, Answer, ChatWriter
from models.teacher.check import check
from models.teacher.config import ChatTeacher, Endpoint, TemplateTeacher
from models.teacher.response import Order, in_order
from models.teacher.template import write
from models.types import Pair

log = logging.getLogger(__name__)

FILE = "responses.jsonl"
JOURNAL = "answers.jsonl"
EXAMPLES = 3
"""Unusable answers that a message shows."""
EXAMPLE_CHARS = 160

Key = tuple[str, str]
"""(query_id, product_id)."""
OnProgress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One response and who wrote it."""

    query_id: str
    product_id: str
    response: str
    source: str

    @property
    def key(self) -> Key:
        """The pair it is about."""
        return self.query_id, self.product_id


def write_responses(
    pairs: Sequence[Pair],
    config: TemplateTeacher | ChatTeacher,
    rules: RuleBase,
    endpoint: Endpoint | None,
    out: Path,
    scratch: Path,
    progress: OnProgress,
) -> dict[str, float]:
    """Write a response for every pair into `out`; answers so far are kept in `scratch`.

    Args:
        endpoint: where a chat teacher is asked; the template teacher needs none.

    Returns:
        counts by source, and of a chat teacher the requests and tokens of this attempt.

    Raises:
        TransientError: the endpoint failed in passing, more often than it may.
        ConfigError: no endpoint, one that refuses, or too many unusable answers.
    """
    rows = {pair.key: row for pair in pairs if (row := _from_store(pair)) is not None}
    counts: dict[str, float] = {}
    if isinstance(config, ChatTeacher):
        if endpoint is None:
            got = f"teacher {config.model} and no address"
            raise ConfigError(explain(got, "http(s)://host/v1", "set RELEARN_TEACHER_URL"))
        left = [pair for pair in pairs if pair.key not in rows]
        answered, counts = _ask(left, config, rules, endpoint, scratch, progress)
        rows |= answered
    for pair in pairs:
        if pair.key not in rows:
            rows[pair.key] = Row(*pair.key, write(pair, "respond_then_think"), "template")
    made = [rows[pair.key] for pair in pairs]
    (out / FILE).write_text("".join(map(_line, made)), encoding="utf-8")
    sources = [row.source for row in made]
    return {f"from_{s}": sources.count(s) for s in ("store", "chat", "template")} | counts


def read_responses(folder: Path, order: Order) -> dict[Key, str]:
    """{(query_id, product_id): response in `order`} of what `write_responses` wrote.

    Raises:
        ArtifactError: no such file, or a row that cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        raise ArtifactError(explain(f"no {FILE} in {folder}", "a CoT data set", "run again"))
    rows, whole = _parse(path.read_bytes())
    if not whole:
        raise ArtifactError(explain(f"a broken row in {path}", "whole rows", "run again"))
    return {row.key: in_order(row.response, order) for row in rows}


def _from_store(pair: Pair) -> Row | None:
    """The judgment's own reasoning, where it is a response that leads to its grade."""
    response = check(pair.reasoning, pair).response
    return None if response is None else Row(*pair.key, response, "store")


def _ask(
    pairs: Sequence[Pair],
    config: ChatTeacher,
    rules: RuleBase,
    endpoint: Endpoint,
    scratch: Path,
    progress: OnProgress,
) -> tuple[dict[Key, Row], dict[str, float]]:
    """Rows of the usable answers, old and new, and counts of this attempt."""
    journal = _Journal(scratch / JOURNAL)
    rows = dict(journal.rows)
    left = [pair for pair in pairs if pair.key not in rows]
    if rows:
        log.info("%d of %d responses are there, %d are asked for", len(rows), len(pairs), len(left))
    asked = _Asked(config, len(pairs))

    def keep(pair: Pair, answer: Answer) -> None:
        if answer.response is not None:
            rows[pair.key] = Row(*pair.key, answer.response, "chat")
            journal.append(rows[pair.key])
        asked.count(pair, answer)
        done = len(pairs) - len(left) + asked.pairs
        progress(done, len(pairs), f"responses of {config.model}")

    writer = ChatWriter(config, endpoint, rules)
    try:
        _ask_at_once(left, writer.write, endpoint.concurrency, keep)
    finally:
        writer.close()
        journal.close()
    asked.warn()
    return rows, asked.totals()


def _ask_at_once(
    pairs: Sequence[Pair],
    ask: Callable[[Pair], Answer],
    workers: int,
    keep: Callable[[Pair, Answer], None],
) -> None:
    """Ask about all pairs, `workers` at a time; `keep` is called here, in the order of answers.

    The first error stops the asking; answers under way are waited for and kept, then it is raised.
    """
    first: RelearnError | None = None
    executor = ThreadPoolExecutor(workers, thread_name_prefix="teacher")
    try:
        futures: dict[Future[Answer], Pair] = {executor.submit(ask, pair): pair for pair in pairs}
        for future in as_completed(futures):
            try:
                keep(futures[future], future.result())
            except CancelledError:
                continue
            except RelearnError as error:
                if first is None:
                    first = error
                    for waiting in futures:
                        waiting.cancel()
    finally:
        executor.shutdown(cancel_futures=True)
    if first is not None:
        raise first


class _Asked:
    """Counts answers and stops when too many are unusable."""

    def __init__(self, config: ChatTeacher, total: int) -> None:
        self.config, self.total = config, total
        self.pairs = self.requests = self.again = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.unusable: list[str] = []

    def count(self, pair: Pair, answer: Answer) -> None:
        """Count one answer.

        Raises:
            ConfigError: so many are unusable that the share of all pairs is above the ceiling.
        """
        self.pairs += 1
        self.requests += answer.asked
        self.again += answer.asked > 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        if answer.response is not None:
            return
        said = " / ".join(answer.said.split("\n"))[:EXAMPLE_CHARS]
        what = f"{pair.query.text[:60]!r} + {pair.product.title[:60]!r}, grade {pair.grade}"
        self.unusable.append(f"{what}: {answer.problem}: {said!r}")
        if len(self.unusable) > math.floor(self.config.max_replaced_share * self.total):
            got = f"{len(self.unusable)} unusable answers of {self.config.model} for "
            got += f"{self.total} pairs, each asked for {ASKS} times ({self._examples()})"
            raise ConfigError(
                explain(
                    got,
                    f"at most a share of {self.config.max_replaced_share:g}",
                    "name a stronger judge.teacher.model, or raise max_replaced_share",
                )
            )

    def warn(self) -> None:
        """Say what the template replaced."""
        if self.unusable:
            log.warning("%d responses replaced: %s", len(self.unusable), self._examples())

    def totals(self) -> dict[str, float]:
        """What this attempt asked for and got."""
        return {
            "replaced_share": len(self.unusable) / max(1, self.total),
            "requests": self.requests,
            "asked_again": self.again,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def _examples(self) -> str:
        return "; ".join(self.unusable[:EXAMPLES])


class _Journal:
    """Rows appended one by one; a torn last line of a process that died is dropped."""

    def __init__(self, path: Path) -> None:
        rows, whole = _parse(path.read_bytes()) if path.is_file() else ([], True)
        self.rows: Mapping[Key, Row] = {row.key: row for row in rows}
        if not whole:
            path.write_text("".join(map(_line, rows)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Keep `row` even if the process dies now."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _parse(content: bytes) -> tuple[list[Row], bool]:
    """The rows up to the first broken one, and whether there is none."""
    *lines, rest = content.split(b"\n")
    rows: list[Row] = []
    for line in lines:
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            return rows, False
    return rows, not rest
