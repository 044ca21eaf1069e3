"""Train, validation and test, by query text: no test query ever reaches a training stage.

Consumes a queries table -> produces it with its `split` column. The same text under two ids falls
into one split, because the hash is of the normalised text [PEERS trap 8: splitting by pair leaks].
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.errors import ConfigError, DataContractError, explain
from models.store import SPLITS
from models.text import normalise


class SplitConfig(BaseModel):
    """Shares of queries held out; the rest is for training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    validation: float = Field(default=0.15, gt=0, lt=1)
    """Expected share of validation queries."""
    test: float = Field(default=0.2, gt=0, lt=1)
    """Expected share of test queries."""
    salt: str = "relearn"
    """Another salt, another split."""

    def holds_out(self, text: str) -> bool:
        """Whether a query of this text is for validation or test, by its place alone."""
        return position(text, self.salt) < self.test + self.validation

    @model_validator(mode="after")
    def _leaves_training(self) -> SplitConfig:
        if self.test + self.validation >= 1:
            got = f"test {self.test} + validation {self.validation}"
            raise ConfigError(explain(got, "less than 1 together", "lower one of them"))
        return self


def position(text: str, salt: str) -> float:
    """Place of a text in [0, 1): the first 52 bits of sha1(salt, normalised text)."""
    digest = hashlib.sha1(f"{salt}\0{normalise(text)}".encode()).hexdigest()
    return int(digest[:13], 16) / 16.0**13


def assign(
    queries: pa.Table, config: SplitConfig, judged: Collection[str] | None = None
) -> pa.Table:
    """Fill the split column.

    Test takes the positions below `test`, validation the next `validation`, train the rest. A split
    that got no text with judgments takes one from the split that has most of them: the text whose
    position is nearest to its own range, so the outcome depends on nothing but the texts.

    judged: ids of the queries with judgments; None counts every query.

    Raises:
        DataContractError: fewer than three distinct texts have judgments.
    """
    texts = [normalise(text) for text in queries["text"].to_pylist()]
    ids = queries["query_id"].to_pylist()
    places = {text: position(text, config.salt) for text in texts}
    splits = {text: _split_at(place, config) for text, place in places.items()}
    counted = {t for t, i in zip(texts, ids, strict=True) if judged is None or i in judged}
    if len(counted) < len(SPLITS):
        raise DataContractError(
            explain(
                f"{len(counted)} distinct queries with judgments",
                "at least one each for train, validation and test",
                "bring judgments for three queries or more",
            )
        )
    _fill_empty(splits, places, counted, config)
    column = pa.array([splits[text] for text in texts], pa.string())
    return queries.set_column(queries.schema.get_field_index("split"), "split", column)


def leaks(queries: pa.Table) -> list[str]:
    """Normalised texts that stand in more than one split, sorted; must be empty."""
    seen: dict[str, str | None] = {}
    found = set()
    for text, split in zip(queries["text"].to_pylist(), queries["split"].to_pylist(), strict=True):
        if seen.setdefault(normalise(text), split) != split:
            found.add(normalise(text))
    return sorted(found)


def _ranges(config: SplitConfig) -> dict[str, tuple[float, float]]:
    edge = config.test + config.validation
    return {
        "train": (edge, 1.0),
        "validation": (config.test, edge),
        "test": (0.0, config.test),
    }


def _split_at(place: float, config: SplitConfig) -> str:
    return next(name for name, (low, high) in _ranges(config).items() if low <= place < high)


def _fill_empty(
    splits: dict[str, str], places: dict[str, float], counted: set[str], config: SplitConfig
) -> None:
    """Give every empty split one counted text; changes `splits` in place."""
    for name, (low, high) in _ranges(config).items():
        members = {s: sorted(t for t in counted if splits[t] == s) for s in SPLITS}
        if members[name]:
            continue
        donor = max(SPLITS, key=lambda s: len(members[s]))
        middle = (low + high) / 2
        moved = min(members[donor], key=lambda t: (abs(places[t] - middle), t))
        splits[moved] = name
