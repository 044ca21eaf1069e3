"""Stores as their owners publish them, read into the data contract of `models/schemas.py`.

Consumes a `SourceConfig` and a folder of files -> produces a `Loaded`: a `Store` of good rows and
the quarantine of refused ones. This module is light; the readers are imported when they are used.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from models.errors import DataContractError, explain
from models.split import SplitConfig
from models.store import Store


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SyntheticSource(_Config):
    """The embedded store: generated from a seed, needs no file."""

    kind: Literal["synthetic"] = "synthetic"
    num_products: int = Field(default=3000, ge=100, le=1_000_000)
    """Catalogue size; one million takes about half a minute."""
    num_queries: int = Field(default=360, ge=6)
    """Distinct queries, dealt evenly over the six segments."""
    judgments_per_query: int = Field(default=16, ge=4)
    """Judged products a query; about a third of them excellent where the store has as many."""
    seed: int = 0
    """Same seed and sizes, same store, byte for byte."""


class HomeDepotSource(_Config):
    """Home Depot Product Search Relevance (Kaggle, 2016)."""

    kind: Literal["homedepot"] = "homedepot"


class ChorusSource(_Config):
    """The Chorus electronics shop (repository o19s/chorus)."""

    kind: Literal["chorus"] = "chorus"


class EsciSource(_Config):
    """Amazon shopping queries, ESCI (repository amazon-science/esci-data)."""

    kind: Literal["esci"] = "esci"
    locale: str = "us"
    """Only rows of this product_locale are read."""


class WandsSource(_Config):
    """Wayfair annotation data set, WANDS (repository wayfair/WANDS)."""

    kind: Literal["wands"] = "wands"


class TablesSource(_Config):
    """Your own products, queries, judgments and interactions, as parquet or CSV."""

    kind: Literal["tables"] = "tables"
    encoding: str = "utf-8"
    """Encoding of the CSV files."""
    grade_offset: int = 0
    """Added to every grade, each rater's too: 1 for a store graded 0..3."""


SourceConfig = Annotated[
    SyntheticSource | HomeDepotSource | ChorusSource | EsciSource | WandsSource | TablesSource,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class Loaded:
    """A store of good rows, and the refused rows in `schemas.QUARANTINE`."""

    store: Store
    quarantine: pa.Table


def load(source: SourceConfig, data_dir: Path | None, split: SplitConfig | None = None) -> Loaded:
    """Read one source into a store; row faults go to quarantine.

    data_dir: folder of the files; not looked at by `synthetic`.
    split: what will be held out, and is not counted by what stands in for sales; None: the default.

    Raises:
        DataContractError: files are missing, unreadable, or lack a column.
    """
    from models.sources.cleaning import clean

    tables, notes = _reader(source).read(source, _folder(source, data_dir), split or SplitConfig())
    good, quarantine = clean(tables)
    return Loaded(Store(**good, notes={"source": source.kind, **notes}), quarantine)


def digest(source: SourceConfig, data_dir: Path | None) -> str:
    """sha256 (hex) of the names and bytes of just the files this source reads; "" if it reads none.

    Raises:
        DataContractError: files are missing.
    """
    if isinstance(source, SyntheticSource):
        return ""
    total = hashlib.sha256()
    for path in sorted(_reader(source).files(source, _folder(source, data_dir))):
        with path.open("rb") as stream:
            inner = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{path.name}\0{inner}\n".encode())
    return total.hexdigest()


def _reader(source: SourceConfig) -> ModuleType:
    """The module behind `source.kind`; it has `files` of (source, folder), and `read` of
    (source, folder, split)."""
    return importlib.import_module(f"models.sources.{source.kind}")


def _folder(source: SourceConfig, data_dir: Path | None) -> Path:
    if isinstance(source, SyntheticSource):
        return Path()
    if data_dir is None:
        raise DataContractError(
            explain(f"no data folder for {source.kind}", "--data DIR", _reader(source).WHERE)
        )
    return Path(data_dir)
