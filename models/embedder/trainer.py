"""What sentence-transformers' trainer needs beside a loss module of ours [TaoSearchEmb s3.2].

    trainer = SentenceTransformerTrainer(..., loss=loss)
    trainer.add_callback(RetrievalWatch(trainer, loss, queries, relevant, catalogue, keep=folder))

Consumes a trainer with one of the modules of `retrieval_grpo.py` -> produces its metrics in the
trainer's logs, and a run that stops when the encoder collapses, the last good one kept; with
`repeated`, batches that come several times in a row, for several steps on one.

Shapes: Q queries, N products, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from models.embedder.encoder import encode, encode_products, replace
from models.errors import ConfigError, DivergenceError, explain
from models.index.exact import top_k
from models.types import Product, Query

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

    from models.embedder.retrieval_grpo import RetrievalGRPOLoss


class RetrievalWatch(TrainerCallback):  # type: ignore[misc]
    """Logs what the loss module knows, and stops a run whose encoder collapses [TaoSearchEmb s3.2].

    Logged whenever the trainer logs: `last_metrics` as grpo/<name>. At the start and every `every`
    steps: grpo/val_recall (share of a query's relevant products in its Top-k, mean over queries)
    and grpo/spread (1 - |mean product vector|^2; 0 when all products coincide).

    Args:
        queries, relevant: validation queries and {query_id: ids of their relevant products}.
        catalogue: products searched; a sample with the relevant ones among them is enough.
        keep: folder of the last encoder that had not collapsed; written by the main process.
        every: steps between two looks. k: cut-off of the recall.
        collapse_recall, collapse_spread: shares of the start's below which the run stops.

    Raises:
        ConfigError: no query with a relevant product in the catalogue.
        DivergenceError: out of the training, on a collapse; it names `keep`.
    """

    def __init__(
        self,
        trainer: SentenceTransformerTrainer,
        loss: RetrievalGRPOLoss,
        queries: Sequence[Query],
        relevant: Mapping[str, Collection[str]],
        catalogue: Sequence[Product],
        keep: Path,
        every: int = 50,
        k: int = 10,
        collapse_recall: float = 0.5,
        collapse_spread: float = 0.2,
    ) -> None:
        held = {product.product_id for product in catalogue}
        self.relevant = {
            q.query_id: there
            for q in queries
            if (there := held.intersection(relevant.get(q.query_id, ())))
        }
        self.queries = [q for q in queries if q.query_id in self.relevant]
        if not self.queries or every < 1 or k < 1:
            got = f"{len(self.queries)} queries with a relevant product in the catalogue, "
            got += f"every = {every}, k = {k}"
            raise ConfigError(explain(got, "one of each at least", "give validation queries"))
        self.trainer, self.loss, self.catalogue = trainer, loss, list(catalogue)
        self.keep, self.every, self.k = keep, every, k
        self.least = {"grpo/val_recall": collapse_recall, "grpo/spread": collapse_spread}
        self.start: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The look that later ones are compared with."""
        self.start = self._look()
        self._save()
        self.trainer.log(dict(self.start))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A look when it is due."""
        if state.global_step % self.every:
            return
        now, due = self._look(), control.should_log
        self.trainer.log(dict(now))
        control.should_log = due  # logging sets it back, and the loss is still to be logged
        for name, share in self.least.items():
            if now[name] < share * self.start[name]:
                got = f"{name} {now[name]:.4f} at step {state.global_step}, "
                got += f"{self.start[name]:.4f} at the start"
                do = f"lower the learning rate or raise beta; {self.keep} holds the last good one"
                raise DivergenceError(explain(got, f"{share:.0%} of the start's or more", do))
        self._save()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The module's numbers beside the trainer's own."""
        if logs and "loss" in logs:
            self.trainer.log({f"grpo/{k}": float(v) for k, v in self.loss.last_metrics.items()})

    @property
    def _encoder(self) -> SentenceTransformer:
        encoder: SentenceTransformer = getattr(self.loss.model, "module", self.loss.model)
        return encoder

    def _look(self) -> dict[str, float]:
        products_ND = encode_products(self._encoder, self.catalogue)
        queries_QD = encode(self._encoder, [q.text for q in self.queries], prompt="query")
        found_QK = top_k(queries_QD @ products_ND.T, self.k)
        recalls = []
        for query, row in zip(self.queries, found_QK, strict=True):
            wanted = self.relevant[query.query_id]
            shown = {self.catalogue[i].product_id for i in row}
            recalls.append(len(wanted & shown) / len(wanted))
        centre_D = products_ND.mean(0)
        spread = float(1.0 - centre_D @ centre_D)
        return {"grpo/val_recall": float(np.mean(recalls)), "grpo/spread": spread}

    def _save(self) -> None:
        """Replace what is kept, whole or not at all."""
        if self.trainer.is_world_process_zero():
            replace(self._encoder, self.keep)


def repeated(inner_steps: int, processes: int = 1) -> Callable[..., Any]:
    """For `SentenceTransformerTrainingArguments.batch_sampler`: every batch `inner_steps` times in
    a row on the process that gets it, otherwise shuffled as by default.

    processes: how many train together; each gets every so manieth batch, so that many go round.
    `num_train_epochs` counts passes over the data, of so many steps each.
    """
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import RandomSampler

    class Repeated(DefaultBatchSampler):  # type: ignore[misc]
        def __init__(self, dataset: Any, *arguments: Any, **named: Any) -> None:
            rows = RandomSampler(dataset, generator=named.get("generator"))
            super().__init__(rows, *arguments, **named)

        def __iter__(self) -> Iterator[list[int]]:
            held: list[list[int]] = []
            for batch in super().__iter__():
                held.append(batch)
                if len(held) == processes:
                    yield from held * inner_steps
                    held = []
            yield from held * inner_steps

        def __len__(self) -> int:
            return int(super().__len__()) * inner_steps

    return Repeated
