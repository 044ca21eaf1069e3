"""Retrieval-GRPO: its gradient, its loss module, its watch, and what it learns."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.embedder import ordering, retrieval_run
from models.embedder.candidates import CandidatePool, batch_pool, sample_pool, stale_share
from models.embedder.chunked import CachedTexts
from models.embedder.config import RetrievalGRPOConfig
from models.embedder.encoder import embed, encode, load_encoder
from models.embedder.retrieval_grpo import (
    GroupLoss,
    InBatchRetrievalGRPOLoss,
    IndexRetrievalGRPOLoss,
    RetrievalGRPOLoss,
    retrieval_grpo,
    train_retrieval_grpo,
)
from models.embedder.retrieval_run import Run, Watch, acceptable, collapse
from models.embedder.tiny import build_tiny_encoder
from models.errors import ConfigError, DataContractError, DivergenceError
from models.lm.weights import fingerprint
from models.metrics import ListSink
from models.rewards.quality import Quality
from models.rewards.relevance import JudgeRelevance, ScoreCache
from models.schemas import TABLES
from models.store import Store
from models.text import product_text
from models.types import Product, Query

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ("sofa", "lamp", "rug", "mug", "hat", "desk")
MAKERS = ("acme", "zed", "bolt", "fern", "grit", "halo")
TAU = 0.05
RUNS = ("straight", "resumed")


@pytest.fixture(scope="module")
def store() -> Store:
    """Six makers of six kinds; makers late in the alphabet sell more."""
    products = [
        {"product_id": f"{m}-{k}", "title": f"{m} {k}", "sales": float(i)}
        for i, m in enumerate(MAKERS)
        for k in KINDS
    ]
    queries = [
        {"query_id": f"q{n}-{k}", "text": f"{k} {word}", "split": split}
        for n, (word, split) in enumerate(
            [("new", "train"), ("good", "train"), ("cheap", "validation"), ("big", "test")]
        )
        for k in KINDS
    ]
    judgments = [
        {"query_id": q["query_id"], "product_id": p["product_id"], "grade": 4 if same(q, p) else 1}
        for q in queries
        for p in products
    ]
    rows = {"products": products, "queries": queries, "judgments": judgments, "interactions": []}
    tables = {n: pa.Table.from_pylist(r, schema=TABLES[n]) for n, r in rows.items()}
    return Store(**tables, notes={})


def same(query: dict[str, Any], product: dict[str, Any]) -> bool:
    return query["query_id"].split("-")[1] == product["product_id"].split("-")[1]


@pytest.fixture(scope="module")
def encoder_dir(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = store.products["title"].to_pylist() + store.queries["text"].to_pylist()
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"), corpus, seed=1)


@pytest.fixture(scope="module")
def quality(store: Store) -> Quality:
    levels = {p: MAKERS.index(p.split("-")[0]) / 5 for p in store.product_by_id}
    return Quality(levels)


FAST = RetrievalGRPOConfig(
    steps=12,
    batch_queries=6,
    k=8,
    refresh_every=4,
    sft_batch=8,
    lr=1e-3,
    warmup_steps=0,
    bf16=False,
    recall_k=6,
)


def scores_and_rewards(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.manual_seed(seed)
    return torch.rand(3, 5, generator=g).requires_grad_(), torch.rand(3, 5, generator=g)


def test_gradient_at_rho_one_is_the_policy_gradient() -> None:
    """grad J = 1/(K tau) sum_i A_i grad s_i, averaged over the queries [TaoSearchEmb s3.2]."""
    scores, rewards = scores_and_rewards()
    retrieval_grpo(scores, rewards, scores.detach(), tau=TAU, beta=0.0).loss.backward()
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = centred / rewards.std(1, correction=0, keepdim=True)
    assert torch.allclose(-scores.grad, advantages / (3 * 5 * TAU), atol=1e-5)


def test_kl_vanishes_at_the_reference_and_pulls_back_elsewhere() -> None:
    scores, rewards = scores_and_rewards()
    at_ref = retrieval_grpo(scores, rewards, scores.detach(), tau=TAU, beta=5.0)
    assert at_ref.metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    ref = scores.detach().flip(1)
    flat = torch.zeros(3, 5)
    flat[:, 0] = 1.0
    strong = retrieval_grpo(scores, flat, ref, tau=1.0, beta=1e6)
    strong.loss.backward()
    stepped = scores.detach() - 1e-6 * scores.grad
    closer = retrieval_grpo(stepped, flat, ref, tau=1.0, beta=1e6).metrics["kl"]
    assert closer < strong.metrics["kl"]


def test_gradient_with_clip_and_kl_as_arithmetic() -> None:
    """One query, three candidates; rho = (1.44, .78, .78): the first is clipped at 1.2.

    d logp_i / d s_j = ([i = j] - pi_j) / tau and dKL/ds_j = pi_j (log pi_j/ref_j - KL) / tau.
    """
    tau, beta = 0.5, 0.3
    s, old, ref = np.array([0.3, 0.0, 0.0]), np.zeros(3), np.array([0.0, 0.1, 0.0])
    pi, pi_old, pi_ref = (np.exp(x / tau) / np.exp(x / tau).sum() for x in (s, old, ref))
    rho, advantage = pi / pi_old, np.array([2.0, -1.0, -1.0]) / np.sqrt(2)
    assert rho[0] > 1.2 and rho[1] < 0.8
    live = np.where(advantage > 0, rho <= 1.2, rho >= 0.8) * rho * advantage
    assert live.tolist() == [0.0, 0.0, 0.0], "above on the good one, below on the bad ones: all cut"
    gap = np.log(pi / pi_ref)
    kl_gradient = pi * (gap - (pi * gap).sum()) / tau
    scores = torch.tensor(s[None], requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, 0.0]])
    arguments = (torch.tensor(ref[None]), torch.tensor(old[None]))
    retrieval_grpo(scores, rewards, *arguments, tau=tau, beta=beta).loss.backward()
    assert np.allclose(scores.grad[0].numpy(), beta * kl_gradient, atol=1e-6)

    scores.grad = None  # a wider clip: nothing is cut
    wide = {"clip_low": 0.5, "clip_high": 0.5}
    retrieval_grpo(scores, rewards, *arguments, tau=tau, beta=beta, **wide).loss.backward()
    pushed = rho * advantage
    policy_gradient = (pushed - pi * pushed.sum()) / (3 * tau)
    expected = beta * kl_gradient - policy_gradient
    assert np.allclose(scores.grad[0].numpy(), expected, atol=1e-6)


def test_groups_of_equal_rewards_are_skipped_and_counted() -> None:
    scores, rewards = scores_and_rewards()
    rewards[1] = 0.3
    out = retrieval_grpo(scores, rewards, scores.detach().flip(1), tau=TAU)
    out.loss.backward()
    assert out.metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert scores.grad[1].abs().max() == 0
    assert scores.grad[0].abs().max() > 0
    rewards[:] = 0.3
    scores.grad = None
    nothing = retrieval_grpo(scores, rewards, scores.detach().flip(1), tau=TAU)
    nothing.loss.backward()
    assert nothing.loss.item() == 0 and scores.grad.abs().max() == 0


def test_skipped_groups_do_not_dilute_the_others() -> None:
    scores, rewards = scores_and_rewards()
    rewards[1:] = 0.3
    retrieval_grpo(scores, rewards, scores.detach(), tau=TAU, beta=0.0).loss.backward()
    alone = scores.detach()[:1].requires_grad_()
    retrieval_grpo(alone, rewards[:1], alone.detach(), tau=TAU, beta=0.0).loss.backward()
    assert torch.allclose(scores.grad[:1], alone.grad)


def test_positive_advantages_only() -> None:
    scores = torch.zeros(1, 4, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    retrieval_grpo(
        scores, rewards, scores.detach(), tau=1.0, beta=0.0, advantage="positive"
    ).loss.backward()
    top = (1 - 0.25) / np.sqrt(0.25 * 0.75)  # its advantage
    expected = top / 4 * (torch.tensor([1.0, 0, 0, 0]) - 0.25)
    assert torch.allclose(-scores.grad[0], expected.float(), atol=1e-6)


def test_a_step_taken_already_is_clipped() -> None:
    scores = torch.tensor([[0.5, 0.0, 0.0]], requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, 0.0]])
    old = torch.zeros(1, 3)
    out = retrieval_grpo(scores, rewards, old, old, tau=0.1, beta=0.0)
    out.loss.backward()
    assert out.metrics["clip_ratio"] == pytest.approx(1.0)
    assert scores.grad.abs().max() == 0


def dataset_batch(encoder: Any) -> list[dict[str, torch.Tensor]]:
    columns = [["sofa new", "lamp new"], ["acme sofa", "acme lamp"], ["zed rug", "zed lamp"]]
    return [dict(encoder.preprocess(texts)) for texts in columns]


def test_loss_module_equals_the_function(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    loss = RetrievalGRPOLoss(encoder, tau=TAU, beta=0.3)
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
    got = loss(dataset_batch(encoder), rewards)
    assert loss.last_metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    q, a, b = (
        torch.from_numpy(encode(encoder, t))
        for t in (["sofa new", "lamp new"], ["acme sofa", "acme lamp"], ["zed rug", "zed lamp"])
    )
    scores = torch.stack([(q * a).sum(1), (q * b).sum(1)], 1)
    assert got.item() == pytest.approx(
        retrieval_grpo(scores, rewards, scores, tau=TAU, beta=0.3).loss.item(), abs=1e-5
    )
    assert len(list(loss.parameters())) == len(list(encoder.parameters())), "reference not trained"


def test_gradient_of_the_loss_module_is_the_policy_gradient_of_its_encoder(
    encoder_dir: Path,
) -> None:
    """At rho = 1, beta = 0: of J, 1 / (K tau) sum_i A_i grad s_i, in every weight."""
    encoder = load_encoder(str(encoder_dir))
    rewards_QK = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
    advantage_QK = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # two candidates: one std off the mean
    RetrievalGRPOLoss(encoder.train(), tau=TAU, beta=0.0)(
        dataset_batch(encoder), rewards_QK
    ).backward()
    got = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.eval().zero_grad()
    q_QD, a_QD, b_QD = (
        torch.nn.functional.normalize(encoder(dict(c))["sentence_embedding"], dim=-1)
        for c in dataset_batch(encoder)
    )
    score_QK = torch.stack([(q_QD * a_QD).sum(1), (q_QD * b_QD).sum(1)], 1)
    (-(advantage_QK * score_QK).sum(1).mean() / (2 * TAU)).backward()
    assert len(got) > 5
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(got[name], parameter.grad, atol=1e-5, rtol=1e-4), name


def test_the_learning_model_cannot_be_its_own_reference(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    with pytest.raises(ConfigError, match="its own reference"):
        RetrievalGRPOLoss(encoder, reference=encoder)
    assert all(p.requires_grad for p in encoder.parameters())


def test_dropout_is_off_in_the_loss_module(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir)).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    loss = RetrievalGRPOLoss(encoder, tau=TAU)
    loss(dataset_batch(encoder), torch.tensor([[1.0, 0.0], [0.2, 0.9]]))
    assert loss.last_metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    assert encoder.training


Pairs = Sequence[tuple[Query, Product]]


def batch_of(encoder: Any, pairs: Pairs) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """The tokenised columns of all pairs, and their places."""
    texts = [q.text for q, _ in pairs], [p.title for _, p in pairs]
    return [dict(encoder.preprocess(list(t))) for t in texts], torch.arange(len(pairs))


def in_batch_pairs(store: Store) -> Pairs:
    """Six train queries, each with a product; two of them with the same one."""
    queries = [store.query_by_id[q] for q in store.query_ids("train")][:6]
    ids = ["acme-sofa", "zed-sofa", "acme-lamp", "zed-rug", "acme-sofa", "halo-mug"]
    return list(zip(queries, [store.product_by_id[p] for p in ids], strict=True))


@pytest.mark.parametrize("towers", ["both", "query"])
def test_the_batch_is_the_pool_and_rewards_are_live(
    store: Store, encoder_dir: Path, quality: Quality, towers: Any
) -> None:
    """Candidates by the current encoder among the batch's distinct products, as in the paper."""
    encoder, pairs = load_encoder(str(encoder_dir)), in_batch_pairs(store)
    loss = InBatchRetrievalGRPOLoss(encoder, pairs, [quality], k=3, tau=TAU, towers=towers)
    columns, places = batch_of(encoder, pairs)
    got = loss(columns, places)
    distinct = list({p.product_id: p for _, p in pairs}.values())
    assert len(distinct) == 5
    queries_QD = encode(encoder, [q.text for q, _ in pairs], prompt="query")
    score_QP = queries_QD @ encode(encoder, [p.title for p in distinct]).T
    order_QK = np.argsort(-score_QP, axis=1)[:, :3]
    chosen_QK = torch.from_numpy(np.take_along_axis(score_QP, order_QK, 1))
    reward_QK = quality([q for q, _ in pairs], [[distinct[i] for i in row] for row in order_QK])
    want = retrieval_grpo(chosen_QK, torch.from_numpy(reward_QK), chosen_QK, tau=TAU)
    assert got.item() == pytest.approx(want.loss.item(), abs=1e-5)
    assert loss.last_metrics["reward/quality"] == pytest.approx(float(reward_QK.mean()))
    got.backward()
    word = encoder.tokenizer.convert_tokens_to_ids("acme")
    grad = encoder[0].auto_model.embeddings.word_embeddings.weight.grad
    assert bool(grad[word].abs().max() > 0) is (towers == "both")


def test_the_batch_loss_says_what_it_needs(
    store: Store, encoder_dir: Path, quality: Quality
) -> None:
    encoder, pairs = load_encoder(str(encoder_dir)), in_batch_pairs(store)
    columns, places = batch_of(encoder, pairs)
    short = InBatchRetrievalGRPOLoss(encoder, pairs, [quality], k=6)
    assert torch.isfinite(short(columns, places)) and short.last_metrics["k"] == 5
    alone = short(*batch_of(encoder, pairs[:1]))
    assert alone.item() == 0 and short.last_metrics["frac_reward_zero_std"] == 1
    with pytest.raises(ConfigError, match="row's place"):
        InBatchRetrievalGRPOLoss(encoder, pairs, [quality], k=2)(columns, torch.ones(6, 2))
    with pytest.raises(ConfigError, match="3 columns"):
        InBatchRetrievalGRPOLoss(encoder, pairs, [quality], k=2)([*columns, columns[1]], places)


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from models.embedder.encoder import load_encoder
from models.embedder.retrieval_grpo import InBatchRetrievalGRPOLoss
from tests.unit.test_retrieval_grpo import PAIRS, Late, batch_of

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

encoder = load_encoder(sys.argv[3])
columns, places = batch_of(encoder, PAIRS[2 * rank : 2 * rank + 2])
loss = InBatchRetrievalGRPOLoss(encoder, PAIRS, [Late()], k=4, beta=0.5)
loss(columns, places + 2 * rank).backward()
assert abs(loss.last_metrics["kl"]) < 1e-6, "the reference's vectors are gathered in another order"
torch.save({n: p.grad for n, p in encoder.named_parameters()}, f"{sys.argv[2]}-{rank}.pt")
"""
PAIRS = [(Query(k, f"{k} new"), Product(f"acme-{k}", f"acme {k}")) for k in KINDS[:4]]


class Late:
    """Likes what comes late in the alphabet."""

    name, weight = "late", 1.0

    def __call__(self, queries: Sequence[Query], candidates: Sequence[Any]) -> np.ndarray:
        return np.array([[(ord(p.title[-1]) % 7) / 7 for p in row] for row in candidates])


def test_products_are_gathered_across_processes(encoder_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_PROCESSES]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet"), str(encoder_dir)],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    encoder = load_encoder(str(encoder_dir))
    InBatchRetrievalGRPOLoss(encoder, PAIRS, [Late()], k=4, beta=0.5)(
        *batch_of(encoder, PAIRS)
    ).backward()
    ranks = [torch.load(f"{tmp_path}/meet-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:  # a process has the mean over its half of the queries
            both = (ranks[0][name] + ranks[1][name]) / 2
            assert torch.allclose(both, parameter.grad, atol=1e-5, rtol=1e-3), name


def train_in_the_library(
    encoder: Any, rows: dict[str, list[Any]], loss: Any, folder: Path, steps: int, batch_size: int
) -> None:
    """Steps of sentence-transformers' own trainer."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(encoder, arguments, Dataset.from_dict(rows), loss=loss).train()


def test_the_batch_loss_trains_in_the_library_trainer(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    encoder = load_encoder(str(encoder_dir))
    pairs = [
        (store.query_by_id[q], p)
        for q in store.query_ids("train")
        for p in store.product_by_id.values()
        if p.product_id.endswith(q.split("-")[1])
    ]
    rows = {
        "query": [q.text for q, _ in pairs],
        "product": [p.title for _, p in pairs],
        "label": list(range(len(pairs))),
    }
    queries = [q for q, _ in pairs]
    before = liked(encoder, store, queries, quality)
    loss = InBatchRetrievalGRPOLoss(encoder, pairs, [quality], k=6, beta=0.0)
    train_in_the_library(encoder, rows, loss, tmp_path, steps=12, batch_size=12)
    assert liked(encoder, store, queries, quality) > before + 0.03


def liked(encoder: Any, store: Store, queries: Sequence[Query], quality: Quality) -> float:
    """Quality of all products, weighed by how near the queries they are."""
    products = list(store.product_by_id.values())
    levels = quality([queries[0]], [products])[0]
    scores = encode(encoder, sorted({q.text for q in queries}), prompt="query") @ (
        encode(encoder, [p.title for p in products]).T
    )
    shares = np.exp(scores / TAU) / np.exp(scores / TAU).sum(1, keepdims=True)
    return float((shares @ levels).mean())


def queries_of(encoder: Any, queries: Sequence[Query]) -> tuple[list[Any], torch.Tensor]:
    """Their tokenised column, and their places."""
    return [dict(encoder.preprocess([q.text for q in queries]))], torch.arange(len(queries))


def train_queries(store: Store) -> list[Query]:
    return [store.query_by_id[q] for q in store.query_ids("train")]


@pytest.mark.parametrize("towers", ["both", "query"])
def test_the_catalogue_is_the_pool_and_rewards_are_live(
    store: Store, encoder_dir: Path, quality: Quality, towers: Any
) -> None:
    encoder, queries = load_encoder(str(encoder_dir)), train_queries(store)[:4]
    encoder.prompts |= {"query": "lamp rug ", "document": "mug "}
    products = list(store.product_by_id.values())
    loss = IndexRetrievalGRPOLoss(
        encoder, queries, products, [quality], k=3, tau=TAU, towers=towers
    )
    got = loss(*queries_of(encoder, queries))
    score_QP = encode(encoder, [q.text for q in queries], prompt="query") @ (
        encode(encoder, [product_text(p) for p in products]).T
    )
    order_QK = np.argsort(-score_QP, axis=1, kind="stable")[:, :3]
    chosen_QK = torch.from_numpy(np.take_along_axis(score_QP, order_QK, 1))
    reward_QK = quality(queries, [[products[i] for i in row] for row in order_QK])
    want = retrieval_grpo(chosen_QK, torch.from_numpy(reward_QK), chosen_QK, tau=TAU)
    assert got.item() == pytest.approx(want.loss.item(), abs=1e-5)
    assert loss.last_metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert loss.last_metrics["reward/quality"] == pytest.approx(float(reward_QK.mean()))
    got.backward()
    grad = encoder[0].auto_model.embeddings.word_embeddings.weight.grad
    touched = [
        bool(grad[encoder.tokenizer.convert_tokens_to_ids(maker)].abs().max() > 0)
        for maker in MAKERS
    ]
    assert any(touched) is (towers == "both")


def test_the_catalogue_is_as_old_as_it_says_and_the_scores_are_not(
    store: Store, encoder_dir: Path, quality: Quality
) -> None:
    encoder, queries = load_encoder(str(encoder_dir)), train_queries(store)[:4]
    products = list(store.product_by_id.values())
    loss = IndexRetrievalGRPOLoss(encoder, queries, products, [quality], k=3, refresh_every=2)
    batch = queries_of(encoder, queries)
    loss(*batch)
    first = loss.pool.vectors_ND.copy()
    assert loss.last_metrics["pool_age"] == 0 and "stale_share" not in loss.last_metrics
    words = encoder[0].auto_model.embeddings.word_embeddings.weight
    with torch.no_grad():
        words += 0.3 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
        loss(*batch)  # an evaluation: neither older nor fresher
    assert loss.last_metrics["pool_age"] == 1 and np.array_equal(loss.pool.vectors_ND, first)
    loss(*batch)
    now_QD = encode(encoder, [q.text for q in queries], prompt="query")
    stale_QK = loss.pool.top_k(now_QD, 3)
    assert loss.last_metrics["pool_age"] == 1 and np.array_equal(loss.pool.vectors_ND, first)
    fresh_ND = encode(encoder, [product_text(p) for p in products])
    live_QK = torch.from_numpy(np.take_along_axis(now_QD @ fresh_ND.T, stale_QK, 1))
    rewards_QK = quality(queries, [[products[i] for i in row] for row in stale_QK])
    want = retrieval_grpo(live_QK, torch.from_numpy(rewards_QK), live_QK).metrics
    for name in ("entropy", "expected_reward"):
        assert loss.last_metrics[name] == pytest.approx(want[name], abs=1e-4)
    loss(*batch)
    assert loss.last_metrics["pool_age"] == 0
    assert np.allclose(loss.pool.vectors_ND, fresh_ND, atol=1e-5)
    missed = stale_share(stale_QK, loss.pool.top_k(now_QD, 3))
    assert loss.last_metrics["stale_share"] == pytest.approx(missed) and missed > 0


def test_the_catalogue_loss_says_what_it_needs(
    store: Store, encoder_dir: Path, quality: Quality
) -> None:
    encoder, queries = load_encoder(str(encoder_dir)), train_queries(store)[:2]
    products = list(store.product_by_id.values())[:4]
    for settings in ({"k": 5}, {"k": 1}, {"k": 2, "refresh_every": 0}):
        with pytest.raises(ConfigError, match="4 products"):
            IndexRetrievalGRPOLoss(encoder, queries, products, [quality], **settings)
    with pytest.raises(ConfigError, match="5 products with 4 ids"):
        IndexRetrievalGRPOLoss(encoder, queries, [*products, products[0]], [quality], k=2)
    loss = IndexRetrievalGRPOLoss(encoder, queries, products, [quality], k=2)
    (column,), places = queries_of(encoder, queries)
    with pytest.raises(ConfigError, match="row's place"):
        loss([column], torch.ones(2, 2))
    with pytest.raises(ConfigError, match="2 columns"):
        loss([column, column], places)


def test_the_catalogue_loss_trains_in_the_library_trainer(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    encoder, queries = load_encoder(str(encoder_dir)), train_queries(store)
    rows = {"query": [q.text for q in queries], "label": list(range(len(queries)))}
    products = list(store.product_by_id.values())
    before = liked(encoder, store, queries, quality)
    loss = IndexRetrievalGRPOLoss(
        encoder, queries, products, [quality], k=6, refresh_every=4, beta=0.0
    )
    train_in_the_library(encoder, rows, loss, tmp_path, steps=12, batch_size=6)
    assert liked(encoder, store, queries, quality) > before + 0.03
    assert loss.last_metrics["pool_age"] == 3 and encoder.training


def test_query_tower_keeps_the_gradient_off_the_products(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
    words = encoder[0].auto_model.embeddings.word_embeddings.weight
    token = encoder.tokenizer.convert_tokens_to_ids("zed")
    for towers, touched in (("both", True), ("query", False)):
        encoder.zero_grad()
        RetrievalGRPOLoss(encoder, towers=towers)(dataset_batch(encoder), rewards).backward()
        assert bool(words.grad[token].abs().max() > 0) is touched


def test_loss_module_refuses_labels_of_another_shape(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    with pytest.raises(ConfigError, match="candidate column"):
        RetrievalGRPOLoss(encoder)(dataset_batch(encoder), torch.ones(2))
    for wrong in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="1 rewards that are no finite number"):
            RetrievalGRPOLoss(encoder)(
                dataset_batch(encoder), torch.tensor([[1.0, 0.0], [wrong, 0.9]])
            )


def test_loss_modules_work_in_the_wrapping_of_several_devices(encoder_dir: Path) -> None:
    """DataParallel has no `device`, and passes no `truncate_dim` on."""
    encoder = load_encoder(str(encoder_dir))
    encoder.truncate_dim = 4
    loss = RetrievalGRPOLoss(encoder)
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.9]])
    plain = loss(dataset_batch(encoder), rewards).item()
    metrics = loss.last_metrics
    loss.model = torch.nn.DataParallel(encoder)
    assert loss(dataset_batch(encoder), rewards).item() == pytest.approx(plain, abs=1e-6)
    assert loss.last_metrics["entropy"] == pytest.approx(metrics["entropy"], abs=1e-5)


def moved(encoder: Any, loss: torch.Tensor, lr: float = 0.5) -> None:
    """A large step of plain gradient descent."""
    encoder.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad


def test_further_steps_on_a_batch_are_measured_against_its_first(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    loss = RetrievalGRPOLoss(encoder, tau=TAU, beta=0.3, clip_low=0.1, inner_steps=3)
    rewards = torch.tensor([[1.0, 0.0], [0.2, 0.9]])

    def scores() -> torch.Tensor:
        q, a, b = (
            torch.from_numpy(encode(encoder, t))
            for t in (["sofa new", "lamp new"], ["acme sofa", "acme lamp"], ["zed rug", "zed lamp"])
        )
        return torch.stack([(q * a).sum(1), (q * b).sum(1)], 1)

    first, ratios = (start := scores()), []
    for step in range(7):
        if step % 3 == 0:
            first = scores()
        want = retrieval_grpo(scores(), rewards, start, first, TAU, 0.3, clip_low=0.1)
        got = loss(dataset_batch(encoder), rewards)
        assert got.item() == pytest.approx(want.loss.item(), abs=1e-4), step
        assert loss.last_metrics["clip_ratio"] == want.metrics["clip_ratio"]
        ratios.append(loss.last_metrics["clip_ratio"])
        moved(encoder, got)
    assert ratios[::3] == [0, 0, 0] and max(ratios) > 0
    with torch.no_grad():
        loss(dataset_batch(encoder), rewards)
    assert loss.last_metrics["clip_ratio"] == 0, "an evaluation has no first step"
    loss(dataset_batch(encoder), rewards)
    loss(dataset_batch(encoder), rewards.flip(1))
    assert loss.last_metrics["clip_ratio"] == 0, "another batch is a first step"
    with pytest.raises(ConfigError, match="inner_steps = 0"):
        RetrievalGRPOLoss(encoder, inner_steps=0)


@pytest.mark.parametrize("kind", ["batch", "catalogue"])
def test_further_steps_on_a_batch_keep_its_candidates(
    store: Store, encoder_dir: Path, quality: Quality, kind: str
) -> None:
    encoder, queries = load_encoder(str(encoder_dir)), train_queries(store)[:4]
    products, shown = list(store.product_by_id.values()), []

    class Seen(Quality):
        def __call__(self, queries: Any, candidates: Any) -> Any:
            shown.append([[p.product_id for p in row] for row in candidates])
            return super().__call__(queries, candidates)

    rewards = [Seen(quality.levels)]
    if kind == "batch":
        pairs = list(zip(queries, products[:4], strict=True))
        batch = batch_of(encoder, pairs)
        loss: Any = InBatchRetrievalGRPOLoss(encoder, pairs, rewards, k=2, inner_steps=2)
    else:
        batch = queries_of(encoder, queries)
        loss = IndexRetrievalGRPOLoss(
            encoder, queries, products, rewards, k=2, refresh_every=1, inner_steps=2
        )
    words = encoder[0].auto_model.embeddings.word_embeddings.weight
    for _ in range(3):
        loss(*batch)
        with torch.no_grad():
            words += torch.randn(words.shape, generator=torch.Generator().manual_seed(len(shown)))
    assert shown[0] == shown[1] != shown[2]


def test_every_part_of_a_run_sees_the_width_that_is_served(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    """Trap: an index of 4 numbers, and candidates, scores and a watch of all."""
    config, out = FAST.model_copy(update={"dim": 4, "inner_steps": 2}), tmp_path / "out"
    run = Run(str(encoder_dir), store, [quality], config, tmp_path / "s", ListSink(), "cpu")
    run._start()
    assert run.pool.vectors_ND.shape[1] == run.ref_queries_QD.shape[1] == 4
    whole_ND = encode(load_encoder(str(encoder_dir)), [product_text(p) for p in run.pool.products])
    short_ND = whole_ND[:, :4] / np.linalg.norm(whole_ND[:, :4], axis=1, keepdims=True)
    assert np.allclose(run.pool.vectors_ND, short_ND, atol=1e-5)
    batch = run._draw(0)
    assert batch.old_scores_QK is not None
    assert torch.allclose(batch.old_scores_QK, batch.ref_scores_QK, atol=1e-5)
    with torch.no_grad():
        assert run._anchor_loss(CachedTexts(run.encoder, None).embed).isfinite()
    numbers = train_retrieval_grpo(
        str(encoder_dir), store, [quality], config, out, tmp_path / "t", ListSink()
    )
    assert numbers["start_val_recall"] == run.watches[0].val_recall
    written = load_encoder(str(out))
    assert written.truncate_dim is None and written.get_embedding_dimension() > 4
    untouched = load_encoder(str(encoder_dir))
    assert (encode(written, ["x"]).shape) == encode(untouched, ["x"]).shape, "saved whole"


def test_loss_module_trains_in_the_library_trainer(encoder_dir: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    rows = {
        "query": [f"{k} new" for k in KINDS],
        "candidate_1": [f"zed {k}" for k in KINDS],
        "candidate_2": [f"acme {k}" for k in KINDS],
        "label": [[1.0, 0.0] for _ in KINDS],
    }

    def margin() -> float:
        q, good, bad = (encode(encoder, rows[c]) for c in ("query", "candidate_1", "candidate_2"))
        return float((q * (good - bad)).sum(1).mean())

    before = margin()
    loss = RetrievalGRPOLoss(encoder, beta=0.0)
    train_in_the_library(encoder, rows, loss, tmp_path, steps=10, batch_size=6)
    assert margin() > before + 0.05


def test_pool_and_batch_candidates(encoder_dir: Path) -> None:
    assert sample_pool(list("abcdef"), ["f", "b"], 3, seed=0)[-1] == "f"
    assert len(sample_pool(list("abcdef"), ["f", "b"], 3, seed=0)) == 3
    assert sample_pool(list("ab"), [], None, seed=0) == ["a", "b"]
    got = batch_pool([10, 20, 30], np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), 2)
    assert got.tolist() == [[20, 30], [10, 20]]
    with pytest.raises(ConfigError, match="enlarge"):
        batch_pool([1], np.ones((1, 1)), 2)
    pool = CandidatePool([Product("a", "acme sofa"), Product("b", "zed rug")])
    encoder = load_encoder(str(encoder_dir))
    pool.refresh(encoder, "")
    assert pool.top_k(encode(encoder, ["sofa"]), 1).tolist() == [[0]]
    with pytest.raises(ConfigError, match="lower k"):
        pool.top_k(encode(encoder, ["sofa"]), 3)


def test_staleness_is_the_share_of_the_top_k_that_was_missed() -> None:
    stale, fresh = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 2], [4, 7, 8]])
    assert stale_share(stale, fresh) == pytest.approx((0 + 2 / 3) / 2)


def watch(recall: float = 0.8, spread: float = 0.5, **terms: float) -> Watch:
    return Watch(1, recall, 1.0, spread, terms)


def test_an_encoder_is_chosen_only_if_nothing_guarded_fell() -> None:
    start, config = watch(relevance=0.5, quality=0.5, exclusivity=0.5), RetrievalGRPOConfig()
    assert acceptable(watch(relevance=0.5, quality=0.6, exclusivity=0.1), start, config)
    assert not acceptable(watch(relevance=0.49, quality=0.9, exclusivity=0.9), start, config)
    assert not acceptable(watch(0.79, relevance=0.9, quality=0.9, exclusivity=0.9), start, config)


def test_a_recall_loss_within_noise_is_allowed_and_a_real_one_is_not() -> None:
    start = Watch(0, 0.5, 1.0, 0.5, {}, recalls=[0.5] * 16)
    noisy = [0.5 + d for d in (0.4, -0.48) * 8]  # mean -.04, standard error .44 / sqrt(15)
    steady = [0.46] * 16
    config = RetrievalGRPOConfig()
    assert acceptable(Watch(1, 0.46, 1.0, 0.5, {}, noisy), start, config)
    assert not acceptable(Watch(1, 0.46, 1.0, 0.5, {}, steady), start, config)
    strict = config.model_copy(update={"noise": 0.0})
    assert not acceptable(Watch(1, 0.46, 1.0, 0.5, {}, noisy), start, strict)


def test_a_guarded_reward_may_fall_within_noise_and_no_further() -> None:
    level = {"quality": [0.5] * 16}
    start = Watch(0, 0.5, 1.0, 0.5, {"quality": 0.5}, rewards=level)
    noisy = [0.5 + d for d in (0.4, -0.48) * 8]

    def after(values: list[float]) -> Watch:
        mean = sum(values) / len(values)
        return Watch(1, 0.5, 1.1, 0.5, {"quality": mean}, rewards={"quality": values})

    config = RetrievalGRPOConfig()
    assert acceptable(after(noisy), start, config)
    assert not acceptable(after([0.46] * 16), start, config)
    assert not acceptable(after(noisy), start, config.model_copy(update={"noise": 0.0}))
    unguarded = config.model_copy(update={"guard": ("relevance",)})
    assert acceptable(after([0.1] * 16), start, unguarded), "not guarded"


def test_collapse_is_named() -> None:
    config = RetrievalGRPOConfig()
    assert collapse(watch(), watch(), config) is None
    assert "spread" in (collapse(watch(spread=0.05), watch(), config) or "")
    assert "recall" in (collapse(watch(recall=0.3), watch(), config) or "")


def test_the_watch_reads_what_asks_no_model_on_every_validation_query(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    asked: list[int] = []

    class Costly:
        name, weight = "relevance", 2.0

        def __call__(self, queries: Sequence[Any], candidates: Sequence[Any]) -> np.ndarray:
            asked.append(len(queries))
            return np.full((len(queries), len(candidates[0])), 0.25, dtype=np.float32)

    config = FAST.model_copy(update={"steps": 1, "val_reward_queries": 2, "order_products": 0})
    sink, scratch = ListSink(), tmp_path / "s"
    run = Run(str(encoder_dir), store, [Costly(), quality], config, scratch, sink, "cpu")
    run._start()
    first = run.watches[0]
    assert asked == [2] and len(first.rewards["relevance"]) == 2
    assert len(first.rewards["quality"]) == len(first.recalls) > 2
    assert first.terms["quality"] == pytest.approx(np.mean(first.rewards["quality"]), rel=1e-6)
    assert first.val_reward == pytest.approx(2 * 0.25 + quality.weight * first.terms["quality"])


def test_quality_rises_and_recall_holds(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    sink = ListSink()
    config = FAST.model_copy(update={"steps": 24, "noise": 0.0})
    numbers = train_retrieval_grpo(
        str(encoder_dir), store, [quality], config, tmp_path / "out", tmp_path / "s", sink
    )
    assert numbers["best_val_recall"] >= numbers["start_val_recall"]
    assert numbers["best_val_reward/quality"] > numbers["start_val_reward/quality"] + 0.02
    assert numbers["steps"] == 24
    names = (
        "reward_mean reward/quality reward_std frac_reward_zero_std kl clip_ratio entropy sft_loss"
    )
    for name in names.split():
        assert len(sink.series(f"embedder/rgrpo/{name}")) == 24, name
    assert len(sink.series("embedder/rgrpo/val_recall")) == 1 + 24 // 4
    assert sink.series("embedder/rgrpo/pool_age") == [0.0, 1.0, 2.0, 3.0] * 6
    stale = sink.series("embedder/rgrpo/stale_share")
    assert len(stale) == 24 // 4 and 0 < max(stale) < 1
    assert sink.series("embedder/rgrpo/kl")[0] == pytest.approx(0.0, abs=1e-4)
    load_encoder(str(tmp_path / "out"))


def test_scores_of_a_gathered_batch_are_as_fresh_as_its_choice(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    """Trap: products gathered in the batch, scored by vectors of the last refresh."""
    config = FAST.model_copy(update={"pool": "batch", "towers": "query"})
    run = Run(str(encoder_dir), store, [quality], config, tmp_path, ListSink(), "cpu")
    run._start()
    for _ in range(3):
        run._update(run._draw(run.step))
    batch = run._draw(3)
    now = encode(run.encoder, [product_text(p) for p in run.pool.products])
    assert batch.products_QKD is not None
    assert np.allclose(batch.products_QKD, now[batch.candidates_QK], atol=1e-5)
    assert not np.allclose(now, run.pool.vectors_ND, atol=1e-3), "the pool itself is old"


def test_chunked_steps_equal_whole_ones(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    """Trap: gradient caching with silently wrong gradients."""
    gradients: list[dict[str, torch.Tensor]] = []
    for chunk in (None, 5):
        config = FAST.model_copy(update={"chunk": chunk, "lr": 1e-12, "max_grad_norm": 1e9})
        scratch = tmp_path / str(chunk)
        run = Run(str(encoder_dir), store, [quality], config, scratch, ListSink(), "cpu")
        run._start()
        run._update(run._draw(0))
        gradients.append(
            {n: p.grad.clone() for n, p in run.encoder.named_parameters() if p.grad is not None}
        )
    whole, chunked = gradients
    assert whole.keys() == chunked.keys() and len(whole) > 5
    for name, grad in whole.items():
        assert torch.allclose(grad, chunked[name], atol=1e-5, rtol=1e-3), name


def test_no_more_texts_than_a_chunk_are_embedded_with_gradient(
    store: Store,
    encoder_dir: Path,
    quality: Quality,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def counting(encoder: Any, texts: Sequence[str], side: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(texts))
        return embed(encoder, texts, side)

    monkeypatch.setattr("models.embedder.chunked.embed", counting)
    config = FAST.model_copy(update={"chunk": 5})
    run = Run(str(encoder_dir), store, [quality], config, tmp_path, ListSink(), "cpu")
    run._start()
    run._update(run._draw(0))
    assert max(sizes) == 5 and sum(sizes) > 20


@pytest.mark.parametrize(
    "change",
    [
        {"towers": "query"},
        {"towers": "query", "pool": "batch"},
        {"chunk": 3, "inner_steps": 2},
        {"pool": "batch"},
        {"advantage": "positive"},
        {"inner_steps": 3},
        {"sft_weight": 0.0},
        {"pool_size": 36, "max_queries": 3},
    ],
)
def test_every_switch_runs(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path, change: dict[str, Any]
) -> None:
    sink = ListSink()
    config = FAST.model_copy(update={"steps": 7, "lr": 1e-4, **change})
    numbers = train_retrieval_grpo(
        str(encoder_dir), store, [quality], config, tmp_path / "out", tmp_path / "s", sink
    )
    assert numbers["steps"] == 7
    assert len(sink.series("embedder/rgrpo/loss")) == 7
    assert np.isfinite(sink.series("embedder/rgrpo/loss")).all()


def test_rho_is_one_on_the_first_inner_step_in_bf16_too(
    store: Store,
    encoder_dir: Path,
    quality: Quality,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.lm.precision.has_bf16", lambda device: True)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = retrieval_run.retrieval_grpo

    def loss(scores_QK: torch.Tensor, *args: Any, **kwargs: Any) -> GroupLoss:
        seen.append((scores_QK.detach(), args[2]))
        return original(scores_QK, *args, **kwargs)

    monkeypatch.setattr(retrieval_run, "retrieval_grpo", loss)
    update = {"steps": 4, "lr": 1e-3, "bf16": True, "inner_steps": 2}
    config = FAST.model_copy(update=update)
    folders = tmp_path / "out", tmp_path / "s"
    train_retrieval_grpo(str(encoder_dir), store, [quality], config, *folders, ListSink())
    assert [torch.equal(now, old) for now, old in seen] == [True, False, True, False]
    assert all(now.dtype == torch.float32 for now, _ in seen)


@contextmanager
def dying_at_step(step: int) -> Iterator[None]:
    """Training inside is cut off, as by Ctrl-C, when it comes to the loss of `step`."""
    original, calls = retrieval_run.retrieval_grpo, 0

    def loss(*args: Any, **kwargs: Any) -> GroupLoss:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(retrieval_run, "retrieval_grpo", loss)
        yield


def test_resumed_equals_straight(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    def train(name: str) -> None:
        folder, scratch = tmp_path / name, tmp_path / f"{name}-scratch"
        train_retrieval_grpo(str(encoder_dir), store, [quality], FAST, folder, scratch, ListSink())

    train("straight")
    with dying_at_step(7):
        train("resumed")
    assert not (tmp_path / "resumed").exists()
    train("resumed")
    straight, resumed = (
        encode(load_encoder(str(tmp_path / f"{n}-scratch" / "step-12")), ["sofa new"]) for n in RUNS
    )
    assert np.allclose(straight, resumed, atol=1e-6)


def test_a_kill_while_saving_leaves_the_encoders_that_the_checkpoint_names(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    """Cut off before each folder that is removed and each that is moved into place."""
    config = FAST.model_copy(update={"steps": 4, "refresh_every": 1, "max_recall_loss": 1.0})
    removed, renamed, left = shutil.rmtree, Path.rename, 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    def checked(scratch: Path) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((scratch / "state.json").read_text())
        for name in (f"step-{state['step']}", f"best-{state['best']['step']}"):
            assert (scratch / name / "model.safetensors").is_file(), (cut, name)
        return state

    for cut in range(1, 40):
        left, scratch = cut, tmp_path / str(cut)
        run = Run(str(encoder_dir), store, [quality], config, scratch, ListSink(), "cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                retrieval_run.shutil, "rmtree", lambda *a, **k: (count(), removed(*a, **k))
            )
            patch.setattr(Path, "rename", lambda *a: (count(), renamed(*a))[1])
            try:
                run.train()
                break
            except KeyboardInterrupt:
                if (scratch / "state.json").is_file():
                    checked(scratch)
    assert cut > 20 and checked(scratch)["best"]["step"] > 0
    kept = sorted(p.name for p in scratch.iterdir() if p.is_dir())
    assert kept == [f"best-{checked(scratch)['best']['step']}", "step-4"]


class KindJudge:
    """Good for the asked kind; reads a token of rules, one a query and one a pair."""

    def score(self, pairs: Sequence[tuple[Query, Product]]) -> list[list[float]]:
        right = [q.text.split()[0] in p.title for q, p in pairs]
        return [[0.0, 0.1, 0.2, 0.7] if r else [0.8, 0.1, 0.1, 0.0] for r in right]

    def num_tokens(
        self, pairs: Sequence[tuple[Query, Product]], before: Collection[str] = ()
    ) -> int:
        new = {q.query_id for q, _ in pairs} - set(before)
        return (bool(new) and not before) + len(new) + len(pairs)


class QueryJudge(KindJudge):
    """Tells queries apart, and no two products of one."""

    def score(self, pairs: Sequence[tuple[Query, Product]]) -> list[list[float]]:
        good = [0.9 if q.text < "m" else 0.2 for q, _ in pairs]
        return [[1 - g, 0.0, 0.0, g] for g in good]


@pytest.mark.parametrize(("judge", "knows"), [(KindJudge(), 1.0), (QueryJudge(), 0.5)])
def test_a_judge_that_orders_no_better_than_the_encoder_is_named(
    store: Store,
    encoder_dir: Path,
    tmp_path: Path,
    judge: KindJudge,
    knows: float,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Advantages are centred by query: a judge that tells queries apart teaches nothing."""
    caplog.set_level("INFO", logger="models.embedder.retrieval_run")
    monkeypatch.setattr(ordering, "PER_QUERY", len(store.product_by_id))
    reward = JudgeRelevance(judge, ScoreCache(":memory:", "v1"))
    folders, sink = (tmp_path / "out", tmp_path / "s"), ListSink()
    numbers = train_retrieval_grpo(str(encoder_dir), store, [reward], FAST, *folders, sink)
    assert numbers["val_order/relevance"] == numbers["val_order/reward"] == knows
    assert sink.series("embedder/rgrpo/val_order/relevance") == [knows]
    assert len(sink.series("embedder/rgrpo/val_order")) == 1 + FAST.steps // FAST.refresh_every
    assert 0.5 < numbers["start_val_order"] < 1.0
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert [f"the judge has {knows:.0%}" in m for m in warned] == [True] * (knows < 1)


def test_a_lead_within_its_error_is_named_too(
    store: Store,
    encoder_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval_run, "lead", lambda mine, theirs: (0.01, 0.05))
    reward = JudgeRelevance(KindJudge(), ScoreCache(":memory:", "v1"))
    Run(str(encoder_dir), store, [reward], FAST, tmp_path, ListSink(), "cpu")._start()
    assert "a lead of 1 points, standard error 5; it has little to teach" in caplog.text


def test_a_resumed_run_counts_what_it_asked_before(
    store: Store, encoder_dir: Path, tmp_path: Path
) -> None:
    judge = KindJudge()

    def train(name: str) -> JudgeRelevance:
        cache = ScoreCache(tmp_path / f"{name}.sqlite", "v1")
        reward = JudgeRelevance(judge, cache, count_tokens=judge.num_tokens)
        folders = (tmp_path / name, tmp_path / f"{name}-scratch")
        train_retrieval_grpo(str(encoder_dir), store, [reward], FAST, *folders, ListSink())
        return reward

    straight = train("straight")
    with dying_at_step(9):
        train("resumed")
    resumed = train("resumed")
    kept = [json.loads((tmp_path / f"{n}-scratch" / "state.json").read_text()) for n in RUNS]
    assert kept[0]["orders"] == kept[1]["orders"] == {"relevance": 1.0, "reward": 1.0}
    assert (resumed.num_pairs, resumed.num_tokens) == (straight.num_pairs, straight.num_tokens)
    assert straight.num_tokens == 1 + len(straight.state()["query_ids"]) + straight.num_pairs
    # what the judge read after the checkpoint of step 8 is the cache's at the second start
    assert straight.computed - FAST.batch_queries * FAST.k <= resumed.computed <= straight.computed


def test_a_collapsing_run_stops_and_keeps_the_last_good_encoder(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    wild = FAST.model_copy(update={"lr": 10.0, "sft_weight": 0.0, "beta": 0.0, "steps": 40})
    with pytest.raises(DivergenceError, match=r"got (spread|recall).*do this"):
        train_retrieval_grpo(
            str(encoder_dir), store, [quality], wild, tmp_path / "out", tmp_path / "s", ListSink()
        )
    texts = ["sofa new", "acme rug"]
    kept, start = (encode(load_encoder(str(d)), texts) for d in (tmp_path / "out", encoder_dir))
    assert np.allclose(kept, start, atol=1e-6)
    # the index stage tells by this that it need not embed the catalogue again
    assert fingerprint(tmp_path / "out", whole=True) == fingerprint(encoder_dir, whole=True)


def test_a_run_that_collapses_late_keeps_what_it_had_learned(
    store: Store,
    encoder_dir: Path,
    quality: Quality,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The 24 steps that raise quality, then a learning rate that destroys the encoder."""
    good = 24
    monkeypatch.setattr(
        Run, "_lr", lambda self: 1e-3 * (1 - self.step / good) if self.step < good else 10.0
    )
    config = FAST.model_copy(update={"steps": 40, "noise": 0.0})
    with pytest.raises(DivergenceError, match="at step 28"):
        train_retrieval_grpo(
            str(encoder_dir), store, [quality], config, tmp_path / "out", tmp_path / "s", ListSink()
        )
    short = config.model_copy(update={"steps": good})
    numbers = train_retrieval_grpo(
        str(encoder_dir), store, [quality], short, tmp_path / "short", tmp_path / "f", ListSink()
    )
    assert numbers["best_step"] > 0, "the start was the best, so this test shows nothing"
    texts = ["sofa new", "acme rug"]
    kept, best, start = (
        encode(load_encoder(str(d)), texts)
        for d in (tmp_path / "out", tmp_path / "short", encoder_dir)
    )
    assert np.allclose(kept, best, atol=1e-6) and not np.allclose(kept, start, atol=1e-3)


def test_a_store_without_validation_judgments_is_refused(
    store: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    train_only = Store(
        store.products,
        store.queries.filter(pa.compute.equal(store.queries["split"], "train")),
        store.judgments,
        store.interactions,
        {},
    )
    with pytest.raises(DataContractError, match="validation"):
        train_retrieval_grpo(
            str(encoder_dir),
            train_only,
            [quality],
            FAST,
            tmp_path / "o",
            tmp_path / "s",
            ListSink(),
        )


def test_config_rejects_unknown_keys() -> None:
    with pytest.raises(ValueError, match="temperature"):
        RetrievalGRPOConfig(temperature=1.0)  # type: ignore[call-arg]


def test_config_rejects_a_floor_that_would_divide_equal_rewards_by_zero() -> None:
    with pytest.raises(ValueError, match="std_floor"):
        RetrievalGRPOConfig(std_floor=0.0)


@pytest.fixture(scope="module")
def half_judged(store: Store) -> Store:
    """People judged the own products of the "new" train queries, six each; of "good" ones none."""
    keep = [
        row["query_id"][:2] not in ("q0", "q1")
        or (row["query_id"].startswith("q0") and row["grade"] == 4)
        for row in store.judgments.to_pylist()
    ]
    judgments = store.judgments.filter(pa.array(keep))
    return Store(store.products, store.queries, judgments, store.interactions, {})


def test_a_batch_gathers_the_judged_products_of_judged_queries(
    half_judged: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    config = FAST.model_copy(update={"pool": "batch", "batch_queries": 2, "k": 6, "steps": 9})
    run = Run(str(encoder_dir), half_judged, [quality], config, tmp_path, ListSink(), "cpu")
    assert {q.query_id for q in run.queries} == {f"q0-{k}" for k in KINDS}
    run.train()
    assert run.step == 9


def test_a_batch_that_cannot_hold_k_products_is_refused_before_the_first_step(
    half_judged: Store, encoder_dir: Path, quality: Quality, tmp_path: Path
) -> None:
    config = FAST.model_copy(update={"pool": "batch", "batch_queries": 2, "k": 13})
    with pytest.raises(ConfigError, match=r"12 judged products in batch 0 of 2.*k = 13.*pool"):
        Run(str(encoder_dir), half_judged, [quality], config, tmp_path, ListSink(), "cpu")


@pytest.mark.parametrize(("events", "pairs"), [(True, 2), (True, None), (False, None)])
def test_the_anchor_has_the_events_it_is_told_to_and_masks_what_was_cut(
    store: Store,
    encoder_dir: Path,
    quality: Quality,
    tmp_path: Path,
    events: bool,
    pairs: int | None,
) -> None:
    rows = [
        {"query_id": "q0-sofa", "product_id": "acme-lamp", "event": "cart"},
        {"query_id": "q0-sofa", "product_id": "acme-rug", "event": "purchase"},
    ]
    interactions = pa.Table.from_pylist(rows, schema=TABLES["interactions"])
    good = store.judgments.filter(pa.compute.equal(store.judgments["grade"], 4))
    carts = Store(store.products, store.queries, good, interactions, {})
    config = FAST.model_copy(update={"interactions": events, "anchor_pairs": pairs})
    run = Run(str(encoder_dir), carts, [quality], config, tmp_path, ListSink(), "cpu")
    judged = 2 * len(KINDS) * len(MAKERS)
    assert len(run.anchor) == (pairs or judged + 2 * events)
    assert ({"acme-lamp", "acme-rug"} <= run.known["q0-sofa"]) is events


def test_the_anchor_weighs_its_pairs(
    store: Store,
    encoder_dir: Path,
    quality: Quality,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(str(encoder_dir), store, [quality], FAST, tmp_path, ListSink(), "cpu")
    texts = CachedTexts(run.encoder, None).embed
    plain = run._anchor_loss(texts).item()
    run.anchor = [replace(p, weight=1 / 3) for p in run.anchor]
    assert run._anchor_loss(texts).item() == pytest.approx(plain), "equal weights are none"
    kind = run.anchor[0].query_id.split("-")[1]
    run.anchor = [replace(p, weight=float(p.query_id.endswith(kind))) for p in run.anchor]
    taken: list[torch.Tensor] = []
    original = retrieval_run.infonce

    def infonce(*args: Any, weight_B: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        taken.append(weight_B)
        return original(*args, weight_B=weight_B, **kwargs)

    monkeypatch.setattr(retrieval_run, "infonce", infonce)
    assert run._anchor_loss(texts).item() != pytest.approx(plain)
    assert 0 < taken[0].mean() < 1
