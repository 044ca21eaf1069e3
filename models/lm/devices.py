"""One process, one device: what transformers' Trainer must not decide by itself.

Consumes TrainingArguments -> produces the same, held to the device they name.
"""

from __future__ import annotations

from typing import TypeVar

from transformers import TrainingArguments

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def one_device(arguments: Arguments) -> Arguments:
    """`arguments` for a Trainer that leaves further visible GPUs alone; call it before the Trainer.

    With two or more a Trainer wraps its model in DataParallel and multiplies the batch: a collator
    that hands on one prepared micro-batch would drop the others without a word.
    """
    _ = arguments.device  # reading it counts the GPUs, so the count is set after
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments
