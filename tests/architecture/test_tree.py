"""What the tracked files may and may not contain."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS = tuple(
    name + dot
    for name, dot in (
        ("py" + "pi", ".org"),
        ("python" + "hosted", ".org"),
        ("npm" + "js", ".org"),
        ("npm" + "js", ".com"),
        ("conda" + ".anaconda", ".org"),
        ("download.py" + "torch", ".org"),
    )
)
"""Put together here so that this file does not contain them."""
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ".cfg", ".example", ""}
LARGEST_BYTES = 1 << 20


def tracked() -> list[Path]:
    """Files git tracks or would track."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("no git here, so no list of files")
    paths = (REPOSITORY / name for name in done.stdout.split("\0") if name)
    return [p for p in paths if p.is_file()]


def test_no_file_names_a_package_registry() -> None:
    named = [
        f"{path.relative_to(REPOSITORY)}: {host}"
        for path in tracked()
        if path.suffix in TEXT
        for host in HOSTS
        if host in path.read_text(errors="replace").lower()
    ]
    assert named == []


def test_no_weights_or_data_are_tracked() -> None:
    bad = {".safetensors", ".gguf", ".whl", ".bin", ".pt", ".parquet", ".gz", ".zip", ".db"}
    assert [str(p) for p in tracked() if p.suffix in bad] == []
    assert [str(p) for p in tracked() if p.stat().st_size > LARGEST_BYTES] == []


def test_constraints_are_names_and_versions_and_cover_every_dependency() -> None:
    text = (REPOSITORY / "infra" / "constraints.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    pinned = {_canonical(line.split("==")[0]) for line in lines}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {_canonical(re.split(r"[<>=\[ ]", spec)[0]) for spec in wanted}
    assert names - pinned == set()
    assert "torch==2.13.0" in lines


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_names_of_test_files_are_unique() -> None:
    names = [p.name for p in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []


def test_modules_are_nouns_of_their_own() -> None:
    banned = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    found = [p for top in ("flows", "tasks", "models") for p in (REPOSITORY / top).rglob("*.py")]
    assert [str(p) for p in found if p.stem in banned or p.parent.name in banned] == []


def test_every_setting_is_in_the_example() -> None:
    from tasks.settings import Settings

    text = (REPOSITORY / "infra" / ".env.example").read_text()
    named = set(re.findall(r"RELEARN_\w+(?==)", text))
    fields = {f"RELEARN_{name.upper()}" for name in Settings.model_fields}
    assert fields - {"RELEARN_WEIGHTS_DIR"} | {"RELEARN_WEIGHTS"} == named
