"""Embedding with gradient in chunks: gradient caching for any loss of vectors [Gao 2021].

Consumes texts and, after the loss's own backward, the gradients at their vectors -> produces the
encoder's gradients, a chunk at a time: memory for one chunk's activations instead of all. The
encoder must be without dropout, as Retrieval-GRPO's is: the second forward has to equal the first.

Shapes: N texts, D dim.
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
        with torch.no_grad():
            parts = [embed(self.encoder, part, side) for part in self._parts(texts)]
        vectors_ND = torch.cat(parts)
        if torch.is_grad_enabled():
            vectors_ND.requires_grad_()
            self._given.append((texts, side, vectors_ND))
        return vectors_ND

    def backward(self) -> None:
        """Carry the gradients at the vectors on into the encoder."""
        for texts, side, vectors_ND in self._given:
            if vectors_ND.grad is None:
                continue  # the loss did not depend on them
            for part, grad_CD in zip(
                self._parts(texts), vectors_ND.grad.split(self.chunk or len(texts)), strict=True
            ):
                torch.sum(embed(self.encoder, part, side) * grad_CD).backward()
        self._given.clear()

    def _parts(self, texts: Sequence[str]) -> list[Sequence[str]]:
        size = self.chunk or len(texts)
        return [texts[i : i + size] for i in range(0, len(texts), size)]
