"""What the published index lacks of today's catalogue, and the delta that mends it.

Consumes an open index, the catalogue's products and its quarantine -> produces a `Difference`. Rows
are compared as `rows.columns` writes them: in every stored column, so a changed price counts as
well as a changed text. A product whose row is faulty today stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models.errors import ConfigError, explain
from models.index.lance import SCANNED_ROWS, LanceIndex
from models.index.rows import columns, schema
from models.schemas import QUARANTINE
from models.sources.delta import Delta, refused_ids
from models.types import Product

COMPARED = tuple(name for name in schema(1).names if name not in ("text", "vector"))
"""`text` is in `text_hash`."""


@dataclass(frozen=True)
class Difference:
    """Products by what is wrong with them in the index."""

    missing: tuple[Product, ...]
    changed: tuple[Product, ...]
    gone: tuple[str, ...]
    """Ids that the index holds and the catalogue does not."""
    kept: tuple[str, ...]
    """Ids that the index holds and the catalogue has faulty rows of; not stale, they stay."""
    products: int
    """Size of the catalogue."""
    rows: int
    """Size of the index."""
    refused: pa.Table
    """The catalogue's faulty product rows."""

    @property
    def stale(self) -> int:
        """Products missing, changed or gone."""
        return len(self.missing) + len(self.changed) + len(self.gone)

    @property
    def share(self) -> float:
        """Stale products by catalogue size, at most 1; an empty catalogue is stale as a whole as
        soon as the index holds anything."""
        return min(1.0, self.stale / max(1, self.products))

    def delta(self, max_deleted: float = 1.0) -> Delta:
        """The rows to write and ids to remove so that nothing is stale.

        max_deleted: as in `RefreshConfig`.

        Raises:
            ConfigError: more would be removed.
        """
        share = len(self.gone) / max(1, self.rows)
        if share > max_deleted:
            got = f"a catalogue without {len(self.gone)} of {self.rows} served products"
            do = (
                "check that the products file is whole; if they are gone for good, run once with "
                f"refresh.max_deleted={math.ceil(100 * share) / 100:g} among its changes"
            )
            raise ConfigError(explain(got, f"at most {max_deleted:.0%} to be deleted", do))
        products = (*self.missing, *self.changed)
        total = hashlib.sha256("\0".join(self.gone).encode())
        for product in products:
            total.update(repr(product).encode())
        digest = total.hexdigest()[:16]
        return Delta(products, self.gone, digest, self.refused)


def difference(
    index: LanceIndex,
    catalogue: Iterable[Product],
    max_text_chars: int,
    quarantine: pa.Table | None = None,
) -> Difference:
    """Compare `index` with the whole catalogue; 16 bytes and an id a row are in memory.

    max_text_chars: where the index cut its texts (`IndexConfig.max_text_chars`).
    quarantine: rows set aside when the catalogue was read, of any table; None: none.
    """
    quarantine = QUARANTINE.empty_table() if quarantine is None else quarantine
    stored = _stored(index)
    rows = len(stored)
    missing, changed, count = [], [], 0
    for product in catalogue:
        count += 1
        held = stored.pop(product.product_id, None)
        if held is None:
            missing.append(product)
        elif held != _digest(columns(product, max_text_chars)):
            changed.append(product)
    kept = stored.keys() & refused_ids(quarantine)
    return Difference(
        missing=tuple(missing),
        changed=tuple(changed),
        gone=tuple(sorted(stored.keys() - kept)),
        kept=tuple(sorted(kept)),
        products=count,
        rows=rows,
        refused=quarantine.filter(pc.equal(quarantine["table"], "products")),
    )


def _stored(index: LanceIndex) -> dict[str, bytes]:
    rows = index.table.search().select(list(COMPARED)).limit(None)
    return {
        row["product_id"]: _digest(row)
        for batch in rows.to_batches(SCANNED_ROWS)
        for row in batch.to_pylist()
    }


def _digest(row: Mapping[str, Any]) -> bytes:
    text = json.dumps([row[name] for name in COMPARED], ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
