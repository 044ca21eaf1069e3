"""Vectors that exist already: rows whose text an index of the same encoder holds are not embedded.

Consumes rows (see `rows.columns`) and a table -> produces their vectors, from the table where the
stored text is the same, from the encoder elsewhere. What a build embeds before it is killed is kept
beside it, for the build that goes on. Whether the encoder is the same is the caller's to know.

Shapes: N rows, D dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from models.errors import ConfigError, explain
from models.index.filters import one_of

if TYPE_CHECKING:
    import pyarrow as pa
    from lancedb.table import Table

    from models.index.rows import Encode


class Known(NamedTuple):
    """A stored vector, and the hash of the text it was made from."""

    text_hash: str
    vector_D: np.ndarray


def resumable(encode: Encode, folder: Path) -> Encode:
    """`encode`, but for texts that it was given before, together and in this order: their vectors
    are in `folder`, a file a batch, written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)

    def encode_once(texts: Sequence[str]) -> np.ndarray:
        digest = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
        kept = folder / f"{digest[:32]}.npy"
        if kept.is_file():
            return np.load(kept, allow_pickle=False)
        vectors_ND = encode(texts)
        fresh = kept.with_suffix(".new")
        with fresh.open("wb") as stream:
            np.save(stream, vectors_ND)
        fresh.replace(kept)
        return vectors_ND

    return encode_once


def known_vectors(table: Table, ids: Sequence[str]) -> dict[str, Known]:
    """What `table` holds of the products `ids`, by id."""
    query = table.search().where(one_of("product_id", ids))
    found = query.select(["product_id", "text_hash", "vector"]).limit(len(ids)).to_arrow()
    return known_of(found)


def known_of(found: pa.Table) -> dict[str, Known]:
    """The same of rows that were read already."""
    flat = found["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors_ND = flat.reshape(len(found), -1) if len(found) else flat
    hashes = map(Known, found["text_hash"].to_pylist(), vectors_ND)
    return dict(zip(found["product_id"].to_pylist(), hashes, strict=True))


def vectors_of(
    rows: Sequence[Mapping[str, Any]],
    known: Mapping[str, Known],
    encode: Encode,
    dim: int | None = None,
) -> tuple[np.ndarray, int]:
    """[N, D] of `rows`, and how many of them were embedded; `encode` gets those texts, in order.

    dim: what the table holds; None: whatever comes.

    Raises:
        ConfigError: the encoder has another dimension.
    """
    same = [known.get(row["product_id"]) for row in rows]
    pairs = list(zip(rows, same, strict=True))
    fresh = [
        i for i, (row, old) in enumerate(pairs) if not old or old.text_hash != row["text_hash"]
    ]
    if not fresh:
        return np.array([old.vector_D for old in same if old], np.float32), 0
    fresh_FD = encode([rows[i]["text"] for i in fresh])
    if dim is not None and fresh_FD.shape[1] != dim:
        got = f"an encoder of {fresh_FD.shape[1]} dimensions"
        raise ConfigError(explain(got, f"{dim}, the index's", "publish an index of its own"))
    if len(fresh) == len(rows):
        return fresh_FD, len(fresh)
    out_ND = np.zeros((len(rows), fresh_FD.shape[1]), np.float32)
    for i, old in enumerate(same):
        if old:
            out_ND[i] = old.vector_D
    out_ND[fresh] = fresh_FD
    return out_ND, len(fresh)
