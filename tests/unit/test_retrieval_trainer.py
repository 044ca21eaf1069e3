"""Beside sentence-transformers' trainer: the watch that logs and stops, batches that repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.embedder.encoder import encode, load_encoder
from models.embedder.retrieval_grpo import RetrievalGRPOLoss
from models.embedder.tiny import build_tiny_encoder
from models.embedder.trainer import RetrievalWatch, repeated
from models.errors import ConfigError, DivergenceError
from models.types import Product, Query

KINDS = ("sofa", "lamp", "rug", "mug", "hat", "desk")
PRODUCTS = [Product(f"{m}-{k}", f"{m} {k}") for m in ("acme", "zed") for k in KINDS]
QUERIES = [Query(f"q-{k}", f"{k} new") for k in KINDS]
RELEVANT = {f"q-{k}": [f"acme-{k}", f"zed-{k}", "gone"] for k in KINDS}


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = [p.title for p in PRODUCTS] + [q.text for q in QUERIES]
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"), corpus, seed=1)


def trainer_of(encoder: Any, loss: Any, folder: Path, lr: float, **settings: Any) -> Any:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    rows = {
        "query": [q.text for q in QUERIES],
        "candidate_1": [f"acme {k}" for k in KINDS],
        "candidate_2": [f"zed {k}" for k in KINDS[::-1]],
        "label": [[1.0, 0.0] for _ in KINDS],
    }
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        learning_rate=lr,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    return SentenceTransformerTrainer(encoder, arguments, Dataset.from_dict(rows), loss=loss)


def test_the_trainer_logs_what_the_loss_knows_and_the_watch_sees(
    encoder_dir: Path, tmp_path: Path
) -> None:
    encoder = load_encoder(str(encoder_dir))
    loss = RetrievalGRPOLoss(encoder)
    trainer = trainer_of(encoder, loss, tmp_path / "t", lr=1e-4, max_steps=4)
    keep = tmp_path / "kept"
    watch = RetrievalWatch(trainer, loss, QUERIES, RELEVANT, PRODUCTS, keep, every=2, k=3)
    trainer.add_callback(watch)
    trainer.train()
    logged = trainer.state.log_history
    assert [row["step"] for row in logged if "grpo/val_recall" in row] == [0, 2, 4]
    assert [row["step"] for row in logged if "grpo/kl" in row] == [1, 2, 3, 4]
    last = [row for row in logged if "grpo/kl" in row][-1]
    assert {f"grpo/{name}" for name in loss.last_metrics} <= last.keys()
    assert last["grpo/kl"] == loss.last_metrics["kl"] > 0
    scores = encode(encoder, [q.text for q in QUERIES], prompt="query") @ (
        encode(encoder, [p.title for p in PRODUCTS]).T
    )
    shares = [
        len({PRODUCTS[i].product_id for i in np.argsort(-row, kind="stable")[:3]} & set(wanted)) / 2
        for row, wanted in zip(scores, RELEVANT.values(), strict=True)
    ]
    assert [r for r in logged if "grpo/val_recall" in r][-1]["grpo/val_recall"] == pytest.approx(
        np.mean(shares)
    )
    texts = [p.title for p in PRODUCTS]
    assert np.allclose(encode(load_encoder(str(keep)), texts), encode(encoder, texts), atol=1e-6)
    assert not keep.with_name("kept.new").exists()


def test_a_collapse_stops_the_trainer_and_the_last_good_encoder_stays(
    encoder_dir: Path, tmp_path: Path
) -> None:
    encoder, texts = load_encoder(str(encoder_dir)), [p.title for p in PRODUCTS]
    loss = RetrievalGRPOLoss(encoder, beta=0.0)
    trainer = trainer_of(encoder, loss, tmp_path / "t", lr=10.0, max_steps=40)
    keep = tmp_path / "kept"
    trainer.add_callback(
        RetrievalWatch(trainer, loss, QUERIES, RELEVANT, PRODUCTS, keep, every=2, k=2)
    )
    before = encode(encoder, texts)
    with pytest.raises(DivergenceError, match=r"grpo/(val_recall|spread).* at the start.*kept"):
        trainer.train()
    assert trainer.state.global_step < 40
    assert np.allclose(encode(load_encoder(str(keep)), texts), before, atol=1e-6)
    with pytest.raises(ConfigError, match="0 queries with a relevant product"):
        RetrievalWatch(trainer, loss, QUERIES, {"q-sofa": ["gone"]}, PRODUCTS, keep)


@pytest.mark.parametrize(("inner", "processes"), [(1, 1), (3, 1), (2, 2)])
def test_batches_come_several_times_in_a_row(inner: int, processes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sampler = repeated(inner, processes)(list("abcdefgh"), 2, drop_last=False, generator=generator)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4 * inner
    firsts = []
    for rank in range(processes):  # each process gets every so manieth batch
        mine = batches[rank::processes]
        assert all(mine[i] == mine[i - i % inner] for i in range(len(mine)))
        firsts += [mine[i] for i in range(0, len(mine), inner)]
    assert sorted(i for batch in firsts for i in batch) == list(range(8))
    assert firsts != sorted(firsts), "shuffled"


def test_several_steps_a_batch_in_the_library_trainer(encoder_dir: Path, tmp_path: Path) -> None:
    encoder, ratios = load_encoder(str(encoder_dir)), []

    class Told(RetrievalGRPOLoss):
        def objective(self, *arguments: torch.Tensor) -> torch.Tensor:
            out = super().objective(*arguments)
            ratios.append(self.last_metrics["clip_ratio"])
            return out

    loss = Told(encoder, inner_steps=2, clip_low=0.0, clip_high=0.0)
    settings = {"num_train_epochs": 2, "batch_sampler": repeated(2)}
    trainer_of(encoder, loss, tmp_path, lr=1e-3, **settings).train()
    assert len(ratios) == 2 * 2 * 2
    assert ratios[::2] == [0.0] * 4 and min(ratios[1::2]) > 0, "rho leaves 1 at the second step"
