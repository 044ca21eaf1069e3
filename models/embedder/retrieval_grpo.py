"""Retrieval-GRPO: the retriever learns from the judge's rewards [TaoSearchEmb s3.2].

Consumes the SFT encoder, a store's train queries and rewards -> produces an encoder folder.

Departures, all ours where the paper is silent:
1. The policy is a softmax over the K candidates, pi(d_i|q) = e^{s_i/tau} / sum_j e^{s_j/tau}.
2. The KL to the frozen SFT encoder is the exact categorical one on those candidates.
3. Groups of equal rewards are skipped and counted; the population std divides.
4. Candidates are the Top-K of the live query against a pool embedded every `refresh_every` steps;
   with both towers the K products are embedded again, with gradient, so only the choice of
   candidates is stale, never their scores.
5. An anchor term, `sft_weight` * InfoNCE on train positives, holds recall where rewards are silent.
6. Dropout is off, so that rho is exactly 1 on the first inner step.
7. The run is watched: when validation recall or the embeddings' spread collapses it stops, and the
   encoder written is the best one seen whose recall had not fallen.

The loop is not the Trainer's, since each step's data depend on the live encoder. Three loss modules
work inside SentenceTransformerTrainer: `RetrievalGRPOLoss` on candidates and rewards of the data
set, and with rewards asked for as it goes `InBatchRetrievalGRPOLoss`, as the paper has it, on the
Top-K of the gathered batch, and `IndexRetrievalGRPOLoss` on the Top-K of a whole catalogue.

Shapes: Q queries, K candidates, U distinct products of a batch, P products gathered, D dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.embedder.candidates import CandidatePool, stale_share
from models.embedder.config import RetrievalGRPOConfig
from models.embedder.encoder import features, unit_vectors
from models.errors import ConfigError, DivergenceError, explain
from models.objectives.advantages import group_advantages
from models.objectives.kl import categorical_kl
from models.objectives.surrogate import clipped_surrogate
from models.rewards.base import Reward, total_reward
from models.store import Store
from models.text import product_text
from models.types import MetricSink, Product, Query

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """The loss of a batch of groups, and what it was made of."""

    loss: torch.Tensor
    metrics: dict[str, float]


def policy_logp(scores_QK: torch.Tensor, tau: float) -> torch.Tensor:
    """log pi(d_i|q) = s_i/tau - log sum_j e^{s_j/tau} over the K candidates [TaoSearchEmb s3.2]."""
    return functional.log_softmax(scores_QK.float() / tau, dim=-1)


def cosines(query_QD: torch.Tensor, product_QKD: torch.Tensor) -> torch.Tensor:
    """[Q, K] of unit vectors [Q, D], [Q, K, D], in float32: autocast would make an einsum bf16."""
    return (query_QD[:, None] * product_QKD).sum(-1)


def retrieval_grpo(
    scores_QK: torch.Tensor,
    rewards_QK: torch.Tensor,
    ref_scores_QK: torch.Tensor,
    old_scores_QK: torch.Tensor | None = None,
    tau: float = 0.05,
    beta: float = 0.1,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    floor: float = 1e-3,
    advantage: Literal["full", "positive"] = "full",
) -> GroupLoss:
    """-J, J = 1/Q sum_q [1/K sum_i min(rho_i A_i, clip(rho_i) A_i) - beta KL] [TaoSearchEmb s3.2].

    Q counts the groups that are kept; a group of equal rewards adds neither term, and a batch of
    such groups gives loss 0 with a zero gradient. At rho = 1 and beta = 0 the gradient of J for one
    query is 1/(K tau) sum_i A_i grad s_i.

    Args:
        scores_QK: cosines of the live encoder, with gradient.
        rewards_QK: rewards; ref_scores_QK: cosines of the frozen SFT encoder.
        old_scores_QK: cosines when the batch was drawn; None: now, so rho = 1.
        advantage: "positive" sets negative advantages to 0.
    """
    logp = policy_logp(scores_QK, tau)
    old_logp = logp.detach() if old_scores_QK is None else policy_logp(old_scores_QK, tau).detach()
    advantages, kept_Q = group_advantages(rewards_QK.to(logp), floor)
    if advantage == "positive":
        advantages = advantages.clamp(min=0.0)
    surrogate, clipped = clipped_surrogate(logp, old_logp, advantages, clip_low, clip_high)
    kl_Q = categorical_kl(logp, policy_logp(ref_scores_QK, tau).detach())
    num_kept = kept_Q.sum().clamp(min=1)
    objective_Q = surrogate.mean(1) - beta * kl_Q
    loss = -(objective_Q * kept_Q).sum() / num_kept
    entropy_Q = -(logp.exp() * logp).sum(1)
    kept_share = float(kept_Q.float().mean())
    metrics = {
        "reward_mean": float(rewards_QK.float().mean()),
        "reward_std": float(rewards_QK.float().std(1, correction=0).mean()),
        "frac_reward_zero_std": 1.0 - kept_share,
        "kl": float(kl_Q.detach().mean()),
        "entropy": float(entropy_Q.detach().mean()),
        "clip_ratio": float((clipped & kept_Q[:, None]).sum() / (num_kept * logp.shape[1])),
        "expected_reward": float((logp.detach().exp() * rewards_QK).sum(1).mean()),
    }
    return GroupLoss(loss, metrics)


@dataclass(slots=True)
class _Drawn:
    """What the first step on a batch saw; further steps on it start from there."""

    read: tuple[torch.Tensor, ...]
    scores_QK: torch.Tensor | None = None
    chosen_QK: Any = None
    steps: int = 1


class RetrievalGRPOLoss(nn.Module):
    """Retrieval-GRPO as a sentence-transformers loss [TaoSearchEmb s3.2].

    Dataset columns: query, candidate_1 .. candidate_K, label = the K rewards of the row. Dropout is
    off in here, as rho and KL ask for. With one step a batch rho is 1 and nothing is clipped; with
    `inner_steps` the batches must come as often in a row (`models.embedder.trainer.repeated`), and
    candidates and pi_old stay those of the first step. `models.embedder.trainer.RetrievalWatch`
    logs `last_metrics` and stops a run that collapses.

    Args:
        model: the encoder that learns.
        reference: the frozen SFT encoder; None: a copy of `model` as it is now.
        towers: "query" stops the gradient at the candidates.
        clip_low, clip_high: rho is clipped to [1 - clip_low, 1 + clip_high].
        inner_steps: optimiser steps on one batch; gradient accumulation would come in between.

    Raises:
        ConfigError: `reference` is `model` itself, which would then be frozen, or no step a batch.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        reference: SentenceTransformer | None = None,
        tau: float = 0.05,
        beta: float = 0.1,
        floor: float = 1e-3,
        towers: Literal["both", "query"] = "both",
        advantage: Literal["full", "positive"] = "full",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        inner_steps: int = 1,
    ) -> None:
        super().__init__()
        if reference is model:
            what = "the model that learns as its own reference"
            raise ConfigError(explain(what, "a frozen copy", "leave `reference` out"))
        if inner_steps < 1:
            raise ConfigError(explain(f"inner_steps = {inner_steps}", "1 or more", "raise it"))
        self.model = model
        frozen = copy.deepcopy(model) if reference is None else reference
        self._reference = [frozen.eval().requires_grad_(False)]  # a list: not saved, not trained
        self.tau, self.beta, self.floor = tau, beta, floor
        self.towers, self.advantage = towers, advantage
        self.clip_low, self.clip_high = clip_low, clip_high
        self.inner_steps = inner_steps
        self._drawn: _Drawn | None = None
        self.last_metrics: dict[str, float] = {}

    def forward(
        self, sentence_features: Sequence[dict[str, Any]], labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss; the numbers behind it are in `last_metrics`.

        Raises:
            ConfigError: the labels are not [Q, K], or not finite.
        """
        columns = list(sentence_features)
        if labels is None or labels.ndim != 2 or labels.shape[1] != len(columns) - 1:
            raise ConfigError(
                explain(
                    f"labels of shape {None if labels is None else tuple(labels.shape)} for "
                    f"{len(columns) - 1} candidate columns",
                    "one reward a candidate column, [Q, K]",
                    "give the dataset a list column `label` with K rewards",
                )
            )
        query_QD, *candidates = self.vectors(columns)
        ref_query_QD, *ref_candidates = self.reference_vectors(columns)
        self.drawn(columns, labels)
        return self.objective(
            cosines(query_QD, torch.stack(candidates, dim=1)),
            labels,
            cosines(ref_query_QD, torch.stack(ref_candidates, dim=1)),
        )

    def vectors(self, columns: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Unit vectors [Q, D] of each column: queries first, then products."""
        query_QD, *products = _columns(self.model, columns)
        if self.towers == "query":
            products = [product_QD.detach() for product_QD in products]
        return [query_QD, *products]

    @torch.no_grad()
    def reference_vectors(self, columns: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        """The same of the frozen encoder."""
        device = next(self.model.parameters()).device  # a wrapped model has no `device`
        return _columns(self._reference[0].to(device), columns)

    def objective(
        self, scores_QK: torch.Tensor, rewards_QK: torch.Tensor, ref_scores_QK: torch.Tensor
    ) -> torch.Tensor:
        """`retrieval_grpo` with this module's settings; its numbers are kept in `last_metrics`.

        Call `drawn` before: a further step on a batch is measured against the first one's scores.

        Raises:
            ConfigError: a reward is not finite.
        """
        if not rewards_QK.isfinite().all():
            got = f"{int((~rewards_QK.isfinite()).sum())} rewards that are no finite number"
            raise ConfigError(explain(got, "a number a candidate", "look at what rewards them"))
        if self._drawn is not None and self._drawn.scores_QK is None:
            self._drawn.scores_QK = scores_QK.detach()
        out = retrieval_grpo(
            scores_QK,
            rewards_QK,
            ref_scores_QK,
            None if self._drawn is None else self._drawn.scores_QK,
            tau=self.tau,
            beta=self.beta,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            floor=self.floor,
            advantage=self.advantage,
        )
        self.last_metrics = out.metrics
        return out.loss

    def drawn(self, columns: Sequence[Mapping[str, Any]], labels: torch.Tensor) -> Any:
        """The candidates that the first step on this batch chose; None: this is the first."""
        if self.inner_steps == 1 or not torch.is_grad_enabled():
            self._drawn = None
            return None
        tensors = [v for column in columns for v in column.values() if torch.is_tensor(v)]
        read, before = (labels, *tensors), self._drawn
        if before is not None and before.steps < self.inner_steps and _equal(read, before.read):
            before.steps += 1
            return before.chosen_QK
        self._drawn = _Drawn(read)
        return None

    def keep(self, chosen_QK: Any) -> None:
        """The candidates of further steps on this batch."""
        if self._drawn is not None:
            self._drawn.chosen_QK = chosen_QK

    def rewarded(
        self,
        rewards: Sequence[Reward],
        queries: Sequence[Query],
        candidates: Sequence[Sequence[Product]],
        scores_QK: torch.Tensor,
        ref_scores_QK: torch.Tensor,
    ) -> torch.Tensor:
        """`objective` on what the candidates earn; `last_metrics` has each reward's mean and k."""
        total_QK, terms = total_reward(rewards, queries, candidates)
        loss = self.objective(
            scores_QK, torch.from_numpy(total_QK).to(scores_QK.device), ref_scores_QK
        )
        means = {f"reward/{name}": float(values.mean()) for name, values in terms.items()}
        self.last_metrics = self.last_metrics | means | {"k": float(scores_QK.shape[1])}
        return loss


class InBatchRetrievalGRPOLoss(RetrievalGRPOLoss):
    """Retrieval-GRPO on the gathered batch, rewarded live [TaoSearchEmb s3.2].

    Dataset columns: query, product, label = the row's place in `pairs`. Prompts are those that the
    trainer is given (`prompts`). Candidates of each query
    are the Top-K by the encoder as it is now among the distinct products of the batch, those of the
    other processes included where training is distributed. A batch with fewer of them than `k` has
    that many candidates: a last, short one does not end the training.

    Args:
        pairs: the query and product behind every row of the data set, for the rewards to read.
        rewards: what is maximised, e.g. a `JudgeRelevance`, a `Quality` and an `Exclusivity`.
        k: candidates of a query.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        pairs: Sequence[tuple[Query, Product]],
        rewards: Sequence[Reward],
        k: int = 16,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if k < 2:
            raise ConfigError(explain(f"k = {k}", "2 candidates or more to compare", "raise k"))
        self.pairs, self.rewards, self.k = pairs, rewards, k

    def forward(
        self, sentence_features: Sequence[dict[str, Any]], labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss; the numbers behind it, `k` and each reward's mean among them, are in
        `last_metrics`.

        Raises:
            ConfigError: not two columns and a place a row.
        """
        columns = list(sentence_features)
        what = "columns query and product, and as `label` the row's place in `pairs`"
        _check_places(columns, labels, 2, what, "add the missing column")
        query_QD, own_QD = self.vectors(columns)
        ref_query_QD, ref_own_QD = self.reference_vectors(columns)
        places_P, product_PD, ref_PD = _gathered(labels, own_QD, ref_own_QD)
        products = [self.pairs[i][1] for i in places_P.tolist()]
        first = {p.product_id: place for place, p in reversed(list(enumerate(products)))}
        distinct = sorted(first.values())
        product_PD, ref_PD = product_PD[distinct], ref_PD[distinct]
        chosen_QK = self.drawn(columns, labels)
        if chosen_QK is None:
            with torch.autocast(query_QD.device.type, enabled=False):
                scores_QP = query_QD.detach() @ product_PD.detach().T
            chosen_QK = scores_QP.topk(min(self.k, len(distinct)), dim=1).indices
            self.keep(chosen_QK)
        queries = [self.pairs[i][0] for i in labels.tolist()]
        shown = [[products[distinct[i]] for i in row] for row in chosen_QK.tolist()]
        return self.rewarded(
            self.rewards,
            queries,
            shown,
            cosines(query_QD, product_PD[chosen_QK]),
            cosines(ref_query_QD, ref_PD[chosen_QK]),
        )


class IndexRetrievalGRPOLoss(RetrievalGRPOLoss):
    """Retrieval-GRPO on the Top-K of a whole catalogue, rewarded live [TaoSearchEmb s3.2].

    Dataset columns: query, label = the row's place in `queries`, whose text is what is read: both
    sides get the encoder's own prompts, not the trainer's. The catalogue is embedded at the
    first batch and after every `refresh_every` training batches. The K products of a query are
    embedded anew, with gradient, so that only their choice is stale. `last_metrics` says how much:
    pool_age (batches since the catalogue was embedded) and, at a refresh, stale_share (of the
    batch's Top-K that the old vectors had missed). Each process embeds the catalogue for itself.

    Args:
        queries: the query behind every row of the data set, for the rewards to read.
        catalogue: the products to choose from, each id once.
        rewards: what is maximised, as in `InBatchRetrievalGRPOLoss`.
        k: candidates of a query.
        batch_size: products in one forward where the catalogue is embedded.

    Raises:
        ConfigError: fewer products than `k`, an id twice, or an interval below one batch.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        queries: Sequence[Query],
        catalogue: Sequence[Product],
        rewards: Sequence[Reward],
        k: int = 16,
        refresh_every: int = 100,
        batch_size: int = 64,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        distinct = len({product.product_id for product in catalogue})
        if not 2 <= k <= distinct or distinct < len(catalogue) or refresh_every < 1:
            got = f"k = {k}, {len(catalogue)} products with {distinct} ids, "
            got += f"refresh_every = {refresh_every}"
            expected = "2 <= k <= products, each id once, an interval of 1 or more"
            raise ConfigError(explain(got, expected, "change what is outside of that"))
        self.queries, self.rewards, self.k = queries, rewards, k
        self.pool = CandidatePool(catalogue, batch_size)
        self.refresh_every = refresh_every

    def forward(
        self, sentence_features: Sequence[dict[str, Any]], labels: torch.Tensor
    ) -> torch.Tensor:
        """The loss; the numbers behind it are in `last_metrics`.

        Raises:
            ConfigError: not one column and a place a row.
        """
        columns = list(sentence_features)
        what = "a column query, and as `label` the row's place in `queries`"
        _check_places(columns, labels, 1, what, "give the data set these two alone")
        asked = [self.queries[i] for i in labels.tolist()]
        columns = [features(self._encoder, [q.text for q in asked], "query")]
        (query_QD,), (ref_query_QD,) = self.vectors(columns), self.reference_vectors(columns)
        vectors_QD = query_QD.detach().cpu().numpy()
        freshness = self._keep_fresh(vectors_QD)
        rows_QK = self.drawn(columns, labels)
        if rows_QK is None:
            rows_QK = self.pool.top_k(vectors_QD, self.k)
            self.keep(rows_QK)
        distinct_U, place = np.unique(rows_QK, return_inverse=True)
        place_QK = torch.from_numpy(place.reshape(rows_QK.shape)).to(query_QD.device)
        texts = [product_text(self.pool.products[i]) for i in distinct_U]
        products = [features(self._encoder, texts, "document")]
        (product_UD,), (ref_UD,) = _columns(self.model, products), self.reference_vectors(products)
        if self.towers == "query":
            product_UD = product_UD.detach()
        loss = self.rewarded(
            self.rewards,
            asked,
            [[self.pool.products[i] for i in row] for row in rows_QK],
            cosines(query_QD, product_UD[place_QK]),
            cosines(ref_query_QD, ref_UD[place_QK]),
        )
        self.last_metrics = self.last_metrics | freshness
        return loss

    def _keep_fresh(self, vectors_QD: np.ndarray) -> dict[str, float]:
        """Embed the catalogue where that is due; how stale it is, or was."""
        pool, known = self.pool, self.pool.vectors_ND.size > 0
        stale: dict[str, float] = {}
        if not known or (torch.is_grad_enabled() and pool.age >= self.refresh_every):
            before_QK = pool.top_k(vectors_QD, self.k) if known else None
            pool.refresh(self._encoder, "retrieval-grpo: embedding the catalogue")
            if before_QK is not None:
                fresh_QK = pool.top_k(vectors_QD, self.k)
                stale = {"stale_share": stale_share(before_QK, fresh_QK)}
        age = float(pool.age)
        pool.age += torch.is_grad_enabled()  # an evaluation moves nothing
        return stale | {"pool_age": age}

    @property
    def _encoder(self) -> SentenceTransformer:
        """The model itself where a trainer has wrapped it."""
        encoder: SentenceTransformer = getattr(self.model, "module", self.model)
        return encoder


def _equal(these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> bool:
    """Whether two batches are one: as many tensors, all of them equal."""
    pairs = zip(these, those, strict=False)
    return len(these) == len(those) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


def _check_places(
    columns: Sequence[Any], labels: torch.Tensor | None, count: int, what: str, do: str
) -> None:
    """Refuse all but `count` columns and one number a row."""
    if labels is None or labels.ndim != 1 or len(columns) != count:
        shape = None if labels is None else tuple(labels.shape)
        raise ConfigError(explain(f"{len(columns)} columns, labels {shape}", what, do))


def _columns(model: nn.Module, columns: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """Unit vectors of each column, without dropout."""
    was_training = model.training
    model.eval()
    try:
        return [unit_vectors(model, c) for c in columns]
    finally:
        model.train(was_training)


def _gathered(
    labels: torch.Tensor, own_QD: torch.Tensor, reference_QD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of all processes, [P] and [P, D]; own_QD keeps its gradient."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return labels, own_QD, reference_QD
    from sentence_transformers.util import all_gather, all_gather_with_grad

    return all_gather(labels), all_gather_with_grad(own_QD), all_gather(reference_QD)


def train_retrieval_grpo(
    encoder_dir: str,
    store: Store,
    rewards: Sequence[Reward],
    config: RetrievalGRPOConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Train the SFT encoder in `encoder_dir` on the rewards and save the best to `out`.

    Best: the highest mean reward of the validation queries' Top-`recall_k` among the refreshes
    whose recall and guarded rewards have not fallen below the start's beyond noise (recall: and
    `max_recall_loss`). The start is one of them. Goes on from
    `scratch` if a checkpoint is there.

    Logs `embedder/rgrpo/...`: loss, reward_mean, reward/<name>, reward_std, frac_reward_zero_std,
    kl, clip_ratio, entropy, sft_loss, grad_norm, pool_age (steps since the pool was embedded); at
    each refresh stale_share (of the Top-K that the old pool had missed), val_recall, val_reward,
    val_reward/<name>, spread, val_order (of the encoder); at the start val_order/<reward>. An order
    is the share of labelled pairs of one query's products that are in the labels' order; a warning
    says when the judge's is no better than the encoder's.

    Returns:
        the watch's numbers at the start (`start_*`), of the encoder written (`best_*`, `best_step`)
        and at the end (`last_*`), `steps`, and `val_order/<reward>`.

    Raises:
        DivergenceError: the loss is not finite, or the encoder collapsed; `out` then holds the best
            encoder seen. DataContractError: no train queries, or no judged validation queries.
        ConfigError: with pool=batch, a batch of the run would gather fewer than k products.
    """
    from models.embedder.retrieval_run import Run

    run = Run(encoder_dir, store, rewards, config, scratch, sink, device)
    try:
        run.train()
    except DivergenceError:
        run.write_best(out)
        raise
    run.write_best(out)
    return run.summary()
