"""What is known of a built index, stored beside its table: how to search it, and what was measured.

A folder with an index holds `products.lance`, `index.json` (IndexFacts) and `probes.npy`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import ArtifactError, explain
from models.files import replace_text
from models.index.config import IndexConfig, Kind

FACTS = "index.json"
PROBES = "probes.npy"


class Trial(BaseModel):
    """One setting that was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nprobes: int
    refine: int
    recall_at_10: float


class IndexFacts(BaseModel):
    """A measured index. Latencies are of single queries, on the machine that built it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind
    rows: int
    dim: int
    nprobes: int | None = None
    """Partitions searched; the smallest number that passed. None: a scan."""
    refine: int | None = None
    """Multiple of k re-ranked with the full vectors; the smallest that passed. None: a scan."""
    recall_at_10: float
    recall_at_100: float | None
    """Not gated: `nprobes` is chosen at 10, so this tells what deep rankings lose. None: a refresh,
    which leaves it out."""
    latency_p50_ms: float
    latency_p95_ms: float
    unindexed_rows: int
    trained_rows: int
    """Rows when the vector index was last trained from nothing."""
    rows_since: int = 0
    """Rows written since then."""
    probes: int
    trials: tuple[Trial, ...] = ()
    encoded_rows: int | None = None
    """Rows whose texts were embedded for it; the vectors of the others existed. None: not known."""
    encode_s: float = 0.0
    build_s: float = 0.0
    measure_s: float = 0.0
    config: IndexConfig = Field(default_factory=IndexConfig)

    def numbers(self) -> dict[str, float]:
        """The figures a run logs."""
        fields = self.model_dump(exclude={"kind", "config", "trials"})
        return {name: float(value) for name, value in fields.items() if value is not None}

    def write(self, folder: Path, probes_PD: np.ndarray) -> None:
        """Keep facts and probes in `folder`."""
        np.save(folder / PROBES, probes_PD)
        replace_text(folder / FACTS, self.model_dump_json(indent=1))

    @classmethod
    def read(cls, folder: Path | str) -> tuple[IndexFacts, np.ndarray]:
        """Facts and probes of a folder or of what lies at a URI.

        Raises:
            ArtifactError: none there, or written by another version of the code.
        """
        try:
            facts = cls.model_validate_json(_bytes(folder, FACTS))
            return facts, np.load(io.BytesIO(_bytes(folder, PROBES)), allow_pickle=False)
        except (OSError, ValidationError, ValueError) as error:
            what = str(error).splitlines()[0]
            expected = f"an index folder with {FACTS} and {PROBES}"
            raise ArtifactError(
                explain(f"{what} in {folder}", expected, "build the index again")
            ) from None


def _bytes(folder: Path | str, name: str) -> bytes:
    if isinstance(folder, Path):
        return (folder / name).read_bytes()
    from pyarrow.fs import FileSystem

    system, path = FileSystem.from_uri(folder)
    with system.open_input_stream(f"{path}/{name}") as stream:
        return bytes(stream.read())
