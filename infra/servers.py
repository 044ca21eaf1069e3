"""The servers of infra/compose.yaml without containers: PostgreSQL and an S3 endpoint on loopback.

    python infra/servers.py start FOLDER     # both, and their addresses in FOLDER/env
    set -a; . FOLDER/env; set +a             # then: relearn up
    python infra/servers.py stop FOLDER

For a trial or a test on one machine. PostgreSQL is Debian's (package postgresql), in a private
cluster under FOLDER with a password of its own; started by root, it runs as the user postgres, so
FOLDER must be one that user can reach. S3 is moto (`pip install '.[servers]'`), which keeps
everything in memory: what was stored is gone after `stop`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

LOOPBACK = "127.0.0.1"
USER = "relearn"
BUCKET = "relearn"
DATABASES = ("prefect", "mlflow")
WAIT_S = 300


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    folder = asked.folder.expanduser().resolve()
    start(folder) if asked.action == "start" else stop(folder)


def start(folder: Path) -> None:
    """Start both; what was started is stopped again when the other cannot."""
    if (folder / "env").exists():
        sys.exit(f"got {folder} in use; expected an empty folder; do this: stop it first")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)
    try:
        lines = start_postgres(folder / "postgres") | start_s3(folder)
    except BaseException:
        stop(folder)
        raise
    path = folder / "env"
    path.touch(mode=0o600)
    path.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
    print(f"started; addresses are in {path}")


def stop(folder: Path) -> None:
    """Stop both and forget their addresses; nothing happens to what does not run."""
    cluster = folder / "postgres" / "data"
    if (cluster / "postmaster.pid").exists():
        _postgres(folder / "postgres", "pg_ctl", "stop", "-D", str(cluster), "-m", "fast", "-w")
    pid_file = folder / "s3.pid"
    if pid_file.exists():
        pid = int(pid_file.read_text())
        if _is_s3(pid):
            os.kill(pid, signal.SIGTERM)
            _until(lambda: not _is_s3(pid), f"the S3 server (pid {pid}) to end")
        pid_file.unlink()
    (folder / "env").unlink(missing_ok=True)


def start_postgres(folder: Path) -> dict[str, str]:
    """A private cluster with one database a server; returns the variables that name them."""
    folder.mkdir(mode=0o700, exist_ok=True)
    password, port = secrets.token_hex(16), _free_port()
    secret = folder / "password"
    secret.touch(mode=0o600)
    secret.write_text(password)
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        shutil.chown(secret, "postgres", "postgres")
    data = str(folder / "data")
    init = f"-U {USER} --auth scram-sha-256 -E UTF8 --locale C --no-sync".split()
    _postgres(folder, "initdb", "-D", data, "--pwfile", str(secret), *init)
    secret.unlink()
    options = f"-p {port} -h {LOOPBACK} -k {folder}"
    log = str(folder / "log")
    _postgres(
        folder, "pg_ctl", "start", "-D", data, "-o", options, "-l", log, "-w", "-t", str(WAIT_S)
    )
    address = ("-h", LOOPBACK, "-p", str(port), "-U", USER)
    for name in DATABASES:
        _postgres(folder, "createdb", *address, name, PGPASSWORD=password)
    at = f"{USER}:{password}@{LOOPBACK}:{port}"
    return {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{at}/prefect",
        "RELEARN_MLFLOW_URI": f"postgresql+psycopg2://{at}/mlflow",
    }


def _postgres(folder: Path, program: str, *arguments: str, **env: str) -> None:
    """Run one of PostgreSQL's programs, as `postgres` where this is root."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    path = str(found[-1]) if found else shutil.which(program)
    if path is None:
        sys.exit(f"got no {program}; expected PostgreSQL; do this: apt-get install postgresql")
    other = {"user": "postgres", "group": "postgres", "extra_groups": []}
    done = subprocess.run(
        [path, *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **(other if os.geteuid() == 0 else {}),
    )
    if done.returncode:
        sys.exit(f"got {program}: {done.stderr.strip()}; expected it to end well")


def start_s3(folder: Path) -> dict[str, str]:
    """moto with an empty bucket; returns the variables that name it."""
    port = _free_port()
    url = f"http://{LOOPBACK}:{port}"
    env = {
        # moto takes any key; real servers do not
        "AWS_ACCESS_KEY_ID": "relearn",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "MLFLOW_S3_ENDPOINT_URL": url,
        "RELEARN_ARTIFACT_ROOT": f"s3://{BUCKET}/artifacts",
    }
    with (folder / "s3.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "s3.pid").write_text(str(server.pid))
    _until(lambda: _answers(url), f"an answer at {url}", server)
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name=env["AWS_DEFAULT_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=BUCKET)
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/moto-api/", timeout=5):
            return True
    except OSError:
        return False


def _is_s3(pid: int) -> bool:
    """Whether `pid` is still the server this script started: pids are used again."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # reap it where it is this process's own child
    try:
        return b"moto.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _until(ready, what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ready():
        if process is not None and process.poll() is not None:
            sys.exit(f"got a server that ended with {process.returncode}; see its log")
        if time.monotonic() > deadline:
            sys.exit(f"got nothing in {WAIT_S} s; expected {what}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
