"""One shared encoder for queries and products [TaoSearchEmb s3.1].

Texts -> unit vectors, float32. Queries go in as typed, products through `text.product_text`, and
each side gets the prompt of that name if the model has one.

Shapes: N texts, D dim.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from models.embedder.config import EncoderConfig
from models.errors import DivergenceError, WeightsError, explain
from models.lm.precision import autocast
from models.text import product_text
from models.types import Product

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import nn

log = logging.getLogger(__name__)
Side = Literal["query", "document"]


def load_encoder(path: str, device: str = "cpu") -> SentenceTransformer:
    """A sentence-transformers model from a local folder or a hub id.

    Only safetensors are read (no pickles) and no code that comes with a model is run. Weights are
    float32 whatever they are kept in: in bf16 most of AdamW's steps would round to nothing, and
    autocast is there for speed.

    Raises:
        WeightsError: nothing there, or no safetensors in it.
    """
    import torch
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(
            path,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    return encoder.eval()


def _unusable(path: str, error: Exception) -> WeightsError:
    return WeightsError(
        explain(
            f"no usable encoder at {path!r} ({str(error).splitlines()[0]})",
            "a sentence-transformers folder or hub id with safetensors",
            "run `make setup`, or set the embedder's path to a folder you have",
        )
    )


def prepare_encoder(path: str, config: EncoderConfig, out: Path) -> None:
    """Write a base model with the pooling and prompts of `config` to `out`.

    For models that come without them: a BERT (mean), or a decoder LLM (last token, with an
    instruction before the query). A model that is a sentence-transformers one already needs none.
    One without a padding token gets its end token as one.

    Raises:
        WeightsError: nothing there, no safetensors in it, or a tokenizer with neither token.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    try:
        # text alone: by default the library would wrap it in a chat model's template
        body = modules.Transformer(
            path,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            modality_config={
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            module_output_name="token_embeddings",
        )
    except (OSError, ValueError) as error:
        raise _unusable(path, error) from error
    if body.tokenizer.pad_token is None:
        if body.tokenizer.eos_token is None:
            raise _unusable(path, ValueError("its tokenizer has no padding and no end token"))
        body.tokenizer.pad_token = body.tokenizer.eos_token
    pooling = modules.Pooling(body.get_embedding_dimension(), pooling_mode=config.pooling)
    encoder = SentenceTransformer(
        modules=[body, pooling, modules.Normalize()],
        prompts={"query": config.query_prompt, "document": config.document_prompt},
        device="cpu",
    )
    encoder.save_pretrained(str(out), safe_serialization=True, create_model_card=False)


def features(encoder: SentenceTransformer, texts: Sequence[str], side: Side) -> dict[str, Any]:
    """What the encoder reads of one batch, with the prompt of that side, on its device."""
    prompt = encoder.prompts.get(side) or None
    read = encoder.preprocess(list(texts), prompt=prompt)
    return {k: v.to(encoder.device) if hasattr(v, "to") else v for k, v in read.items()}


def embed(encoder: SentenceTransformer, texts: Sequence[str], side: Side) -> torch.Tensor:
    """[N, D] unit vectors of one batch; with gradient where it is on."""
    return unit_vectors(encoder, features(encoder, texts, side))


def unit_vectors(encoder: nn.Module, read: Mapping[str, Any]) -> torch.Tensor:
    """[N, D] float32 of what `features` made: the first `truncate_dim` numbers, where the encoder
    has one, at length 1. A trainer may have wrapped the encoder."""
    from torch.nn import functional

    vectors_ND = encoder(dict(read))["sentence_embedding"].float()
    width = getattr(getattr(encoder, "module", encoder), "truncate_dim", None)
    return functional.normalize(vectors_ND[:, :width], dim=-1)


def save(encoder: SentenceTransformer, folder: Path) -> None:
    """Write the encoder into `folder`, its vectors whole: without a `truncate_dim`."""
    width, encoder.truncate_dim = encoder.truncate_dim, None
    try:
        encoder.save_pretrained(str(folder), safe_serialization=True, create_model_card=False)
    finally:
        encoder.truncate_dim = width


def replace(encoder: SentenceTransformer, folder: Path) -> None:
    """The same in place of what is there: what `folder` holds is never half an encoder."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save(encoder, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def encode(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    batch_size: int = 64,
    desc: str = "",
    prompt: Side = "document",
    bf16: bool = False,
) -> np.ndarray:
    """Unit vectors [N, D] float32, in the order of `texts`; sorted by length on the way.

    Args:
        desc: what the progress bar says; "" shows none.
        bf16: autocast; twice as fast on a CPU that has it, cosines within about 1e-2.

    Raises:
        DivergenceError: a vector is not finite.
    """
    import torch
    from tqdm.auto import tqdm

    dim = encoder.get_embedding_dimension() or 0
    out = np.zeros((len(texts), dim), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    was_training = encoder.training
    encoder.eval()
    bar = tqdm(total=len(texts), desc=desc, unit="text", disable=not desc, mininterval=1.0)
    with bar, torch.inference_mode(), autocast(str(encoder.device), bf16):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            out[rows] = embed(encoder, [texts[i] for i in rows], prompt).cpu().numpy()
            bar.update(len(rows))
    encoder.train(was_training)
    if not np.isfinite(out).all():
        raise DivergenceError(
            explain("vectors that are not finite", "unit vectors", "go back to an older encoder")
        )
    return out


def encode_products(
    encoder: SentenceTransformer,
    products: Sequence[Product],
    batch_size: int = 64,
    desc: str = "",
    bf16: bool = False,
) -> np.ndarray:
    """Unit vectors [N, D] of products, each read through `text.product_text`."""
    return encode(encoder, [product_text(p) for p in products], batch_size, desc, "document", bf16)


def document_encoder(
    encoder: SentenceTransformer, batch_size: int = 64, bf16: bool = False
) -> Callable[[Sequence[str]], np.ndarray]:
    """The function an index needs: product texts -> unit vectors."""

    def encode_texts(texts: Sequence[str]) -> np.ndarray:
        return encode(encoder, texts, batch_size, "", "document", bf16)

    return encode_texts
