"""Products as rows of the index table.

Consumes Products and a function that embeds their texts -> produces record batches, one in memory
at a time. `text_hash` names the text a vector was made from, so that a refresh embeds only what
changed.

Shapes: N products, D dim, P probes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.errors import ConfigError, explain
from models.index.reuse import known_vectors, vectors_of
from models.text import product_text
from models.types import Product

if TYPE_CHECKING:
    from lancedb.table import Table

Encode = Callable[[Sequence[str]], np.ndarray]
"""Product texts [N] -> unit vectors [N, D] float32; see `embedder.encoder.document_encoder`."""
STORED = ("title", "description", "brand", "category")
PROBE_NOISE = 0.1
"""Length of the noise added to a product's own vector to make it a probe (vectors are unit)."""


def shortened(encode: Encode, dim: int | None) -> Encode:
    """`encode` whose vectors are cut to their first `dim` numbers; None: `encode` itself."""
    return encode if dim is None else lambda texts: cut(encode(texts), dim)


def cut(vectors_ND: np.ndarray, dim: int | None) -> np.ndarray:
    """The first `dim` numbers of each vector, at unit length again; None: all of them.

    Raises:
        ConfigError: vectors of fewer numbers.

    >>> cut(np.array([[3.0, 4.0, 12.0]]), 2).tolist()
    [[0.6, 0.8]]
    """
    if dim is None:
        return vectors_ND
    if dim > vectors_ND.shape[1]:
        got = f"vectors of {vectors_ND.shape[1]} numbers"
        raise ConfigError(explain(got, f"at least index.dim = {dim}", "lower index.dim"))
    short_ND = vectors_ND[:, :dim]
    norm_N1 = np.linalg.norm(short_ND, axis=1, keepdims=True)
    return short_ND / np.maximum(norm_N1, 1e-12)


def schema(dim: int) -> pa.Schema:
    """Columns of the table."""
    return pa.schema(
        [
            pa.field("product_id", pa.string()),
            *[pa.field(name, pa.string()) for name in STORED],
            pa.field("attributes", pa.string()),  # a JSON object: Lance has no map type
            pa.field("price", pa.float64()),
            pa.field("text", pa.string()),
            pa.field("text_hash", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), dim)),
        ]
    )


def columns(product: Product, max_text_chars: int) -> dict[str, Any]:
    """One row without its vector."""
    text = product_text(product, max_text_chars)
    return {
        "product_id": product.product_id,
        **{name: getattr(product, name) for name in STORED},
        "attributes": json.dumps(dict(product.attributes), ensure_ascii=False),
        "price": product.price,
        "text": text,
        "text_hash": hashlib.sha256(text.encode()).hexdigest()[:32],
    }


def to_product(row: Mapping[str, Any]) -> Product:
    """The product a row was made of, as far as it is stored."""
    stored = {name: row[name] for name in ("product_id", *STORED, "price")}
    return Product(**stored, attributes=json.loads(row["attributes"]))


def record_batch(rows: Sequence[Mapping[str, Any]], vectors_ND: np.ndarray) -> pa.RecordBatch:
    """Rows (see `columns`) and their vectors, in order."""
    vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    wanted = schema(vectors_ND.shape[1])
    flat = pa.array(vectors_ND.reshape(-1))
    arrays = [pa.array([row[f.name] for row in rows], f.type) for f in list(wanted)[:-1]]
    arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=wanted.field("vector").type))
    return pa.RecordBatch.from_arrays(arrays, schema=wanted)


def batches(items: Iterable[Product], size: int) -> Iterator[tuple[Product, ...]]:
    """`items` in tuples of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


class RowStream:
    """Products -> record batches, once; keeps counts and a uniform sample of the vectors.

    Args:
        total: number of products, for the progress bar.
        sample: vectors kept (reservoir sampling), drawn with `seed`.
        earlier: a table with vectors of the same encoder; texts it holds are not embedded again.
    """

    def __init__(
        self,
        encode: Encode,
        items: Iterable[Product],
        batch_size: int,
        max_text_chars: int,
        sample: int,
        seed: int = 0,
        total: int | None = None,
        earlier: Table | None = None,
    ) -> None:
        self.earlier = earlier
        self.encode, self.max_text_chars, self.total = encode, max_text_chars, total
        self.sample, self.rng = sample, np.random.default_rng(seed)
        self._batches = batches(items, batch_size)
        self._kept: list[np.ndarray] = []
        self.encode_s = 0.0
        self.rows = self.dim = self.encoded = 0

    def reader(self) -> pa.RecordBatchReader:
        """A reader that embeds as it is read.

        Raises:
            ConfigError: no products.
        """
        from tqdm.auto import tqdm

        first = next(self._batches, None)
        if first is None:
            raise ConfigError(explain("no products", "a catalogue", "check the ingest stage"))
        head = self._record(first)

        def rest() -> Iterator[pa.RecordBatch]:
            with tqdm(total=self.total, desc="index: embedding products", unit="product") as bar:
                yield head
                bar.update(len(head))
                for batch in self._batches:
                    yield self._record(batch)
                    bar.update(len(batch))

        return pa.RecordBatchReader.from_batches(head.schema, rest())

    def probes(self) -> np.ndarray:
        """The sampled vectors [P, D] with noise: a query is never quite a product."""
        kept_PD = np.stack(self._kept)
        scale = PROBE_NOISE / np.sqrt(kept_PD.shape[1])
        noisy_PD = kept_PD + self.rng.normal(0.0, scale, kept_PD.shape)
        return noisy_PD.astype(np.float32)

    def _record(self, batch: Sequence[Product]) -> pa.RecordBatch:
        started = time.perf_counter()
        rows = [columns(p, self.max_text_chars) for p in batch]
        ids = [row["product_id"] for row in rows]
        known = {} if self.earlier is None else known_vectors(self.earlier, ids)
        vectors_ND, encoded = vectors_of(rows, known, self.encode)
        self.encoded += encoded
        self.encode_s += time.perf_counter() - started
        self.dim = vectors_ND.shape[1]
        self._keep(vectors_ND)
        return record_batch(rows, vectors_ND)

    def _keep(self, vectors_ND: np.ndarray) -> None:
        """Algorithm R: every vector seen so far is in the sample with the same probability."""
        for vector_D in vectors_ND:
            if len(self._kept) < self.sample:
                self._kept.append(vector_D.copy())
            elif (slot := int(self.rng.integers(self.rows + 1))) < self.sample:
                self._kept[slot] = vector_D.copy()
            self.rows += 1
