"""One run of Retrieval-GRPO: its data, its loop, its watch and its checkpoints [TaoSearchEmb s3.2].

Consumes what `retrieval_grpo.train_retrieval_grpo` is given -> produces checkpoints in `scratch`,
the best encoder among them. The scientific choices are listed in `retrieval_grpo.py`.

Shapes: Q queries, K candidates, U distinct products of a batch, D dim.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.embedder.candidates import CandidatePool, batch_pool, sample_pool, stale_share
from models.embedder.chunked import CachedTexts, Embed
from models.embedder.config import RetrievalGRPOConfig
from models.embedder.encoder import encode, encode_products, load_encoder, replace
from models.embedder.ordering import Order, encoder_order, judged_groups, lead, reward_orders
from models.embedder.pairs import (
    Copies,
    PositivePair,
    cut_pairs,
    every_positive,
    known_positives,
    masked_columns,
)
from models.embedder.retrieval_grpo import cosines, retrieval_grpo
from models.errors import ConfigError, DataContractError, DivergenceError, explain
from models.lm.precision import autocast
from models.objectives.infonce import infonce
from models.rewards.base import Counting, Reward, total_reward
from models.store import Store
from models.text import product_text
from models.types import RELEVANT_GRADE, MetricSink, Product, Query

log = logging.getLogger(__name__)
JUDGE = "relevance"
"""The reward whose order is compared with the encoder's."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What one look at the validation split says.

    val_recall: mean share of the relevant products in the Top-k. val_reward: weighted sum of the
    Top-k's mean rewards, each over the queries it is read on. spread: 1 - |mean vector|^2 of the
    pool, 0 when all products coincide. recalls, rewards: the recall of each query and its Top-k's
    mean of each reward, in the order of the run. order: share of labelled pairs of one query's
    products that the encoder puts in the labels' order; NaN without such pairs.
    """

    step: int
    val_recall: float
    val_reward: float
    spread: float
    terms: Mapping[str, float]
    recalls: Sequence[float] = ()
    rewards: Mapping[str, Sequence[float]] = field(default_factory=dict)
    order: float = math.nan

    def numbers(self) -> dict[str, float]:
        """Flat, for a sink."""
        named = {f"val_reward/{name}": value for name, value in self.terms.items()}
        own = {"val_recall": self.val_recall, "val_reward": self.val_reward, "spread": self.spread}
        order = {} if math.isnan(self.order) else {"val_order": self.order}
        return own | order | named


def acceptable(watch: Watch, start: Watch, config: RetrievalGRPOConfig) -> bool:
    """Whether an encoder may be chosen: neither recall nor a guarded reward fell beyond noise."""

    def held(now: float, before: float, error: float, allowed: float = 0.0) -> bool:
        return now >= before - allowed - config.noise * error - 1e-9

    recall_error = standard_error(watch.recalls, start.recalls)
    recall_held = held(watch.val_recall, start.val_recall, recall_error, config.max_recall_loss)
    return recall_held and all(
        held(
            watch.terms[name],
            start.terms[name],
            standard_error(watch.rewards.get(name, ()), start.rewards.get(name, ())),
        )
        for name in config.guard
        if name in start.terms
    )


def standard_error(now: Sequence[float], before: Sequence[float]) -> float:
    """Of the mean paired difference of two series: std / sqrt(n); 0 below two values."""
    delta = np.asarray(now) - np.asarray(before)
    return float(delta.std(ddof=1) / math.sqrt(len(delta))) if len(delta) > 1 else 0.0


def collapse(watch: Watch, start: Watch, config: RetrievalGRPOConfig) -> str | None:
    """What collapsed, in words, or None."""
    if watch.spread < config.collapse_spread * start.spread:
        return f"spread {watch.spread:.4f} at step {watch.step}, {start.spread:.4f} before"
    if watch.val_recall < config.collapse_recall * start.val_recall:
        return f"recall {watch.val_recall:.3f} at step {watch.step}, {start.val_recall:.3f} before"
    return None


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries, the pool rows of their candidates, and what those earned."""

    rows: np.ndarray  # numbers of the train queries [Q]
    candidates_QK: np.ndarray
    products_QKD: np.ndarray | None  # as they were chosen by; None: embedded anew, with gradient
    rewards_QK: torch.Tensor
    ref_scores_QK: torch.Tensor
    old_scores_QK: torch.Tensor | None
    terms: dict[str, float]


class Run:
    """One training run: its data, its state, and how both are saved."""

    def __init__(
        self,
        encoder_dir: str,
        store: Store,
        rewards: Sequence[Reward],
        config: RetrievalGRPOConfig,
        scratch: Path,
        sink: MetricSink,
        device: str,
    ) -> None:
        self.store, self.rewards, self.config = store, rewards, config
        self.scratch, self.sink = scratch, sink
        self.encoder_dir, self.device = encoder_dir, device
        scratch.mkdir(parents=True, exist_ok=True)
        self._choose_data()
        self._load(encoder_dir)
        self.step = 0
        self.watches: list[Watch] = []
        self.orders: dict[str, float] = {}
        self.best: Watch | None = None

    def _load(self, folder: str) -> None:
        self.encoder = load_encoder(folder, self.device)  # in eval mode, and stays there
        self.encoder.truncate_dim = self.config.dim  # all that follows sees what is served
        self.own_limit = self.encoder.max_seq_length
        if self.config.max_tokens is not None:
            limit = self.own_limit or self.config.max_tokens
            self.encoder.max_seq_length = min(self.config.max_tokens, limit)
        self.optimiser = torch.optim.AdamW(
            self.encoder.parameters(), lr=self.config.lr, weight_decay=0.0
        )

    def _choose_data(self) -> None:
        store, config = self.store, self.config
        rng = np.random.default_rng(config.seed)
        judged = store.qrels("train")
        train = store.query_ids("train")
        if config.pool == "batch":
            train = [q for q in train if judged.get(q)]
        qrels = {
            q: relevant
            for q, row in store.qrels("validation").items()
            if (relevant := {p for p, grade in row.items() if grade >= RELEVANT_GRADE})
        }
        if not train or not qrels:
            raise DataContractError(
                explain(
                    f"{len(train)} train and {len(qrels)} judged validation queries",
                    "at least one of each (for pool=batch a judged train query)",
                    "check the split and the grades of this store",
                )
            )
        self.queries = [store.query_by_id[q] for q in _some(train, config.max_queries, rng)]
        self.val_relevant = {q: qrels[q] for q in _some(list(qrels), config.val_queries, rng)}
        self.judged = {q.query_id: list(judged.get(q.query_id, ())) for q in self.queries}
        keep = {p for row in self.judged.values() for p in row}
        for relevant in self.val_relevant.values():
            keep |= relevant
        self.groups = judged_groups(
            store, "validation", list(self.val_relevant), config.order_products, config.seed
        )
        catalogue = list(store.product_by_id)
        ids = sample_pool(catalogue, keep, config.pool_size, config.seed)
        self.pool = CandidatePool([store.product_by_id[p] for p in ids], bf16=config.bf16)
        self.anchor: list[PositivePair] = []
        if config.sft_weight > 0:
            every = every_positive(store, config.min_grade, config.interactions)
            self.anchor = cut_pairs(every, config.anchor_pairs, config.seed)
            self.known = known_positives(store, every)
            self.copies = Copies(store.product_by_id)
        if config.pool == "batch":
            self._check_batches()
        log.info("rgrpo: %d queries, pool of %d products", len(self.queries), len(ids))

    def _check_batches(self) -> None:
        """Every batch of the run gathers at least k products.

        Raises:
            ConfigError: one does not.
        """
        config = self.config
        for number in range(math.ceil(config.steps / config.inner_steps)):
            rows = self._query_rows(number)
            if (held := len(self._gathered([self.queries[i] for i in rows]))) < config.k:
                raise ConfigError(
                    explain(
                        f"{held} judged products in batch {number} of {len(rows)} queries",
                        f"at least k = {config.k} in every batch",
                        "lower k, raise batch_queries, or take pool=index",
                    )
                )

    # --- the loop -------------------------------------------------------------------------------

    def train(self) -> None:
        """All steps, from the newest checkpoint on."""
        from tqdm.auto import tqdm

        if not self._resume():
            self._start()
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc="retrieval-grpo", unit="step")
        with bar:
            while self.step < config.steps:
                if self.pool.age >= config.refresh_every:
                    self._refresh()
                batch = self._draw(self.step // config.inner_steps)
                for _ in range(min(config.inner_steps, config.steps - self.step)):
                    metrics = self._update(batch)
                    bar.set_postfix(reward=f"{metrics['reward_mean']:.3f}", refresh=False)
                    bar.update()
            if self.pool.age > 0:
                self._refresh()

    def _start(self) -> None:
        self.pool.refresh(self.encoder, "retrieval-grpo: embedding the pool")
        texts = [q.text for q in self.queries]
        self.ref_queries_QD = encode(self.encoder, texts, prompt="query", bf16=self.config.bf16)
        self.ref_pool_ND = self.pool.vectors_ND
        np.savez(self.scratch / "reference.npz", queries=self.ref_queries_QD, pool=self.ref_pool_ND)
        own = encoder_order(self.encoder, self.groups, self.config.bf16)
        self._look(self._val_vectors(), own)
        self._compare_orders(own)
        self._checkpoint()

    def _compare_orders(self, own: Order) -> None:
        """Log how each reward orders labelled products, and warn when the judge knows no more than
        the encoder does.
        """
        orders = reward_orders(self.rewards, self.groups)
        self.orders = {name: order.accuracy for name, order in orders.items()}
        self.sink.log({f"embedder/rgrpo/val_order/{n}": v for n, v in self.orders.items()}, 0)
        if JUDGE not in orders:
            return
        ahead, error = lead(orders[JUDGE], own)
        told = (
            f"of {sum(own.pairs)} pairs of one query's products ({len(self.groups)} queries) the "
            f"judge has {self.orders[JUDGE]:.0%} in the labels' order, the encoder "
            f"{own.accuracy:.0%}; a lead of {100 * ahead:.0f} points, standard error "
            f"{100 * error:.0f}"
        )
        if ahead > error:
            log.info("rgrpo: %s", told)
        else:
            log.warning("rgrpo: %s; it has little to teach (infra/LOG.md, 'Who can teach')", told)

    def _refresh(self) -> None:
        """Embed the pool anew, and say how wrong the old one had become."""
        vectors_QD, k = self._val_vectors(), min(self.config.k, len(self.pool.products))
        stale_QK = self.pool.top_k(vectors_QD, k)
        self.pool.refresh(self.encoder, f"retrieval-grpo: pool at step {self.step}")
        stale = stale_share(stale_QK, self.pool.top_k(vectors_QD, k))
        self.sink.log({"embedder/rgrpo/stale_share": stale}, self.step)
        self._look(vectors_QD, encoder_order(self.encoder, self.groups, self.config.bf16))
        self._checkpoint()

    def _draw(self, number: int) -> Batch:
        """Batch `number`: queries, Top-K of the live encoder, rewards [TaoSearchEmb s3.2]."""
        config = self.config
        rows = self._query_rows(number)
        queries = [self.queries[i] for i in rows]
        vectors_QD = encode(
            self.encoder, [q.text for q in queries], prompt="query", bf16=config.bf16
        )
        candidates_QK, products_QKD = self._candidates(queries, vectors_QD)
        products = [[self.pool.products[i] for i in row] for row in candidates_QK]
        total, terms = total_reward(self.rewards, queries, products)
        ref_scores = np.einsum(
            "qd,qkd->qk", self.ref_queries_QD[rows], self.ref_pool_ND[candidates_QK]
        )
        if number == 0:
            self._log_first(queries, products, total)
        batch = Batch(
            rows,
            candidates_QK,
            None if config.towers == "both" else products_QKD,
            torch.from_numpy(total).to(self.device),
            torch.from_numpy(ref_scores).to(self.device),
            None,
            {name: float(values.mean()) for name, values in terms.items()},
        )
        if config.inner_steps == 1:
            return batch
        with torch.no_grad(), autocast(self.device, config.bf16):
            plain = CachedTexts(self.encoder, config.chunk).embed
            return dataclasses.replace(batch, old_scores_QK=self._scores(batch, plain))

    def _query_rows(self, number: int) -> np.ndarray:
        """The queries of batch `number`: seeded permutations, one after the other, nothing kept."""
        count = len(self.queries)
        first = number * self.config.batch_queries
        places = range(first, first + min(self.config.batch_queries, count))
        orders = {epoch: self._permutation(epoch) for epoch in {i // count for i in places}}
        return np.array([orders[i // count][i % count] for i in places])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.config.seed, 2, epoch)).permutation(len(self.queries))

    def _candidates(
        self, queries: Sequence[Query], vectors_QD: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pool rows [Q, K] of the Top-K, and the vectors [Q, K, D] that they were chosen by."""
        k = self.config.k
        if self.config.pool == "index":
            rows_QK = self.pool.top_k(vectors_QD, k)
            return rows_QK, self.pool.vectors_ND[rows_QK]
        rows = self._gathered(queries)
        products = [self.pool.products[i] for i in rows]
        vectors_PD = encode_products(self.encoder, products, bf16=self.config.bf16)
        rows_QK = batch_pool(rows, vectors_QD @ vectors_PD.T, k)
        place_of = {row: place for place, row in enumerate(rows)}
        places_QK = np.vectorize(place_of.__getitem__)(rows_QK)
        return rows_QK, vectors_PD[places_QK]

    def _gathered(self, queries: Sequence[Query]) -> list[int]:
        """Pool rows of the products judged for the queries, whatever their grade; distinct."""
        ids = dict.fromkeys(p for q in queries for p in self.judged[q.query_id])
        return [self.pool.row_of[p] for p in ids]

    def _scores(self, batch: Batch, embed_texts: Embed) -> torch.Tensor:
        """Live cosines [Q, K] in float32, with gradient to the towers the config names."""
        q_QD = embed_texts([self.queries[i].text for i in batch.rows], "query")
        if batch.products_QKD is not None:
            d_QKD = torch.from_numpy(batch.products_QKD).to(q_QD)
        else:
            distinct, inverse = np.unique(batch.candidates_QK, return_inverse=True)
            products = [product_text(self.pool.products[i]) for i in distinct]
            d_UD = embed_texts(products, "document")
            d_QKD = d_UD[torch.from_numpy(inverse.reshape(batch.candidates_QK.shape))]
        return cosines(q_QD, d_QKD)

    def _update(self, batch: Batch) -> dict[str, float]:
        config = self.config
        texts = CachedTexts(self.encoder, config.chunk)
        with autocast(self.device, config.bf16):
            scores_QK = self._scores(batch, texts.embed)
            anchor = self._anchor_loss(texts.embed)
        group = retrieval_grpo(
            scores_QK,
            batch.rewards_QK,
            batch.ref_scores_QK,
            batch.old_scores_QK,
            tau=config.tau,
            beta=config.beta,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            floor=config.std_floor,
            advantage=config.advantage,
        )
        loss = group.loss + config.sft_weight * anchor
        metrics = group.metrics | {"loss": float(loss.detach()), "sft_loss": float(anchor.detach())}
        metrics |= {f"reward/{name}": value for name, value in batch.terms.items()}
        if not math.isfinite(metrics["loss"]):
            raise DivergenceError(
                explain(
                    f"loss {metrics['loss']} at step {self.step} after {metrics}",
                    "a finite loss",
                    "lower lr or raise beta",
                )
            )
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = self._lr()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        with autocast(self.device, config.bf16):
            texts.backward()
        norm = nn.utils.clip_grad_norm_(self.encoder.parameters(), config.max_grad_norm)
        self.optimiser.step()
        metrics |= {"grad_norm": float(norm), "pool_age": float(self.pool.age)}
        self.step += 1
        self.pool.age += 1
        metrics |= {"learning_rate": self._lr()}
        self.sink.log({f"embedder/rgrpo/{k}": v for k, v in metrics.items()}, self.step)
        return metrics

    def _anchor_loss(self, embed_texts: Embed) -> torch.Tensor:
        """InfoNCE on train positives, in-batch negatives, known positives masked."""
        if not self.anchor:
            return torch.zeros((), device=self.device)
        rng = np.random.default_rng((self.config.seed, 1, self.step))
        size = min(self.config.sft_batch, len(self.anchor))
        pairs = [self.anchor[i] for i in rng.permutation(len(self.anchor))[:size]]
        queries = [self.store.query_by_id[p.query_id].text for p in pairs]
        products = [product_text(self.store.product_by_id[p.product_id]) for p in pairs]
        masked = masked_columns(pairs, self.known, self.copies)
        return infonce(
            embed_texts(queries, "query"),
            embed_texts(products, "document"),
            tau=self.config.tau,
            masked_BP=masked.to(self.device),
            weight_B=torch.tensor([p.weight for p in pairs], device=self.device),
        )

    def _lr(self) -> float:
        config = self.config
        if self.step < config.warmup_steps:
            return config.lr * (self.step + 1) / config.warmup_steps
        left = max(config.steps - self.step, 1) / max(config.steps - config.warmup_steps, 1)
        return config.lr * min(left, 1.0)

    # --- the watch ------------------------------------------------------------------------------

    def _val_vectors(self) -> np.ndarray:
        """The validation queries [Q, D], embedded now."""
        texts = [self.store.query_by_id[q].text for q in self.val_relevant]
        return encode(self.encoder, texts, prompt="query", bf16=self.config.bf16)

    def _look(self, vectors_QD: np.ndarray, own: Order) -> None:
        """Recall, rewards and spread on validation; keeps the best encoder, stops a collapse."""
        watch = self._watch(vectors_QD, own)
        self.watches.append(watch)
        self.sink.log({f"embedder/rgrpo/{k}": v for k, v in watch.numbers().items()}, self.step)
        log.info("rgrpo step %d: %s", self.step, watch.numbers())
        start = self.watches[0]
        if what := collapse(watch, start, self.config):
            raise DivergenceError(
                explain(what, "an encoder that keeps its recall", "lower lr or raise beta")
            )
        better = self.best is None or watch.val_reward > self.best.val_reward
        if better and acceptable(watch, start, self.config):
            self.best = watch
            self._save(self._best_folder(watch))

    def _watch(self, vectors_QD: np.ndarray, own: Order) -> Watch:
        config = self.config
        queries = [self.store.query_by_id[q] for q in self.val_relevant]
        k = min(config.recall_k, len(self.pool.products))
        products = [[self.pool.products[i] for i in row] for row in self.pool.top_k(vectors_QD, k)]
        recalls = [
            len(relevant & {p.product_id for p in found}) / len(relevant)
            for relevant, found in zip(self.val_relevant.values(), products, strict=True)
        ]
        terms: dict[str, np.ndarray] = {}
        for free, count in ((True, len(queries)), (False, config.val_reward_queries)):
            asked = [r for r in self.rewards if getattr(r, "free", False) == free]
            if asked:
                terms |= total_reward(asked, queries[:count], products[:count])[1]
        centre_D = self.pool.vectors_ND.mean(0)
        return Watch(
            step=self.step,
            val_recall=float(np.mean(recalls)),
            val_reward=sum(r.weight * float(terms[r.name].mean()) for r in self.rewards),
            spread=float(1.0 - centre_D @ centre_D),
            terms={name: float(values.mean()) for name, values in terms.items()},
            recalls=recalls,
            rewards={name: values.mean(1).tolist() for name, values in terms.items()},
            order=own.accuracy,
        )

    def _log_first(
        self, queries: Sequence[Query], products: Sequence[Sequence[Product]], total_QK: np.ndarray
    ) -> None:
        for query, row, earned in zip(queries[:2], products, total_QK, strict=False):
            pairs = list(zip(row, earned, strict=True))[:4]
            shown = [f"{p.title[:50]!r} {r:.2f}" for p, r in pairs]
            log.info("first batch: %r -> %s", query.text, ", ".join(shown))

    # --- saving ---------------------------------------------------------------------------------

    def _save(self, folder: Path) -> None:
        """Write the encoder whole or not at all."""
        limit, self.encoder.max_seq_length = self.encoder.max_seq_length, self.own_limit
        replace(self.encoder, folder)
        self.encoder.max_seq_length = limit

    def _checkpoint(self) -> None:
        """Encoder, optimiser, watches, pool and counts; the last one written is the truth, and the
        best encoder that it names is beside it."""
        folder = self.scratch / f"step-{self.step}"
        self._save(folder)
        torch.save(self.optimiser.state_dict(), folder / "optimiser.pt")
        np.save(folder / "pool.npy", self.pool.vectors_ND)
        for reward in self.rewards:
            if isinstance(reward, Counting):
                np.savez(folder / f"{reward.name}.npz", **reward.state())  # type: ignore[arg-type]
        state = {
            "step": self.step,
            "watches": [dataclasses.asdict(w) for w in self.watches],
            "orders": self.orders,
            "best": None if self.best is None else dataclasses.asdict(self.best),
        }
        pointer = self.scratch / "state.json.new"
        pointer.write_text(json.dumps(state))
        pointer.replace(self.scratch / "state.json")
        kept = {folder, None if self.best is None else self._best_folder(self.best)}
        for pattern in ("step-*", "best-*"):
            for other in self.scratch.glob(pattern):
                if other not in kept:
                    shutil.rmtree(other, ignore_errors=True)

    def _best_folder(self, watch: Watch) -> Path:
        return self.scratch / f"best-{watch.step}"

    def _resume(self) -> bool:
        """Take up the newest checkpoint; False when there is none."""
        pointer = self.scratch / "state.json"
        if not pointer.is_file():
            return False
        state = json.loads(pointer.read_text())
        folder = self.scratch / f"step-{state['step']}"
        self._load(str(folder))
        self.optimiser.load_state_dict(torch.load(folder / "optimiser.pt", weights_only=True))
        self.step = state["step"]
        self.watches = [Watch(**w) for w in state["watches"]]
        self.orders = state["orders"]
        self.best = None if state["best"] is None else Watch(**state["best"])
        self.pool.adopt(np.load(folder / "pool.npy"))
        for reward in self.rewards:
            kept = folder / f"{reward.name}.npz"  # not in checkpoints from before there were counts
            if isinstance(reward, Counting) and kept.is_file():
                reward.restore(np.load(kept))
        reference = np.load(self.scratch / "reference.npz")
        self.ref_queries_QD, self.ref_pool_ND = reference["queries"], reference["pool"]
        log.info("rgrpo: going on from step %d", self.step)
        return True

    def write_best(self, out: Path) -> None:
        """Copy the best encoder to `out`; before the first look there is none, so the start's."""
        shutil.rmtree(out, ignore_errors=True)
        if self.best is not None:
            shutil.copytree(self._best_folder(self.best), out)
        else:
            start = load_encoder(self.encoder_dir, self.device)
            start.save_pretrained(str(out), safe_serialization=True, create_model_card=False)

    def summary(self) -> dict[str, float]:
        """The watch at the start, of the best, and at the end."""
        best = self.best or self.watches[0]
        moments = {"start": self.watches[0], "best": best, "last": self.watches[-1]}
        numbers = {
            f"{name}_{key}": value
            for name, watch in moments.items()
            for key, value in watch.numbers().items()
        }
        numbers |= {f"val_order/{name}": value for name, value in self.orders.items()}
        return numbers | {"best_step": float(best.step), "steps": float(self.step)}


def _some(items: Sequence[str], count: int | None, rng: np.random.Generator) -> list[str]:
    """Up to `count` of the items, drawn at random, in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]
