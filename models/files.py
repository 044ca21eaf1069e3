"""Files that are never half there.

Consumes text or bytes -> produces a file that, after a crash, holds the old ones or the new.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def replace_text(path: Path, text: str) -> None:
    """Replace a file whole, on the disk before this returns."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes | pa.Buffer) -> None:
    """The same of bytes."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
