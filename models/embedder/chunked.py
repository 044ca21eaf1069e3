"""Embedding with gradient in chunks: gradient caching for any loss of vectors [Gao 2021].

Consumes texts and, after the loss's own backward, the gradients at their vectors -> produces the
encoder's gradients, a chunk at a time: memory for one chunk's activations instead of all. The
encoder must be without dropout, as Retrieval-GRPO's is: the second forward has to equal the first.

Shapes: N texts, C of a chunk, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from models.embedder.encoder import Side, embed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Embed = Callable[[Sequence[str], Side], torch.Tensor]
"""texts, side -> unit vectors [N, D]."""


class CachedTexts:
    """The texts of one step. Without `chunk` they are embedded at once and autograd does the rest.

    `embed` any number of times, backward through the loss, then `backward` once.
    """

    def __init__(self, encoder: SentenceTransformer, chunk: int | None) -> None:
        self.encoder, self.chunk = encoder, chunk
        self._given: list[tuple[Sequence[str], Side, torch.Tensor]] = []

    def embed(self, texts: Sequence[str], side: Side) -> torch.Tensor:
        """[N, D] unit vectors, with gradient where it is on."""
        if self.chunk is None:
            return embed(self.encoder, texts, side)
        parts = [texts[i : i + self.chunk] for i in range(0, len(texts), self.chunk)]
        with torch.no_grad():
            leaves = [embed(self.encoder, part, side) for part in parts]
        if torch.is_grad_enabled():
            for part, leaf_CD in zip(parts, leaves, strict=True):
                self._given.append((part, side, leaf_CD.requires_grad_()))
        return torch.cat(leaves)

    def backward(self) -> None:
        """Carry the gradients at the vectors on into the encoder."""
        for part, side, leaf_CD in self._given:
            if leaf_CD.grad is not None:  # else the loss did not depend on them
                torch.sum(embed(self.encoder, part, side) * leaf_CD.grad).backward()
        self._given.clear()
