"""models/PAPERS.md: every tag in the code has a row, every row leads to code and to a test."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = REPOSITORY / "models" / "PAPERS.md"
TAG = re.compile(
    r"\[((?:TaoSR1|TaoSR-AGRL|TaoSearchEmb|DAPO|DrGRPO) s[0-9][0-9.a-z]*)(?:, [^\]]+)?\]"
)
"""A tag may name the kind of source after a comma: [TaoSR1 s3.3, sister paper]."""
MARKS = {"P", "N", "N+", "S", "ours"}


class Row(NamedTuple):
    """One row of the table."""

    tag: str
    statement: str
    known: str
    code: str
    test: str


def rows() -> list[Row]:
    """The rows of the second table."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if "|" in line]
    start = lines.index("| tag | statement | known | code | test |") + 2
    return [
        Row(*(cell.strip() for cell in line.strip("| ").split(" | "))) for line in lines[start:]
    ]


def resolve(dotted: str) -> tuple[Any, str]:
    """The module that holds `dotted`, and the rest of the name ("" for a module)."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        if found is not None:
            return importlib.import_module(name), ".".join(parts[end:])
    raise AssertionError(f"no module in {dotted}")


def documentation(dotted: str) -> str:
    """The docstring of a module, class, function, field or constant.

    Raises:
        AttributeError: there is no such symbol.
    """
    module, name = resolve(dotted)
    value, owner = module, module
    for part in filter(None, name.split(".")):
        fields = getattr(value, "model_fields", {})
        if part in fields:
            return fields[part].description or ""
        owner, value = value, getattr(value, part)
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        return value.__doc__ or ""
    return _after_assignment(inspect.getsource(owner), name.split(".")[-1])


def _after_assignment(source: str, name: str) -> str:
    """The string that follows `name = ...` in a source."""
    body = ast.parse(source).body
    for before, after in itertools.pairwise(body):
        targets = (
            before.targets if isinstance(before, ast.Assign) else [getattr(before, "target", 0)]
        )
        named = any(isinstance(t, ast.Name) and t.id == name for t in targets)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return ""


@functools.cache
def names_of_tests(path: str) -> frozenset[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def tags_used() -> dict[str, set[str]]:
    """{tag: files of models/ that name it}."""
    used: dict[str, set[str]] = {}
    for path in sorted((REPOSITORY / "models").rglob("*.py")):
        for tag in TAG.findall(path.read_text(encoding="utf-8")):
            used.setdefault(tag, set()).add(path.relative_to(REPOSITORY).as_posix())
    return used


def test_the_table_parses() -> None:
    assert len(rows()) > 50
    assert {r.known for r in rows()} <= MARKS
    assert all(r.statement and TAG.fullmatch(f"[{r.tag}]") for r in rows())
    keys = [(r.tag, r.code) for r in rows()]
    assert sorted(k for k in set(keys) if keys.count(k) > 1) == []


@pytest.mark.parametrize("row", rows(), ids=lambda r: f"{r.tag}-{r.code.split('.')[-1]}")
def test_a_row_leads_to_code_that_carries_its_tag(row: Row) -> None:
    assert row.tag in TAG.findall(documentation(row.code)), f"{row.code} does not name [{row.tag}]"


def test_every_row_leads_to_a_test() -> None:
    missing = []
    for row in rows():
        path, _, name = row.test.partition("::")
        if not (REPOSITORY / path).is_file() or name not in names_of_tests(path):
            missing.append(row.test)
    assert missing == []


def test_every_tag_in_the_code_has_a_row_for_its_file() -> None:
    """A file that names a tag has a row of that tag that leads into the file."""
    covered = {
        (r.tag, str(Path(resolve(r.code)[0].__file__).relative_to(REPOSITORY))) for r in rows()
    }
    used = {(tag, file) for tag, files in tags_used().items() for file in files}
    assert sorted(used - covered) == []
    assert {r.tag for r in rows()} == set(tags_used())


def test_defaults_are_the_published_values() -> None:
    """Defaults that a row attributes to a paper are that paper's numbers."""
    from models.judge.config import GrpoConfig, PoolConfig, PromptConfig

    grpo = GrpoConfig()
    assert (grpo.optimiser.lr, grpo.temperature, grpo.clip_low) == (1e-6, 0.99, 0.2)
    assert (grpo.beta, grpo.max_advantage) == (0.02, 2.0)
    assert (PoolConfig().max_confidence, PoolConfig().balanced) == (0.7, True)
    assert PromptConfig().order == "respond_then_think"
