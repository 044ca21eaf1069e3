"""Settings of an index, and which kind a catalogue of a given size gets. Light."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from models.errors import ConfigError, explain

Kind = Literal["auto", "exact", "ivf_flat", "ivf_sq", "ivf_rq", "ivf_hnsw_sq", "ivf_pq"]
EXACT_BELOW = 20_000
"""Rows below which a scan (30 ms at 384 dimensions) needs no index (measured, ours)."""

PQ_ROWS = 256
"""Rows a product quantiser is trained on at least: one for each code of 8 bits."""
RQ_MULTIPLE = 8
"""What IVF_RQ's dimensions must be a multiple of: their bits are packed."""
KEEP = 3
"""Published versions kept where nobody asked for another number."""


def _ascending(values: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if not values or values[0] < 1 or any(b <= a for a, b in pairwise(values)):
        got = f"{info.field_name} = {list(values)}"
        expected = "one number or more, from 1 up, each larger than the one before"
        raise ConfigError(explain(got, expected, "write them smallest first, e.g. [1, 4, 16]"))
    return values


Ascending = Annotated[tuple[int, ...], AfterValidator(_ascending)]
"""Numbers to try in turn until one is large enough."""


class IndexConfig(BaseModel):
    """How the index is built, and what it must reach before anyone may publish it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Kind = "auto"
    """auto: exact below 20k rows, IVF_SQ above: of the kinds tried it built fastest and reached .97
    once results were re-ranked with the full vectors. Those figures were not kept; `make
    bench-retriever` measures all kinds. IVF_RQ keeps 4 bits a dimension, IVF_SQ 8."""
    min_recall: float = Field(default=0.97, ge=0, le=1)
    """Gate: recall@10 against the exact scan, on the probes."""
    max_unindexed: float = Field(default=0.01, ge=0, le=1)
    """Gate: share of rows outside the vector index; they are searched by a scan."""
    sample: int = Field(default=200, ge=1)
    """Probes: vectors searched for these measurements."""
    nprobes: Ascending = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Numbers of partitions tried, smallest first; the first that passes the gate is kept."""
    refine: Ascending = (1, 2, 5, 10, 20)
    """Multiples of k re-ranked with the full vectors that are tried, smallest first. From
    1 on the scores are true cosines."""
    batch_size: int = Field(default=512, ge=1)
    """Products embedded and written at once."""
    full_text: bool = True
    """Whether a full-text index over title, brand, category and attributes is built."""
    max_text_chars: int = Field(default=400, ge=20)
    """Product text is cut here, in characters. Contrastive SFT and R-GRPO train on the first 400:
    another number shows the encoder texts of another length than it was trained on."""
    dim: int | None = Field(default=None, ge=1)
    """Numbers of a vector that are kept, the first ones; for encoders trained with those
    `matryoshka_dims`. Queries are cut alike. None: all."""
    seed: int = 0


class RefreshConfig(BaseModel):
    """When a refreshed index is trained anew, how much may be deleted, how many versions stay."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_size: int = Field(default=2048, ge=1)
    """Products compared, embedded and merged at once; each batch is one table version."""
    rebuild_share: float = Field(default=0.2, gt=0)
    """The vector index is trained anew once this share of its rows was written after it was built;
    below, new rows join the nearest partitions. Ours; whatever it does to recall is measured."""
    max_parts: int = Field(default=8, ge=1)
    """The same once the index consists of more parts than this: every refresh adds one, and every
    search reads them all."""
    probes: int = Field(default=50, ge=1)
    """Probes that a refreshed index is searched with first, at the setting it was served with. Only
    if these miss the gate are all probes tried, then all settings; then the index is trained
    anew."""
    max_deleted: float = Field(default=0.2, ge=0, le=1)
    """Share of the served products that a refresh to a whole catalogue may delete; beyond it the
    refresh is refused, since a file that is still being written reads as a shorter one. 1 allows
    all. A delta names what it deletes and is not limited. Ours."""
    keep: int | None = Field(default=None, ge=2)
    """Published versions kept: the current one, the one before, and older ones; beside them the one
    that a rollback to the index before goes to. From a refresh that sets it on, promotions and
    later refreshes keep as many. None: as many as before, 3 at first."""


def resolve_kind(kind: Kind, num_rows: int) -> Kind:
    """The kind that "auto" stands for at this size, and what ivf_pq is below its codebook's size.

    >>> resolve_kind("auto", 5_000), resolve_kind("auto", 50_000), resolve_kind("ivf_pq", 10)
    ('exact', 'ivf_sq', 'exact')
    """
    if kind == "ivf_pq" and num_rows < PQ_ROWS:
        return "exact"
    if kind != "auto":
        return kind
    return "exact" if num_rows < EXACT_BELOW else "ivf_sq"
