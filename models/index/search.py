"""One query against an index, through the channel that was asked for."""

from __future__ import annotations

import numpy as np

from models.errors import ConfigError, explain
from models.index.lance import LanceIndex

MODES = ("vector", "lexical", "hybrid")


def search(
    index: LanceIndex,
    query: str,
    vector_D: np.ndarray,
    k: int,
    mode: str,
    where: str | None = None,
) -> list[tuple[str, float]]:
    """(product id, score), best first: cosine, BM25 or reciprocal rank.

    vector_D: the embedded query; lexical search does not look at it.

    Raises:
        ConfigError: an unknown mode, or words asked of an index without full text.
    """
    if mode == "vector":
        ids, scores = index.search(np.asarray(vector_D)[None], k, where)
        return list(zip(ids[0], scores[0], strict=True))
    if mode == "lexical":
        return index.search_text(query, k, where)
    if mode == "hybrid":
        return index.search_hybrid(query, vector_D, k, where)
    raise ConfigError(explain(f"mode {mode!r}", f"one of {', '.join(MODES)}", "correct it"))
