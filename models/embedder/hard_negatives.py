"""Ranking loss and DPO on mined hard negatives: Retrieval-GRPO's rivals [TaoSearchEmb s4.2].

Consumes the SFT encoder, a store's train split and mined negatives -> produces an encoder folder.

Ours: the forms of both losses (`objectives/ranking.py`), and in-batch InfoNCE beside them with the
weight Retrieval-GRPO gives it, so that the rows of the table differ in the signal and not in what
holds recall.

Shapes: B pairs, H negatives of a pair, D dim.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models.embedder.config import HardNegativeConfig
from models.embedder.encoder import encode, encode_products, load_encoder, unit_vectors
from models.embedder.fitting import features, fit
from models.embedder.pairs import (
    Copies,
    PositivePair,
    every_positive,
    known_positives,
    masked_columns,
)
from models.errors import DataContractError, explain
from models.objectives.infonce import infonce
from models.objectives.ranking import hard_infonce, margin_ranking, similarity_dpo
from models.store import Store
from models.text import product_text
from models.types import MetricSink

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class HardNegativeLoss(nn.Module):
    """A positive against its own H mined negatives, as a sentence-transformers loss.

    Columns: query [B], positive [B], negative [B * H], pair by pair. Labels: `reference` [B, 1 + H]
    cosines of the start (for dpo), `masked` [B, B] for the in-batch term [TaoSearchEmb s4.2].
    """

    def __init__(self, model: SentenceTransformer, config: HardNegativeConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(
        self, sentence_features: Sequence[dict[str, Any]], labels: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss of one batch."""
        config = self.config
        q_BD, pos_BD, neg_FD = (unit_vectors(self.model, c) for c in sentence_features)
        pos_B = (q_BD * pos_BD).sum(1)
        # products and sums: autocast would make a matrix product bf16
        neg_BH = (q_BD[:, None] * neg_FD.reshape(len(q_BD), -1, q_BD.shape[1])).sum(-1)
        if config.loss == "dpo":
            ref = labels["reference"].to(pos_B)
            loss = similarity_dpo(pos_B, neg_BH, ref[:, 0], ref[:, 1:], config.tau, config.beta)
        elif config.loss == "margin":
            loss = margin_ranking(pos_B, neg_BH, config.margin)
        else:
            loss = hard_infonce(pos_B, neg_BH, config.tau)
        if config.sft_weight == 0:
            return loss
        masked = labels["masked"].to(q_BD.device)
        weight_B = labels["weight"].to(q_BD)
        anchor = infonce(q_BD, pos_BD, tau=config.tau, masked_BP=masked, weight_B=weight_B)
        return loss + config.sft_weight * anchor


class HardNegativeCollator:
    """Rows {"row": number of a pair} -> features of queries, positives and mined negatives."""

    valid_label_columns: Sequence[str] = ("label",)

    def __init__(
        self,
        encoder: SentenceTransformer,
        store: Store,
        pairs: Sequence[PositivePair],
        negatives: Mapping[str, Sequence[str]],
        config: HardNegativeConfig,
    ) -> None:
        self.encoder, self.pairs = encoder, pairs
        self.products, self.queries = store.product_by_id, store.query_by_id
        self.known = known_positives(
            store, every_positive(store, config.min_grade, config.interactions)
        )
        self.copies = Copies(self.products)
        self.negatives = {
            q: list(islice(cycle(ids), config.negatives)) for q, ids in negatives.items() if ids
        }
        self.config = config

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Features by column; label {"masked": [B, B], "weight": [B], "reference": [B, 1 + H]}."""
        numbers = [r["row"] for r in rows]
        batch = [self.pairs[i] for i in numbers]
        mined = [p for pair in batch for p in self.negatives[pair.query_id]]
        texts = {
            "query": [self.queries[p.query_id].text for p in batch],
            "positive": [product_text(self.products[p.product_id]) for p in batch],
            "negative": [product_text(self.products[p]) for p in mined],
        }
        label = {
            "masked": masked_columns(batch, self.known, self.copies),
            "weight": torch.tensor([p.weight for p in batch]),
        }
        if self.config.loss == "dpo":
            label["reference"] = self.reference[numbers]
        return features(self.encoder, texts) | {"label": label}

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """Cosines [pairs, 1 + H] of the encoder at the first call: DPO's frozen reference.

        `fit` collates a batch before it trains or resumes, so the encoder is still the start's.
        """
        query_ids = list(dict.fromkeys(p.query_id for p in self.pairs))
        rows = [[p.product_id, *self.negatives[p.query_id]] for p in self.pairs]
        product_ids = list(dict.fromkeys(p for row in rows for p in row))
        texts = [self.queries[q].text for q in query_ids]
        q_QD = dict(zip(query_ids, encode(self.encoder, texts, prompt="query"), strict=True))
        products = [self.products[p] for p in product_ids]
        d_ND = dict(zip(product_ids, encode_products(self.encoder, products), strict=True))
        cosines = [
            [float(q_QD[pair.query_id] @ d_ND[p]) for p in row]
            for pair, row in zip(self.pairs, rows, strict=True)
        ]
        return torch.tensor(np.array(cosines), dtype=torch.float32)


def train_on_hard_negatives(
    encoder_dir: str,
    store: Store,
    negatives: Mapping[str, Sequence[str]],
    config: HardNegativeConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Fine-tune the encoder on pairs whose query has mined negatives [TaoSearchEmb s4.2].

    Goes on from the newest checkpoint in `scratch`. Logs `embedder/<loss>/...` as SFT does.

    Args:
        negatives: {query_id: product ids, nearest first}; see `mining.mine`. Those that are
            positives at this `min_grade` are left out.

    Returns:
        pairs, steps and loss.

    Raises:
        DataContractError: fewer than two such pairs. DivergenceError: the loss is not finite.
    """
    every = every_positive(store, config.min_grade, config.interactions)
    copies = Copies(store.product_by_id)
    known = {q: copies.all_of(ids) for q, ids in known_positives(store, every).items()}
    negatives = {
        q: [p for p in ids if copies.of(p) not in known.get(q, ())] for q, ids in negatives.items()
    }
    pairs = [p for p in every if negatives.get(p.query_id)]
    if len(pairs) < 2:
        raise DataContractError(
            explain(
                f"{len(pairs)} positive pairs whose query has hard negatives",
                "at least two",
                "raise mining.max_queries, or lower min_grade",
            )
        )
    encoder = load_encoder(encoder_dir, device)
    encoder.truncate_dim = config.dim
    return {"pairs": float(len(pairs))} | fit(
        encoder,
        HardNegativeLoss(encoder, config),
        HardNegativeCollator(encoder, store, pairs, negatives, config),
        len(pairs),
        config,
        config.loss,
        out,
        scratch,
        sink,
        device,
    )
