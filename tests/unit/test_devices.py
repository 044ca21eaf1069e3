"""Where two GPUs are visible, training uses one; no GPU is needed to see that."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from models.embedder.config import FitConfig
from models.embedder.contrastive import ContrastiveLoss
from models.embedder.encoder import load_encoder
from models.embedder.fitting import fit
from models.embedder.tiny import build_tiny_encoder
from models.judge.config import CrossEncoderConfig, PromptConfig, SftConfig
from models.judge.cot_sft import train_cot_sft
from models.judge.cross_encoder import train_cross_encoder
from models.judge.spec import JudgeSpec
from models.lm.devices import one_device
from models.metrics import NullSink
from tests.builders import make_pairs, make_tiny_judge

SPEC = JudgeSpec(PromptConfig(evidence=False))
TEXTS = ["red sofa", "blue shoe"]


class Stop(Exception):
    """Instead of the first step."""


def sft(folder: Path) -> None:
    pairs = make_pairs(12)
    base = make_tiny_judge(folder / "base", pairs)
    train_cot_sft(base, SPEC, pairs, SftConfig(), folder / "o", folder / "s", NullSink())


def cross_encoder(folder: Path) -> None:
    base = str(build_tiny_encoder(folder / "base", TEXTS))
    config = CrossEncoderConfig()
    train_cross_encoder(base, SPEC, make_pairs(12), config, folder / "o", folder / "s", NullSink())


def embedder(folder: Path) -> None:
    encoder = load_encoder(str(build_tiny_encoder(folder / "base", TEXTS)))
    loss = ContrastiveLoss(encoder, 0.05)
    config = FitConfig(batch_size=2)
    fit(encoder, loss, lambda _: {}, 4, config, "fit", folder / "o", folder / "s", NullSink())


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Trainer finds on a machine with two, but that the device is the CPU."""
    setup = TrainingArguments.__dict__["_setup_devices"]

    def found(arguments: Any) -> Any:
        device = setup.__get__(arguments)
        arguments._n_gpu = 2
        return device

    counted = functools.cached_property(found)
    counted.__set_name__(TrainingArguments, "_counted")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", counted)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("train", [sft, cross_encoder, embedder])
def test_every_trainer_leaves_the_second_gpu_alone(
    train: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []

    def stopped(trainer: Trainer, *_: Any, **__: Any) -> None:
        same = trainer.args.train_batch_size == trainer.args.per_device_train_batch_size
        seen.append((trainer.args._n_gpu, same))
        raise Stop

    monkeypatch.setattr(Trainer, "train", stopped)
    with pytest.raises(Stop):
        train(tmp_path)
    assert seen == [(1, True)]


def test_a_device_that_is_no_gpu_stays_none(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert one_device(arguments).n_gpu == 0
