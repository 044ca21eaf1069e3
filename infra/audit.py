"""Audit what is installed: pinned in infra/constraints.txt, and without known vulnerabilities.

Exit code 0: both hold. 1: one does not. 2: nobody can say, as without a network: no pass either.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).resolve().parent / "constraints.txt"
PROJECT = "relearn"
AUDIT_S = 600


def main() -> int:
    """Both checks, the local one first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--with", dest="python", default=sys.executable, help="Python that has pip-audit"
    )
    python = parser.parse_args().python
    pins = read_pins(CONSTRAINTS.read_text(encoding="utf-8"))
    wrong = unpinned(implied(pins) | pins, installed())
    for line in wrong:
        print(f"audit: {line}", file=sys.stderr)
    if not wrong:
        print(f"audit: every installed package that {PROJECT} needs is pinned")
    known = vulnerabilities(python)
    if known is None:
        print("audit: NOT AUDITED for known vulnerabilities, see above", file=sys.stderr)
        return 1 if wrong else 2
    for line in known:
        print(f"audit: {line}", file=sys.stderr)
    if not known:
        print(f"audit: no known vulnerability in {len(pins)} pinned packages")
    return 1 if wrong or known else 0


def read_pins(text: str) -> dict[str, str]:
    """{canonical name: version} of `name==version` lines.

    Raises:
        ValueError: a line that is no pin.
    """
    pins = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, found, version = line.partition("==")
        if not found:
            raise ValueError(f"got {line!r}; expected name==version; do this: pin it")
        pins[canonicalize_name(name)] = version.split(";")[0].strip()
    return pins


def installed() -> dict[str, str]:
    """{canonical name: version} of what the project needs, extras included, as installed here."""
    found: dict[str, str] = {}
    todo = [(PROJECT, frozenset(metadata.metadata(PROJECT).get_all("Provides-Extra") or ()))]
    seen = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed, or for another system
        found[canonicalize_name(name)] = distribution.version
        todo += list(_needs(distribution, extras))
    del found[canonicalize_name(PROJECT)]
    return found


def implied(pins: Mapping[str, str]) -> dict[str, str]:
    """{canonical name: version} of what a pinned package wants in one version, and so on from
    there: torch's CUDA libraries, which its CPU build does without. "13.0.*": any of these."""
    out: dict[str, str] = {}
    todo = [(name, frozenset[str]()) for name in pins]
    while todo:
        name, extras = todo.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for needed in _requirements(distribution, extras):
            exact = [s.version for s in needed.specifier if s.operator == "=="]
            child = canonicalize_name(needed.name)
            if exact and child not in out and child not in pins:
                out[child] = exact[0]
                todo.append((child, frozenset(needed.extras)))
    return out


def _needs(
    distribution: metadata.Distribution, extras: frozenset[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    for needed in _requirements(distribution, extras):
        yield canonicalize_name(needed.name), frozenset(needed.extras)


def _requirements(
    distribution: metadata.Distribution, extras: frozenset[str]
) -> Iterator[Requirement]:
    for line in distribution.requires or ():
        needed = Requirement(line)
        wanted = ["", *extras]
        if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in wanted):
            yield needed


def unpinned(pins: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What is installed without a pin, or in another version (a local part like +cpu aside)."""
    out = []
    for name, version in sorted(found.items()):
        if name not in pins:
            out.append(f"{name} {version} is not pinned; do this: add it to {CONSTRAINTS.name}")
        elif not _same(version, pins[name]):
            out.append(f"{name} {version} is installed, {pins[name]} pinned; do this: make setup")
    return out


def _same(version: str, pin: str) -> bool:
    if pin.endswith("*"):
        return f"{version}.".startswith(pin[:-1])
    return version.split("+")[0] == pin.split("+")[0]


def vulnerabilities(python: str) -> list[str] | None:
    """Known ones of the pinned packages, as pip-audit says; None when it cannot say."""
    command = [python, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=AUDIT_S)
        report = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"audit: pip-audit did not run: {error}", file=sys.stderr)
        return None
    except (ValueError, KeyError):
        print("audit: pip-audit has no answer:", *done.stderr.splitlines()[-3:], file=sys.stderr)
        return None
    skipped = [d["name"] for d in report if "skip_reason" in d]
    if skipped or not report:
        some = ", ".join(skipped[:5])
        print(f"audit: no data on {len(skipped)} of {len(report)}: {some} ...", file=sys.stderr)
        return None
    return [
        f"{d['name']} {d['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for d in report
        for v in d["vulns"]
    ]


if __name__ == "__main__":
    sys.exit(main())
