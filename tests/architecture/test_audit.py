"""`make audit`: what is not pinned is named, and no answer is no pass."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "audit.py"
TOOL = """#!/bin/sh
printf '%s' '{answer}'
exit 1
"""


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(folder: Path, answer: str) -> str:
    """A Python that answers as pip-audit would."""
    path = folder / "python"
    path.write_text(TOOL.format(answer=answer))
    path.chmod(0o755)
    return str(path)


def test_what_is_not_pinned_is_named(audit: ModuleType) -> None:
    pins = audit.read_pins("# why\nNumPy==2.4.1\ntorch==2.13.0+cpu  # CPU\n")
    assert pins == {"numpy": "2.4.1", "torch": "2.13.0+cpu"}
    assert audit.unpinned(pins, {"numpy": "2.4.1", "torch": "2.13.0"}) == []
    (other, missing) = audit.unpinned(pins, {"numpy": "2.3.0", "pandas": "3.0.0"})
    assert "numpy 2.3.0 is installed, 2.4.1 pinned" in other
    assert "pandas 3.0.0 is not pinned" in missing
    with pytest.raises(ValueError, match="pandas>=2"):
        audit.read_pins("pandas>=2")


def test_every_direct_dependency_is_looked_at_and_pinned(audit: ModuleType) -> None:
    found = audit.installed()
    pins = audit.read_pins(audit.CONSTRAINTS.read_text(encoding="utf-8"))
    direct = {"torch", "mlflow", "prefect", "lancedb", "sqlalchemy", "alembic"}  # one is indirect
    assert direct <= found.keys() and direct <= pins.keys()
    assert "relearn" not in found


def test_no_answer_is_no_pass(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "unpinned", lambda pins, found: [])
    monkeypatch.setattr(sys, "argv", ["audit", "--with", "/no/such/python"])
    assert audit.main() == 2
    assert "NOT AUDITED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("no network", None),
        ('{"dependencies": []}', None),
        ('{"dependencies": [{"name": "x", "skip_reason": "not found"}]}', None),
        ('{"dependencies": [{"name": "x", "version": "1", "vulns": []}]}', []),
        (
            '{"dependencies": [{"name": "x", "version": "1", "vulns":'
            ' [{"id": "CVE-1", "fix_versions": ["2"]}]}]}',
            ["x 1: CVE-1, fixed in 2"],
        ),
    ],
)
def test_answers_of_pip_audit(
    audit: ModuleType, tmp_path: Path, answer: str, found: list[str] | None
) -> None:
    assert audit.vulnerabilities(tool(tmp_path, answer)) == found
