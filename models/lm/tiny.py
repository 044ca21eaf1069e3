"""A tiny random language model for the smoke recipe and the tests: no download, 0.1 s.

Consumes a corpus -> produces a Hugging Face folder: a Llama of about 0.1M seeded random parameters
and a tokenizer trained on that corpus. (The embedder's twin is models/embedder/tiny.py.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.errors import WeightsError, explain

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def build_tiny_lm(
    out: Path,
    corpus: Sequence[str],
    seed: int = 0,
    *,
    vocab_size: int = 1024,
    hidden_size: int = 64,
    num_layers: int = 2,
    context_tokens: int = 2048,
) -> None:
    """Write a random Llama (tied embeddings, ChatML, left padding) and its BPE tokenizer to `out`.

    Digits are split first, as SmolLM2 does, so every grade is one token whatever the corpus says.

    Raises:
        WeightsError: an empty corpus.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    _need_text(corpus)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=context_tokens,
    )
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _need_text(corpus: Sequence[str]) -> None:
    if not any(text.strip() for text in corpus):
        raise WeightsError(explain("an empty corpus", "texts to train a tokenizer on", "pass some"))
