"""What the published index lacks of today's catalogue, and the delta that mends it.

Consumes an open index and the catalogue's products -> produces a `Difference`. Rows are compared as
`rows.columns` writes them: in every stored column, so a changed price counts as well as a changed
text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.index.lance import SCANNED_ROWS, LanceIndex
from models.index.rows import columns, schema
from models.schemas import QUARANTINE
from models.sources.delta import Delta
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
    products: int
    """Size of the catalogue."""

    @property
    def stale(self) -> int:
        """Products missing, changed or gone."""
        return len(self.missing) + len(self.changed) + len(self.gone)

    @property
    def share(self) -> float:
        """Stale products by catalogue size, at most 1; an empty catalogue is stale as a whole as
        soon as the index holds anything."""
        return min(1.0, self.stale / max(1, self.products))

    def delta(self) -> Delta:
        """The rows to write and ids to remove so that nothing is stale."""
        products = (*self.missing, *self.changed)
        total = hashlib.sha256("\0".join(self.gone).encode())
        for product in products:
            total.update(repr(product).encode())
        digest = total.hexdigest()[:16]
        return Delta(products, self.gone, digest, QUARANTINE.empty_table())


def difference(index: LanceIndex, catalogue: Iterable[Product], max_text_chars: int) -> Difference:
    """Compare `index` with the whole catalogue; 16 bytes and an id a row are in memory.

    max_text_chars: where the index cut its texts (`IndexConfig.max_text_chars`).
    """
    stored = _stored(index)
    missing, changed, count = [], [], 0
    for product in catalogue:
        count += 1
        held = stored.pop(product.product_id, None)
        if held is None:
            missing.append(product)
        elif held != _digest(columns(product, max_text_chars)):
            changed.append(product)
    return Difference(tuple(missing), tuple(changed), tuple(sorted(stored)), count)


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
