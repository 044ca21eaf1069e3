"""The baseline that reads a pair and grades it, without words: the BERT row [TaoSR1 s4].

Consumes labelled pairs and an encoder -> produces a sequence classifier of four grades, a plain
transformers folder. It reads query and item, and with `evidence` all that the judge reads of a
pair but the rules.

Departures: the paper's has 24 layers, the default here six; pairs are drawn class-balanced, as for
SFT. No epoch is chosen on validation: the last one is the model.

Tensor legend: P pairs.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from models.errors import DataContractError, DivergenceError, WeightsError, explain
from models.judge.config import CrossEncoderConfig
from models.judge.cot_sft import draw_pairs
from models.judge.prompt import PairText
from models.judge.spec import JudgeSpec
from models.lm.checkpoints import last_whole_checkpoint
from models.lm.devices import one_device
from models.types import GRADES, MetricSink, Pair, Product, Query

log = logging.getLogger(__name__)


def train_cross_encoder(
    base: str,
    spec: JudgeSpec,
    pairs: Sequence[Pair],
    config: CrossEncoderConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Fine-tune `base` by cross-entropy over the four grades; writes model and spec to `out`.

    The same seed gives the same weights. Goes on from a checkpoint under `scratch`.

    Raises:
        DataContractError: no pairs.
        DivergenceError: the loss stopped being finite.
        WeightsError: `base` is no encoder in safetensors.
    """
    if not pairs:
        raise DataContractError(explain("no training pairs", "labelled pairs", "add labels"))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # the head starts from torch's global numbers
        model, tokenizer = _load(base, num_labels=len(GRADES))
    if not config.evidence:
        spec = replace(spec, prompt=spec.prompt.model_copy(update={"evidence": False}))
    text = PairText(tokenizer, spec)
    length = _length(model, tokenizer, config.max_tokens)
    chosen = draw_pairs(pairs, config.max_pairs, config.balance, random.Random(config.seed))
    rows = [
        {**_encode(text, tokenizer, p.query, p.product, length), "labels": p.grade - 1}
        for p in chosen
    ]
    per_epoch = -(-len(rows) // config.batch_size)
    steps = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        per_device_train_batch_size=config.batch_size,
        max_steps=steps,
        learning_rate=config.lr,
        warmup_steps=round(0.1 * steps),
        weight_decay=config.weight_decay,
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=1,
        report_to=[],
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
    )
    trainer = Trainer(
        model=model,
        args=one_device(arguments),
        train_dataset=_Rows(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[_ToSink(sink, steps)],
    )
    trainer.remove_callback(PrinterCallback)
    last = last_whole_checkpoint(scratch / "trainer")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    spec.write(out)
    return {"pairs": len(chosen), "steps": steps}


class CrossEncoder:
    """A trained classifier as a function from pairs to grade probabilities."""

    def __init__(self, folder: Path, device: str = "cpu", max_tokens: int = 192) -> None:
        self.model, self.tokenizer = _load(str(folder))
        self.model.to(device).eval()
        self.text = PairText(self.tokenizer, JudgeSpec.read(folder))
        self.length = _length(self.model, self.tokenizer, max_tokens)

    @torch.no_grad()
    def score(
        self, pairs: Sequence[tuple[Query, Product]], desc: str = "", rows_at_once: int = 64
    ) -> np.ndarray:
        """P(grade) of every pair, [P, 4] float32 in the order of GRADES; [0, 4] for none."""
        out = np.zeros((len(pairs), len(GRADES)), dtype=np.float32)
        rows = [_encode(self.text, self.tokenizer, q, p, self.length) for q, p in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        starts = range(0, len(order), rows_at_once)
        for start in tqdm(starts, desc=desc, disable=not desc, leave=False):
            part = order[start : start + rows_at_once]
            batch = self.tokenizer.pad([rows[i] for i in part], return_tensors="pt")
            logits_PL = self.model(**batch.to(self.model.device)).logits.float()
            out[part] = torch.softmax(logits_PL, dim=-1).cpu().numpy()
        return out


def _load(path: str, **options: Any) -> tuple[Any, Any]:
    """A sequence classifier and its tokenizer; safetensors only, no code of the folder is run."""
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **options
        )
    except (OSError, ValueError) as error:
        got = f"{path}: {str(error).strip().splitlines()[0][:200]}"
        raise WeightsError(
            explain(got, "a Hugging Face encoder in safetensors", "choose another base")
        ) from error
    return model, tokenizer


def _length(model: Any, tokenizer: Any, wanted: int) -> int:
    """`wanted`, or what the model can take where that is less."""
    limits = (model.config.max_position_embeddings, tokenizer.model_max_length)
    return min(wanted, *limits)


def _encode(
    text: PairText, tokenizer: Any, query: Query, product: Product, length: int
) -> dict[str, Any]:
    """[CLS] query [SEP] item, evidence [SEP]. The closing line of the evidence comes first in the
    second part: what is cut at `length` is the item's end."""
    lines, summary = text.item(query, product)
    encoded = tokenizer(
        text.query(query), f"{summary}{lines}", truncation="longest_first", max_length=length
    )
    return dict(encoded)


class _Rows(Dataset):
    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class _ToSink(TrainerCallback):
    """Progress bar and metrics, once an optimiser step; a loss that is not finite ends the run."""

    def __init__(self, sink: MetricSink, steps: int) -> None:
        self.sink = sink
        self.bar = tqdm(total=steps, desc="cross-encoder", unit="step", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        row = {k: float(logs[k]) for k in ("loss", "grad_norm", "learning_rate") if k in logs}
        if "loss" not in row:
            return
        if not np.isfinite([row["loss"], row.get("grad_norm", 0.0)]).all():
            got = f"{row} at step {state.global_step} of the cross-encoder"
            raise DivergenceError(explain(got, "finite numbers", "lower cross_encoder.lr"))
        self.sink.log({f"cross_encoder/{k}": v for k, v in row.items()}, state.global_step)
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()
