"""`make chaos`: what a run survives. Prints a line a case, and last `survived N of M`.

    python -m tests.chaos --kills 20 --seed 0

An undisturbed smoke run is the reference. Then the same run is killed and continued, killed and
continued, on one home (tests/chaos/kills.py); then come the cases of tests/chaos/troubles.py. Exit
code 0 only when everything was survived; what cannot be tried here counts as not survived.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos.kills import campaign, undisturbed
from tests.chaos.report import Report
from tests.chaos.troubles import Troubles


def main() -> int:
    """All cases; 0 when all were survived."""
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs of one run")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="a command's")
    parser.add_argument("--no-troubles", action="store_true", help="the kills alone")
    parser.add_argument("--folder", type=Path, help="keep the homes there [default: thrown away]")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="relearn-chaos-"))
    report = Report()
    try:
        if args.kills:
            reference = undisturbed(folder / "undisturbed", args.limit)
            print(f"an undisturbed run takes {reference.seconds:.0f} s", flush=True)
            campaign(report, folder / "killed", reference, args.kills, args.seed, args.limit)
        if not args.no_troubles:
            Troubles(report, folder / "troubles", args.limit).run()
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(report.last_line())
    return 0 if report.survived == report.cases else 1


if __name__ == "__main__":
    sys.exit(main())
