"""GGUF files as Hugging Face folders, without a hub.

Consumes one GGUF file (llama architecture, gpt2-style BPE) -> produces a folder that
`AutoModelForCausalLM.from_pretrained` trains and `AutoTokenizer.from_pretrained` reads.

Departures from transformers' own GGUF loader, which marks what it loads as untrainable:
1. Every tensor is dequantised to a float tensor; the quantisation noise of the file stays.
2. The pad token is `<|endoftext|>` and padding is on the left. The file says pad = eos, with which
   EOS is masked out of every loss and never learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import WeightsError, explain

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD_TOKEN = "<|endoftext|>"
CONTROL_TOKEN = 3
"""GGUF token type of special tokens [gguf specification, tokenizer.ggml.token_type]."""

TIED_NOISE = 0.3
"""An output matrix nearer to the embedding than this (relative Frobenius norm) is the same matrix
quantised otherwise. 4-bit noise is about 0.1; two unrelated matrices differ by about 1.4."""

BLOCK_NAMES: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class _File:
    """An open GGUF file: metadata by key, tensors by name, both decoded when asked for."""

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> _File:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(str(path))
        except (OSError, ValueError, IndexError) as error:
            raise WeightsError(
                explain(f"{path}: {error}", "a GGUF file", "fetch it again")
            ) from error
        return cls(path, reader.fields, {t.name: t for t in reader.tensors})

    def value(self, key: str, default: Any = None) -> Any:
        """Metadata under `key`; without a default its absence is an error."""
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise WeightsError(explain(f"{self.path.name} without {key}", key, "use another file"))
        return default

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, outermost dimension first."""
        import numpy as np
        from gguf import dequantize

        if name not in self.tensors:
            raise WeightsError(explain(f"{self.path.name} without {name}", name, "use another"))
        raw = self.tensors[name]
        return np.require(dequantize(raw.data, raw.tensor_type), np.float32, ["C", "W"])


def convert(gguf: Path, out: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write the Hugging Face folder of `gguf` into `out` (made if missing); about 10 s for 135M.

    Raises:
        WeightsError: no GGUF file, another architecture or tokenizer, or missing tensors.
    """
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    file = _File.open(gguf)
    architecture = file.value("general.architecture")
    if architecture != "llama":
        raise WeightsError(explain(f"architecture {architecture}", "llama", "use the hub's copy"))
    tokenizer = _tokenizer(file)
    state = {name: torch.from_numpy(array) for name, array in _state(file)}
    config = _config(file, tied="lm_head.weight" not in state)
    config.pad_token_id = tokenizer.pad_token_id
    model = LlamaForCausalLM(config)
    _load(model, state, gguf)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.to(getattr(torch, dtype)).save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def _load(model: torch.nn.Module, state: Mapping[str, torch.Tensor], gguf: Path) -> None:
    """Fill `model` from `state`; nothing may be left random or over."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()  # type: ignore[operator]
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise WeightsError(
            explain(
                f"missing {sorted(missing)[:3]}, unknown {sorted(unexpected)[:3]} in {gguf.name}",
                "the tensors of a Llama",
                "use another file",
            )
        )


def _config(file: _File, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    def get(key: str, default: Any = None) -> Any:
        return file.value(f"llama.{key}", default)

    heads = get("attention.head_count")
    return LlamaConfig(
        vocab_size=len(file.value("tokenizer.ggml.tokens")),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        rope_theta=float(get("rope.freq_base", 10_000.0)),
        tie_word_embeddings=tied,
        bos_token_id=file.value("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.value("tokenizer.ggml.eos_token_id"),
    )


def _state(file: _File) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face parameter names and float32 arrays; no `lm_head.weight` when it is tied."""
    embedding, output = file.tensor("token_embd.weight"), None
    if "output.weight" in file.tensors:
        output = file.tensor("output.weight")
        if _is_same_matrix(embedding, output):  # stored twice; the output copy has more bits
            embedding, output = output, None
    yield "model.embed_tokens.weight", embedding
    if output is not None:
        yield "lm_head.weight", output
    yield "model.norm.weight", file.tensor("output_norm.weight")
    heads = file.value("llama.attention.head_count")
    rope_heads = {
        "attn_q": heads,
        "attn_k": file.value("llama.attention.head_count_kv", heads),
    }
    for layer in range(file.value("llama.block_count")):
        for theirs, ours in BLOCK_NAMES.items():
            array = file.tensor(f"blk.{layer}.{theirs}.weight")
            if theirs in rope_heads:
                array = unpermute(array, rope_heads[theirs])
            yield f"model.layers.{layer}.{ours}.weight", array


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary halves in a query or key projection.

    weight: [num_heads * head_dim, hidden]. llama.cpp keeps rows (0, half), (1, half + 1), ... of a
    head side by side; Hugging Face keeps the first halves first.

    >>> import numpy as np
    >>> unpermute(np.array([[0], [2], [1], [3]]), 1).ravel().tolist()
    [0, 1, 2, 3]
    """
    import numpy as np

    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _is_same_matrix(a: np.ndarray, b: np.ndarray) -> bool:
    import numpy as np

    return bool(np.linalg.norm(a - b) < TIED_NOISE * np.linalg.norm(b))


def _tokenizer(file: _File) -> PreTrainedTokenizerFast:
    """The file's BPE with SmolLM's splitting: single digits, then gpt2's bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitting = file.value("tokenizer.ggml.pre")
    if splitting != "smollm":
        raise WeightsError(explain(f"tokenizer {splitting}", "smollm", "use the hub's copy"))
    tokens: list[str] = file.value("tokenizer.ggml.tokens")
    if PAD_TOKEN not in tokens:
        raise WeightsError(
            explain(f"no {PAD_TOKEN} token", "a pad token that is not EOS", "use another")
        )
    merges = [tuple(m.split(" ", 1)) for m in file.value("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = file.value("tokenizer.ggml.token_type")
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[file.value("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[file.value("tokenizer.ggml.eos_token_id")],
        pad_token=PAD_TOKEN,
        padding_side="left",
        model_max_length=file.value("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = file.value("tokenizer.chat_template")
    return tokenizer
