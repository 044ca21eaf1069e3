"""A tiny random encoder, made in the process: for tests and the smoke recipe, no download.

A corpus -> a sentence-transformers folder with a WordPiece vocabulary of its words.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def build_tiny_encoder(
    out: Path,
    corpus: Iterable[str],
    seed: int = 0,
    vocab_size: int = 2000,
    dim: int = 32,
    num_layers: int = 2,
    max_tokens: int = 128,
) -> Path:
    """Write a random BERT encoder, `dim` wide, to `out`; same arguments, same weights.

    Mean pooling over random token vectors already matches shared words, so that a smoke run has a
    retriever that is better than chance and can learn.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_wordpiece(corpus, vocab_size),
        model_max_length=max_tokens,
        **{f"{t.strip('[]').lower()}_token": t for t in _SPECIAL},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=dim,
                intermediate_size=2 * dim,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                max_position_embeddings=max_tokens,
                initializer_range=0.1,
            )
        )
    with tempfile.TemporaryDirectory() as base:
        bert.save_pretrained(base)
        tokenizer.save_pretrained(base)
        transformer = modules.Transformer(base, max_seq_length=max_tokens)
    pooling = modules.Pooling(dim, pooling_mode="mean")
    encoder = SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu")
    encoder.save_pretrained(str(out), create_model_card=False)
    return out


def _wordpiece(corpus: Iterable[str], vocab_size: int) -> Tokenizer:
    """Specials, letters and digits, and the commonest words; ties in alphabetical order.

    The library's own trainer breaks ties by hash order, and two runs would differ.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in corpus:
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in pieces)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789").union(*words))
    pieces = [*_SPECIAL, *letters, *(f"##{c}" for c in letters), *words]
    vocab = {piece: i for i, piece in enumerate(list(dict.fromkeys(pieces))[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(t, vocab[t]) for t in ("[CLS]", "[SEP]")],
    )
    return tokenizer
