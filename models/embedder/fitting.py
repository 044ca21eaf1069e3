"""Fits an encoder with sentence-transformers' trainer; what the embedder's stages share.

Consumes an encoder, a loss module and a collator -> produces an encoder folder. The trainer brings
the loop, checkpoints and resume; the stages bring data, loss and settings.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.embedder.config import FitConfig
from models.embedder.encoder import save
from models.errors import DivergenceError, explain
from models.lm import precision
from models.lm.checkpoints import last_whole_checkpoint
from models.types import MetricSink

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers import TrainerCallback

log = logging.getLogger(__name__)
Collator = Callable[[Sequence[Mapping[str, int]]], dict[str, Any]]
"""Rows {"row": number} -> features by column ("query_input_ids", ...) and a label."""


def features(encoder: SentenceTransformer, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Tokenised columns; "query" gets the encoder's query prompt, the others the document one."""
    out: dict[str, Any] = {}
    for column, values in texts.items():
        if values:
            side = "query" if column == "query" else "document"
            made = encoder.preprocess(list(values), prompt=encoder.prompts.get(side) or None)
            out |= {f"{column}_{key}": value for key, value in made.items()}
    return out


def fit(
    encoder: SentenceTransformer,
    loss: nn.Module,
    collator: Collator,
    num_rows: int,
    config: FitConfig,
    name: str,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Train and save to `out`; goes on from the newest whole checkpoint in `scratch`.

    Logs `embedder/<name>/{loss,grad_norm,learning_rate}`, and the first batch as text, once.

    Returns:
        steps, and loss (the mean over the steps of this call).

    Raises:
        DivergenceError: a loss, a gradient or a weight is not finite.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer
    from transformers import PrinterCallback
    from transformers.trainer_utils import set_seed

    from models.lm.devices import one_device

    limit = encoder.max_seq_length
    if config.max_tokens is not None:
        encoder.max_seq_length = min(config.max_tokens, limit or config.max_tokens)
    set_seed(config.seed)
    scratch.mkdir(parents=True, exist_ok=True)
    _log_first_batch(encoder, collator, num_rows)
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=one_device(_arguments(config, num_rows, scratch, device)),
        train_dataset=Dataset.from_dict({"row": list(range(num_rows))}),
        loss=loss,
        data_collator=collator,
        callbacks=[_sink_callback(sink, name)],
    )
    trainer.remove_callback(PrinterCallback)
    last = last_whole_checkpoint(scratch)
    result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if not all(bool(p.isfinite().all()) for p in encoder.parameters()):
        raise _diverged(f"weights that are not finite after step {result.global_step}")
    encoder.max_seq_length = limit
    save(encoder.eval(), out)
    return {"steps": float(result.global_step), "loss": float(result.training_loss)}


def _diverged(got: str) -> DivergenceError:
    return DivergenceError(explain(got, "finite numbers", "lower lr, or raise tau"))


def _log_first_batch(encoder: SentenceTransformer, collator: Collator, num_rows: int) -> None:
    """Log what the model is going to read, once."""
    count = min(3, num_rows)
    made = collator([{"row": i} for i in range(count)])
    for row in range(count):
        shown = {
            column: encoder.tokenizer.decode(made[f"{column}_input_ids"][row], True)
            for column in ("query", "positive", "negative")
            if row < len(made.get(f"{column}_input_ids", ()))
        }
        log.info("first batch: %s", shown)


def _arguments(config: FitConfig, num_pairs: int, scratch: Path, device: str) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    batch_size = min(config.batch_size, num_pairs)
    steps = config.steps or max(1, math.ceil(config.epochs * (num_pairs // batch_size)))
    steps += config.extra_steps
    return SentenceTransformerTrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=config.lr,
        warmup_steps=round(config.warmup_ratio * steps),
        bf16=config.bf16 and precision.has_bf16(device),
        use_cpu=device == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=max(1, min(10, steps // 5)),
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen below
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,  # the callback below has a bar that says what it is doing
    )


def _sink_callback(sink: MetricSink, name: str) -> TrainerCallback:
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class SinkCallback(TrainerCallback):
        """Shows progress, passes the numbers on, and stops a run whose loss is not finite."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=f"embedder {name}",
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
            for what in ("loss", "grad_norm"):
                if not math.isfinite(numbers.get(what, 0.0)):
                    raise _diverged(f"{what} {numbers[what]} at step {state.global_step}")
            kept = ("loss", "grad_norm", "learning_rate")
            metrics = {f"embedder/{name}/{k}": numbers[k] for k in kept if k in numbers}
            if metrics:
                if "loss" in numbers:
                    self.bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
                sink.log(metrics, state.global_step)

    return SinkCallback()
