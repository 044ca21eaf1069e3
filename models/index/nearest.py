"""The exact nearest products of an index's probes, kept up to date without reading the index.

Consumes a scan of all vectors once, then the rows that a refresh writes and the ids that it deletes
-> produces what the approximate index is compared with. Removing products from an exact top-100
leaves an exact top of what stays, only shorter; a written product that is nearer than the last one
left belongs in it, one that is farther may have unknown products before it. So the lists stay
exact and grow shorter, and are read from the table again once they no longer reach the gate's
depth. A refresh then costs what its delta costs, whatever the size of the catalogue.

Shapes: P probes, N products, D dim.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.files import replace_bytes
from models.index.exact import exact_top

DEPTH = 100
"""Products known of a probe after a scan."""


class NearestProducts:
    """Ids and cosines of each probe's nearest products, best first: exact as far as they go.

    Args:
        probes_PD: query vectors.
        ids: the nearest products of each of the first probes. None: nothing is known.
        scores: their cosines.
    """

    def __init__(
        self,
        probes_PD: np.ndarray,
        ids: Iterable[Sequence[str]] | None = None,
        scores: Iterable[Sequence[float]] | None = None,
    ) -> None:
        self.probes_PD = np.asarray(probes_PD, np.float32)
        self.ids = [list(row) for row in ids or ()]
        self.scores = [list(map(float, row)) for row in (() if scores is None else scores)]

    @classmethod
    def scan(
        cls, batches: Iterable[tuple[list[str], np.ndarray]], probes_PD: np.ndarray
    ) -> NearestProducts:
        """Of a stream of (ids [B], vectors [B, D]), a batch in memory at a time."""
        return cls(probes_PD, *exact_top(batches, probes_PD, DEPTH))

    def reach(self, probes: int, depth: int) -> bool:
        """Whether the first `probes` probes have `depth` products each."""
        return len(self.ids) >= probes and all(len(row) >= depth for row in self.ids[:probes])

    def remove(self, ids: Collection[str]) -> None:
        """Products that are no longer there."""
        gone = frozenset(ids)
        for row, scores in zip(self.ids, self.scores, strict=True):
            kept = [(i, s) for i, s in zip(row, scores, strict=True) if i not in gone]
            row[:], scores[:] = [i for i, _ in kept], [s for _, s in kept]

    def replace(self, ids: Sequence[str], vectors_ND: np.ndarray) -> None:
        """Products that are new, or have another vector now."""
        self.remove(ids)
        probes_PD = self.probes_PD[: len(self.ids)]
        found, cosines = exact_top([(list(ids), vectors_ND)], probes_PD, DEPTH)
        for row, scores, new, near in zip(self.ids, self.scores, found, cosines, strict=True):
            if not row:
                continue  # whatever is nearest of the others is not known
            pairs = [*zip(row, scores, strict=True)]
            pairs += [(i, float(s)) for i, s in zip(new, near, strict=True) if s >= scores[-1]]
            pairs.sort(key=lambda pair: -pair[1])
            row[:], scores[:] = [i for i, _ in pairs[:DEPTH]], [s for _, s in pairs[:DEPTH]]

    def write(self, path: Path) -> None:
        """Keep ids and cosines; the probes are kept by whoever made them."""
        columns = {"ids": (self.ids, pa.string()), "scores": (self.scores, pa.float32())}
        arrays = {name: pa.array(v, pa.list_(kind)) for name, (v, kind) in columns.items()}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(arrays), sink)
        replace_bytes(path, sink.getvalue())

    @classmethod
    def read(cls, path: Path, probes_PD: np.ndarray) -> NearestProducts:
        """What `write` kept; where there is no such file, nothing is known."""
        if not path.is_file():
            return cls(probes_PD)
        kept = pq.read_table(path)
        return cls(probes_PD, kept["ids"].to_pylist(), kept["scores"].to_pylist())
