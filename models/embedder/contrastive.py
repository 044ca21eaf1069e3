"""Contrastive SFT: InfoNCE with in-batch and global random negatives [TaoSearchEmb s3.1].

Consumes an encoder folder and a store's train split -> produces an encoder folder.

No hard-negative mining anywhere, as in the paper. Departures (ours): pairs are weighted by grade;
known positives of a query, and products of the same text as one, are no negatives of it; long
batches can be embedded in chunks (gradient caching) with the gradient of the full batch; the loss
can be the mean over several truncated widths (Matryoshka).

Shapes: B pairs, N global negatives, P = B + N, D dim.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import nn

from models.embedder.config import ContrastiveConfig
from models.embedder.encoder import load_encoder
from models.embedder.fitting import features, fit
from models.embedder.pairs import (
    Copies,
    PositivePair,
    every_positive,
    known_positives,
    masked_columns,
    positive_pairs,
)
from models.errors import ConfigError, explain
from models.objectives.infonce import infonce
from models.store import Store
from models.text import product_text
from models.types import MetricSink

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class ContrastiveLoss(CachedLossMixin, nn.Module):
    """InfoNCE as a sentence-transformers loss: (query, positive[, global negatives]) columns.

    Like MultipleNegativesRankingLoss, and equal to it in batch; the third column may have any
    number of rows, shared by the whole batch [TaoSearchEmb s3.1]. Labels may be a mapping with
    `masked` [B, P] (bool) and `weight` [B], which the library's own losses do not take.

    Args:
        chunk: embed at most this many texts at once with the library's gradient caching; the
            gradient is that of the full batch (dropout is replayed). None: all at once.
    """

    def __init__(
        self, model: SentenceTransformer, tau: float = 0.05, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tau = tau
        self.uses_gradient_cache = chunk is not None
        self.mini_batch_size = chunk or sys.maxsize

    def forward(
        self, sentence_features: Sequence[dict[str, Any]], labels: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """The loss of one batch."""
        columns = [dict(column) for column in sentence_features]
        if self.uses_gradient_cache:
            return self.forward_cached(columns, labels)
        vectors = [[self.model(column)["sentence_embedding"]] for column in columns]
        return self.calculate_loss(vectors, labels)

    def calculate_loss(
        self,
        reps: Sequence[Sequence[torch.Tensor]],
        labels: Mapping[str, Any] | None = None,
        *,
        with_backward: bool = False,
    ) -> torch.Tensor:
        """The loss from the vectors of each column, a list of chunks a column."""
        extra = labels if isinstance(labels, Mapping) else {}
        q_BD, pos_BD, *rest = (torch.cat(list(chunks)).float() for chunks in reps)
        negatives_ND = rest[0] if rest else None
        masked, weight = (
            None if extra.get(name) is None else extra[name].to(q_BD.device)
            for name in ("masked", "weight")
        )
        loss = infonce(q_BD, pos_BD, negatives_ND, self.tau, masked, weight)
        if with_backward:
            loss.backward()
            return loss.detach()
        return loss


def contrastive_loss(encoder: SentenceTransformer, config: ContrastiveConfig) -> nn.Module:
    """The loss that `config` names; over several widths it is the mean of theirs.

    Raises:
        ConfigError: a width beyond the encoder's own.
    """
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    loss = ContrastiveLoss(encoder, config.tau, config.chunk)
    if not config.matryoshka_dims:
        return loss
    own, dims = encoder.get_embedding_dimension(), config.matryoshka_dims
    if own is not None and max(dims) > own:
        got = f"matryoshka_dims {dims}"
        raise ConfigError(explain(got, f"at most the encoder's own {own}", "lower the largest"))
    weights = [1.0 / len(dims)] * len(dims)
    return MatryoshkaLoss(encoder, loss, list(dims), weights)


class PairCollator:
    """Rows {"row": index of a pair} -> features of queries, positives and global negatives.

    The global negatives are drawn from a generator seeded by the batch itself, so that a resumed
    run, which skips batches without collating them, sees the negatives of the straight one.
    """

    valid_label_columns: Sequence[str] = ("label",)

    def __init__(
        self,
        encoder: SentenceTransformer,
        store: Store,
        pairs: Sequence[PositivePair],
        config: ContrastiveConfig,
    ) -> None:
        self.encoder = encoder
        self.pairs = pairs
        self.config = config
        self.products = store.product_by_id
        self.queries = store.query_by_id
        self.catalogue = list(self.products)
        every = every_positive(store, config.min_grade, config.interactions)
        self.known = known_positives(store, every)
        self.copies = Copies(self.products)

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Features by column, and label {"masked": [B, P], "weight": [B]}."""
        batch = [self.pairs[r["row"]] for r in rows]
        negatives = self._draw([r["row"] for r in rows])
        texts = {
            "query": [self.queries[p.query_id].text for p in batch],
            "positive": [product_text(self.products[p.product_id]) for p in batch],
            "negative": [product_text(self.products[i]) for i in negatives],
        }
        return features(self.encoder, texts) | {"label": self._labels(batch, negatives)}

    def _draw(self, rows: Sequence[int]) -> list[str]:
        digest = hashlib.sha256(f"{self.config.seed}:{list(rows)}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        count = min(self.config.global_negatives, len(self.catalogue))
        picks = rng.choice(len(self.catalogue), size=count, replace=False)
        return [self.catalogue[i] for i in picks]

    def _labels(self, batch: Sequence[PositivePair], negatives: list[str]) -> dict[str, Any]:
        masked = torch.zeros(len(batch), len(batch) + len(negatives), dtype=torch.bool)
        if self.config.mask_false_negatives:
            masked = masked_columns(batch, self.known, self.copies, negatives)
        weight = torch.tensor([p.weight for p in batch], dtype=torch.float32)
        return {"masked": masked, "weight": weight}


def train_contrastive(
    encoder_dir: str,
    store: Store,
    config: ContrastiveConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Fine-tune the encoder on the train split and save it to `out` [TaoSearchEmb s3.1].

    Goes on from the newest checkpoint in `scratch`, if there is one, to the result of the
    uninterrupted run. Logs `embedder/contrastive/{loss,grad_norm,learning_rate}`.

    Returns:
        final numbers: pairs, steps, and loss (the mean over the steps of this call).

    Raises:
        DataContractError: no positives. DivergenceError: the loss is not finite.
    """
    pairs = positive_pairs(store, config)
    encoder = load_encoder(encoder_dir, device)
    return {"pairs": float(len(pairs))} | fit(
        encoder,
        contrastive_loss(encoder, config),
        PairCollator(encoder, store, pairs, config),
        len(pairs),
        config,
        "contrastive",
        out,
        scratch,
        sink,
        device,
    )
