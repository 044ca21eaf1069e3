"""What the judge's training stages share: transformers' Trainer around a SharedPrefixLM.

Consumes a loss over prepared batches -> produces a trained model folder. The Trainer carries the
loop, accumulation, schedule, checkpoints (weights, optimiser, RNG) and distributed launch; a stage
adds its batches, its loss and, if it has one, its sampler's state.

Departures: batches are built once, deterministically, from the seed, so that a resumed run sees
the very batches the straight run would have seen; the Trainer skips those already trained.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from models.errors import ConfigError, DivergenceError, explain
from models.judge.config import LoraSettings, OptimiserConfig
from models.lm.checkpoints import last_whole_checkpoint
from models.lm.devices import one_device
from models.lm.shared_prefix import SharedPrefixLM
from models.metrics import Mean
from models.types import MetricSink

log = logging.getLogger(__name__)


StageLoss = Callable[[SharedPrefixLM, Any], Iterator[tuple[torch.Tensor, Mapping[str, float]]]]


class SamplerState(Protocol):
    """What a stage's sampler keeps in the checkpoint beside the weights."""

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        ...


class Batches(Dataset):
    """Micro-batches prepared up front; item i is what step i trains on."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


class JudgeTrainer(Trainer):
    """A Trainer whose model is a SharedPrefixLM and whose loss is `stage_loss(model, batch)`.

    stage_loss yields (loss, metrics) parts, so that a large step fits in memory; metrics are
    averaged between logs and sent to the sink under `judge/<stage>/`.
    """

    def __init__(
        self,
        model: SharedPrefixLM,
        batches: Sequence[Any],
        stage_loss: StageLoss,
        *,
        stage: str,
        config: OptimiserConfig,
        accumulate: int,
        scratch: Path,
        sink: MetricSink,
        sampler_state: SamplerState | None = None,
    ) -> None:
        self.stage_loss = stage_loss
        self.stage = stage
        self.sink = sink
        self.means = Mean()
        self.last_row: dict[str, float] = {}
        self.sampler_state = sampler_state
        steps = math.ceil(len(batches) / accumulate)
        arguments = TrainingArguments(
            output_dir=str(scratch / "trainer"),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,
            learning_rate=config.lr,
            warmup_steps=round(config.warmup_share * steps),
            lr_scheduler_type=config.schedule,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            logging_steps=1,
            save_strategy="steps",
            save_steps=config.checkpoint_every,
            save_total_limit=1,
            report_to=[],
            use_cpu=model.device.type == "cpu",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=config.seed,
            data_seed=config.seed,
        )
        super().__init__(
            model=model,
            args=one_device(arguments),
            train_dataset=Batches(batches),
            data_collator=lambda rows: {"batch": rows[0]},
            callbacks=[_ToSink(self, steps)],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Backward through every part of the stage's loss; stops when one is not finite.

        The parts of one batch add up; batches are averaged over those of the optimiser step,
        of which the last may have fewer.
        """
        model.train()
        total = torch.zeros((), device=self.args.device)
        for loss, metrics in self.stage_loss(model, inputs["batch"]):
            if not torch.isfinite(loss):
                raise self.diverged(f"loss {loss.item()}")
            self.means.add(metrics)
            share = loss / self.current_gradient_accumulation_steps
            self.accelerator.backward(share)
            total += share.detach()
        return total

    def diverged(self, what: str) -> DivergenceError:
        """The error of a run that left the numbers, with where and after what."""
        last = self.means.peek() or self.last_row
        return DivergenceError(
            explain(
                f"{what} at step {self.state.global_step} of {self.stage}, last metrics {last}",
                "finite numbers",
                "lower the learning rate, or start again from the stage before",
            )
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights as safetensors under the wrapped model's own names, and the sampler's state."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        inner = self.accelerator.unwrap_model(self.model).lm
        inner.save_pretrained(folder, safe_serialization=True)
        if self.sampler_state is not None:
            state = json.dumps(self.sampler_state.state())
            (folder / "sampler.json").write_text(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        inner = self.accelerator.unwrap_model(self.model).lm
        adapter = Path(resume_from_checkpoint) / "adapter_model.safetensors"
        if adapter.is_file():
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(inner, load_file(adapter))
        else:
            weights = load_file(Path(resume_from_checkpoint) / "model.safetensors")
            missing, unexpected = inner.load_state_dict(weights, strict=False)
            assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        if self.sampler_state is not None:
            path = Path(resume_from_checkpoint) / "sampler.json"
            self.sampler_state.restore(json.loads(path.read_text()))

    def run(self) -> None:
        """Train, going on from the last whole checkpoint under scratch if there is one."""
        folder = Path(self.args.output_dir)
        last = last_whole_checkpoint(folder)
        if last is not None:
            log.info("%s: going on from %s", self.stage, last.name)
        self.train(resume_from_checkpoint=None if last is None else str(last))


class _ToSink(TrainerCallback):
    """Progress bar and metrics, once an optimiser step."""

    def __init__(self, trainer: JudgeTrainer, steps: int) -> None:
        from tqdm import tqdm

        self.trainer = trainer
        self.bar = tqdm(total=steps, desc=trainer.stage, unit="step", dynamic_ncols=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        row = self.trainer.means.take()
        for name in ("loss", "grad_norm", "learning_rate"):
            if name in (logs or {}):
                row[name] = float(logs[name])
        if "loss" not in row:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                raise self.trainer.diverged(f"{name} {row[name]}")
        self.trainer.last_row = row
        prefix = f"judge/{self.trainer.stage}/"
        self.trainer.sink.log({prefix + k: v for k, v in row.items()}, state.global_step)
        self.bar.update(state.global_step - self.bar.n)
        shown = {k: f"{v:.3g}" for k, v in list(row.items())[:4]}
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


def make_trainable(lm: torch.nn.Module, config: OptimiserConfig) -> torch.nn.Module:
    """`lm` with what `config` trains left trainable: adapters, the top layers, or everything.

    Raises:
        ConfigError: more layers asked for than the model has.
    """
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.lora is not None:
        torch.manual_seed(config.seed)  # adapters start from torch's global numbers
        return _add_lora(lm, config.lora)
    if config.train_layers is None:
        return lm
    backbone = getattr(lm, lm.base_model_prefix)  # type: ignore[arg-type]
    layers = backbone.layers
    if config.train_layers > len(layers):
        got = f"train_layers={config.train_layers}"
        raise ConfigError(explain(got, f"at most {len(layers)}", "lower it, or use None"))
    lm.requires_grad_(False)
    for module in (*layers[len(layers) - config.train_layers :], backbone.norm):
        module.requires_grad_(True)
    return lm


def _add_lora(lm: torch.nn.Module, settings: LoraSettings) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm, config)


def save_whole(lm: Any, tokenizer: Any, out: Path) -> None:
    """Write a plain transformers folder, adapters merged, so that any loader reads it back."""
    merged(lm).save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def merged(lm: Any) -> Any:
    """`lm` with its adapters merged into its weights, if it has any."""
    return lm.merge_and_unload() if hasattr(lm, "merge_and_unload") else lm
