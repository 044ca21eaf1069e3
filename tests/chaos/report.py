"""Cases and what became of them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field


class NotTried(Exception):
    """This machine cannot show the case; it counts as one that was not survived."""


@dataclass
class Report:
    """Counts cases, and prints one line each as they end."""

    cases: int = 0
    survived: int = 0
    began_s: float = field(default_factory=time.monotonic)

    def case(self, name: str, body: Callable[[], list[str]]) -> bool:
        """Run one case; `body` returns what is wrong, nothing when it was survived."""
        self.cases += 1
        started = time.monotonic()
        try:
            wrong = body()
            word = "FAILED" if wrong else "survived"
        except NotTried as reason:
            wrong, word = [str(reason)], "NOT TRIED"
        except Exception:  # a case that cannot be finished is a failed one, and the others go on
            wrong, word = [traceback.format_exc()], "FAILED"
        self.survived += word == "survived"
        print(f"{word:9} {name}  ({time.monotonic() - started:.0f} s)", flush=True)
        for line in wrong:
            print(f"          {line}", flush=True)
        return word == "survived"

    def last_line(self) -> str:
        """`survived N of M`."""
        return f"survived {self.survived} of {self.cases}"
