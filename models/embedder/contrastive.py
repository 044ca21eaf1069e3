"""Contrastive SFT: InfoNCE with in-batch and global random negatives [TaoSearchEmb s3.1].

Consumes an encoder folder and a store's train split -> produces an encoder folder.

No hard-negative mining anywhere, as in the paper. Departures (ours): pairs are weighted by grade;
known positives of a query and copies of its own positive are no negatives of it; long batches can
be embedded in chunks (gradient caching) with the gradient of the full batch.

Shapes: B pairs, N global negatives, P = B + N, D dim.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models.embedder.config import ContrastiveConfig
from models.embedder.encoder import load_encoder
from models.errors import DataContractError, DivergenceError, explain
from models.lm.precision import has_bf16
from models.objectives.infonce import false_negatives, infonce
from models.store import Store
from models.text import product_text
from models.types import MetricSink

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PositivePair:
    """A query and a product that answers it, with a weight > 0."""

    query_id: str
    product_id: str
    weight: float


def positive_pairs(
    store: Store, config: ContrastiveConfig, split: str = "train"
) -> list[PositivePair]:
    """Judgments with grade >= min_grade, and cart and purchase events, of one split's queries.

    A pair of both kinds appears once, with its judged weight; an event never overrules a judgment
    below `min_grade`. Order: as in the tables; a cut to `max_pairs` is drawn with `seed`.

    Raises:
        DataContractError: fewer than two pairs.
    """
    qrels = store.qrels(split)
    weights = _judged_weights(store, qrels, config.min_grade)
    if config.interactions:
        wanted = set(store.query_ids(split))
        columns = (store.interactions[c].to_pylist() for c in ("query_id", "product_id", "event"))
        for q, p, event in zip(*columns, strict=True):
            if event in ("cart", "purchase") and q in wanted and p not in qrels.get(q, {}):
                weights.setdefault((q, p), 1.0)
    pairs = [PositivePair(q, p, w) for (q, p), w in weights.items() if p in store.product_by_id]
    if len(pairs) < 2:
        raise DataContractError(
            explain(
                f"{len(pairs)} positive pairs in the {split} split",
                f"at least two judgments with grade >= {config.min_grade}, or cart events",
                "lower min_grade, or add labelled queries",
            )
        )
    if config.max_pairs is not None and len(pairs) > config.max_pairs:
        keep = np.random.default_rng(config.seed).permutation(len(pairs))[: config.max_pairs]
        pairs = [pairs[i] for i in sorted(keep.tolist())]
    return pairs


def _judged_weights(
    store: Store, qrels: Mapping[str, Mapping[str, int]], min_grade: int
) -> dict[tuple[str, str], float]:
    columns = [store.judgments[c].to_pylist() for c in ("query_id", "product_id", "weight")]
    own = {(q, p): 1.0 if w is None else w for q, p, w in zip(*columns, strict=True)}
    return {
        (q, p): own[q, p] * (grade - 1) / 3
        for q, row in qrels.items()
        for p, grade in row.items()
        if grade >= min_grade
    }


def known_positives(store: Store, pairs: Sequence[PositivePair]) -> dict[str, set[str]]:
    """Products that are no honest negatives of a query: its positives, and any of grade >= 3."""
    known: dict[str, set[str]] = {}
    for q, row in store.qrels("train").items():
        known[q] = {p for p, grade in row.items() if grade >= 3}
    for pair in pairs:
        known.setdefault(pair.query_id, set()).add(pair.product_id)
    return known


class ContrastiveLoss(nn.Module):
    """InfoNCE as a sentence-transformers loss: (query, positive[, global negatives]) columns.

    Like MultipleNegativesRankingLoss, and equal to it in batch; the third column may have any
    number of rows, shared by the whole batch [TaoSearchEmb s3.1].

    Args:
        chunk: embed at most this many texts at once with gradient caching; the gradient is that of
            the full batch (dropout is replayed).
    """

    def __init__(
        self, model: SentenceTransformer, tau: float = 0.05, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tau = tau
        self.chunk = chunk

    def forward(
        self, sentence_features: Sequence[dict[str, Any]], labels: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """The loss; `labels` may hold `masked` [B, P] (bool) and `weight` [B]."""
        columns = list(sentence_features)
        extra = labels if isinstance(labels, Mapping) else {}
        if self.chunk is None or not torch.is_grad_enabled():
            return self._loss([self._embed(c) for c in columns], extra)
        return self._cached(columns, extra)

    def _embed(self, features: Mapping[str, Any]) -> torch.Tensor:
        return self.model(dict(features))["sentence_embedding"].float()

    def _loss(self, vectors: Sequence[torch.Tensor], extra: Mapping[str, Any]) -> torch.Tensor:
        negatives = vectors[2] if len(vectors) > 2 else None
        masked, weight = extra.get("masked"), extra.get("weight")
        return infonce(vectors[0], vectors[1], negatives, self.tau, masked, weight)

    def _cached(
        self, columns: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]
    ) -> torch.Tensor:
        """Vectors without a graph, loss on them, then forward again by chunks in backward."""
        chunks = [_split(c, self.chunk or 1) for c in columns]
        states: list[list[torch.Tensor]] = []
        vectors: list[torch.Tensor] = []
        with torch.no_grad():
            for column in chunks:
                states.append([])
                rows = []
                for piece in column:
                    states[-1].append(torch.get_rng_state())
                    rows.append(self._embed(piece))
                vectors.append(torch.cat(rows))
        leaves = [v.detach().requires_grad_() for v in vectors]
        loss = self._loss(leaves, extra)
        grads = torch.autograd.grad(loss, leaves)
        hook_on = loss.detach().clone().requires_grad_()

        def replay(scale: torch.Tensor) -> None:
            after = torch.get_rng_state()
            for column, column_states, grad in zip(chunks, states, grads, strict=True):
                offset = 0
                for piece, state in zip(column, column_states, strict=True):
                    torch.set_rng_state(state)
                    with torch.enable_grad():
                        out = self._embed(piece)
                        ((out * grad[offset : offset + len(out)]).sum() * scale).backward()
                    offset += len(out)
            torch.set_rng_state(after)

        hook_on.register_hook(replay)
        return hook_on


def _split(features: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    num_rows = next(v for v in features.values() if isinstance(v, torch.Tensor)).shape[0]
    return [
        {
            k: v[start : start + size] if isinstance(v, torch.Tensor) else v
            for k, v in features.items()
        }
        for start in range(0, num_rows, size)
    ]


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
        self.known = known_positives(store, pairs)

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Features by column, and label {"masked": [B, P], "weight": [B]}."""
        batch = [self.pairs[r["row"]] for r in rows]
        negatives = self._draw([r["row"] for r in rows])
        texts = {
            "query": [self.queries[p.query_id].text for p in batch],
            "positive": [product_text(self.products[p.product_id]) for p in batch],
            "negative": [product_text(self.products[i]) for i in negatives],
        }
        out: dict[str, Any] = {"label": self._labels(batch, negatives)}
        for column, values in texts.items():
            if values:
                side = "query" if column == "query" else "document"
                prompt = self.encoder.prompts.get(side) or None
                features = self.encoder.preprocess(values, prompt=prompt)
                out |= {f"{column}_{key}": value for key, value in features.items()}
        return out

    def _draw(self, rows: Sequence[int]) -> list[str]:
        digest = hashlib.sha256(f"{self.config.seed}:{list(rows)}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        count = min(self.config.global_negatives, len(self.catalogue))
        picks = rng.choice(len(self.catalogue), size=count, replace=False)
        return [self.catalogue[i] for i in picks]

    def _labels(self, batch: Sequence[PositivePair], negatives: list[str]) -> dict[str, Any]:
        known = [self.known[p.query_id] for p in batch]
        if not self.config.mask_false_negatives:
            known = [set() for _ in batch]
        masked = false_negatives(known, [p.product_id for p in batch], negatives)
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
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint, set_seed

    pairs = positive_pairs(store, config)
    encoder = load_encoder(encoder_dir, device)
    limit = encoder.max_seq_length
    if config.max_tokens is not None:
        encoder.max_seq_length = min(config.max_tokens, limit or config.max_tokens)
    set_seed(config.seed)
    scratch.mkdir(parents=True, exist_ok=True)
    collator = PairCollator(encoder, store, pairs, config)
    log_first_batch(collator)
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=_arguments(config, len(pairs), scratch, device),
        train_dataset=Dataset.from_dict({"row": list(range(len(pairs)))}),
        loss=ContrastiveLoss(encoder, config.tau, config.chunk),
        data_collator=collator,
        callbacks=[_sink_callback(sink)],
    )
    trainer.remove_callback(PrinterCallback)
    result = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(scratch)))
    encoder.max_seq_length = limit
    encoder.eval().save_pretrained(str(out), safe_serialization=True, create_model_card=False)
    return {
        "pairs": float(len(pairs)),
        "steps": float(result.global_step),
        "loss": float(result.training_loss),
    }


def log_first_batch(collator: PairCollator) -> None:
    """Log what the model is going to read, once."""
    count = min(3, len(collator.pairs))
    features = collator([{"row": i} for i in range(count)])
    tokenizer = collator.encoder.tokenizer
    for row in range(count):
        query = tokenizer.decode(features["query_input_ids"][row], skip_special_tokens=True)
        product = tokenizer.decode(features["positive_input_ids"][row], skip_special_tokens=True)
        weight = collator.pairs[row].weight
        log.info("first batch: query %r -> positive %r, weight %.2f", query, product, weight)


def _arguments(config: ContrastiveConfig, num_pairs: int, scratch: Path, device: str) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    batch_size = min(config.batch_size, num_pairs)
    steps = config.steps or max(1, math.ceil(config.epochs * (num_pairs // batch_size)))
    return SentenceTransformerTrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=config.lr,
        warmup_steps=round(config.warmup_ratio * steps),
        bf16=config.bf16 and has_bf16(device),
        use_cpu=device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=max(1, min(10, steps // 5)),
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,  # the callback below has a bar that says what it is doing
    )


def _sink_callback(sink: MetricSink) -> TrainerCallback:
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class SinkCallback(TrainerCallback):
        """Shows progress, passes the numbers on, and stops a run whose loss is not finite."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="contrastive sft",
                unit="step",
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: Mapping[str, Any] | None = None,
            **kwargs: Any,
        ) -> None:
            numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
            if not math.isfinite(numbers.get("loss", 0.0)):
                raise DivergenceError(
                    explain(
                        f"loss {numbers['loss']} at step {state.global_step}",
                        "a finite loss",
                        "lower lr, or raise tau",
                    )
                )
            kept = ("loss", "grad_norm", "learning_rate")
            metrics = {f"embedder/contrastive/{k}": numbers[k] for k in kept if k in numbers}
            if metrics:
                if "loss" in numbers:
                    self.bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
                sink.log(metrics, state.global_step)

    return SinkCallback()
