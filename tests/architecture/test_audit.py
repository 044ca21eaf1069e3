"""`make audit`: what is not pinned is named, and no answer is no pass."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

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


def test_what_a_pinned_package_wants_in_one_version_is_pinned_with_it(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch on a machine with CUDA, its toolkit and the libraries of the extras it names."""
    needs = {
        "wheel-torch": ['cuda-kit[blas]==13.0.2; sys_platform != "none"', "loose>=1"],
        "cuda-kit": ['blas==13.0.*; extra == "blas"', 'fft==13.0.*; extra == "fft"'],
        "blas": [],
    }
    for name, lines in needs.items():
        folder = tmp_path / f"{name.replace('-', '_')}-1.dist-info"
        folder.mkdir()
        wants = "".join(f"Requires-Dist: {line}\n" for line in lines)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n{wants}"
        (folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    pins = {"wheel-torch": "1"}
    assert audit.implied(pins) == {"cuda-kit": "13.0.2", "blas": "13.0.*"}
    found = {"cuda-kit": "13.0.2", "blas": "13.0.7", "loose": "1", "fft": "13.0.1"}
    wrong = audit.unpinned(audit.implied(pins) | pins, found)
    assert [line.split()[0] for line in wrong] == ["fft", "loose"]
    (other,) = audit.unpinned({"blas": "13.0.*"}, {"blas": "13.1.0"})
    assert "blas 13.1.0 is installed" in other
    assert not audit.unpinned({"blas": "13.*"}, {"blas": "13"})


def test_a_push_is_tested_and_audited_and_so_is_a_week_without_one() -> None:
    workflow = yaml.safe_load((SCRIPT.parents[1] / ".github" / "workflows" / "ci.yml").read_text())
    runs = {
        name: [step["run"] for step in job["steps"] if "run" in step]
        for name, job in workflow["jobs"].items()
    }
    assert runs == {"test": [".ci/run"], "audit": ["make audit"]}
    when = workflow[True]  # YAML's "on"
    assert {"push", "pull_request", "schedule"} <= when.keys()
    assert workflow["permissions"] == {"contents": "read"}


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
