"""The champion judge and the published index, opened for use on the command line."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import ConfigError, DataContractError, explain
from models.index.filters import Filters
from models.index.search import MODES, search
from models.judge.graded import grade_pairs, load_graded, pair_of
from models.types import GRADES, Product, Query
from tasks.artifacts import ArtifactRef, ArtifactStore
from tasks.publish import open_published
from tasks.registry import champion, nothing_of
from tasks.release import finish_pending, model_name
from tasks.settings import settings

if TYPE_CHECKING:
    from flows.recipes import DataConfig

NO_FILTERS = Filters()


def _champion_ref(artifacts: ArtifactStore, store_name: str, role: str) -> ArtifactRef:
    name = model_name(store_name, role)
    found = champion(name, store=artifacts)
    if found is None:
        raise nothing_of(store_name, "champion", store=artifacts)
    return found.ref


def _artifacts(store_name: str) -> ArtifactStore:
    """The store, once a move of champions that a crash cut off is carried out. One under way is
    not waited for: until it is done, the champions are those from before."""
    artifacts = ArtifactStore(settings().model_copy(update={"experiment": store_name}))
    finish_pending(store_name, artifacts=artifacts, wait=False)
    return artifacts


class Champion:
    """The champion judge: grades pairs and explains them."""

    def __init__(self, model: Any, cumpt: Any) -> None:
        self.model = model
        self.cumpt = cumpt

    @classmethod
    def open(cls, store_name: str) -> Champion:
        """Load the champion of a store.

        Raises:
            ArtifactError: there is none, or its files are gone.
        """
        artifacts = _artifacts(store_name)
        folder = artifacts.path(_champion_ref(artifacts, store_name, "judge"))
        return cls(*load_graded(folder, settings().torch_device))

    def grade(
        self, pairs: Sequence[tuple[Query, Product]], desc: str = ""
    ) -> list[dict[str, int | float | str]]:
        """grade, p1..p4 and tier of each pair, in order."""
        return grade_pairs(self.model, self.cumpt, pairs, desc)

    def reasoning(
        self, query: Query, product: Product, grade: int, max_new_tokens: int = 96
    ) -> str:
        """The judge's steps for a grade it gave, and a last line where its own led elsewhere."""
        from models.judge.answers import TRIES, explain
        from models.teacher.response import render_verdicts

        said = explain(self.model, query, product, grade, max_new_tokens)
        text = said.text if said.finished else f"{said.text} [cut]"
        if not said.agrees:
            return f"{text}\n[none of {TRIES} explanations could be read as steps]"
        if said.own is None:
            return text
        own = render_verdicts(said.own).replace("\n", ", ")
        return f"{text}\n[these verdicts lead to grade {grade}; by itself it wrote {own}]"


@dataclass(frozen=True)
class Hit:
    """One product found: its score in the channel that found it, and the judge's view, empty where
    it was not asked."""

    product: Product
    score: float
    graded: Mapping[str, int | float | str]

    @property
    def expected_grade(self) -> float:
        """E[grade] by the judge's probabilities."""
        return sum(g * float(self.graded[f"p{g}"]) for g in GRADES)


class ProductSearch:
    """The published index and the encoder it was built with."""

    def __init__(self, encoder: Any, index: Any) -> None:
        self.encoder = encoder
        self.index = index

    @classmethod
    def open(cls, store_name: str) -> ProductSearch:
        """Load what is published of a store.

        Raises:
            ArtifactError: nothing is, or the files are gone.
        """
        index, weights = open_published(store_name, artifacts=_artifacts(store_name))
        from models.embedder.encoder import load_encoder

        return cls(load_encoder(weights, settings().torch_device), index)

    def search(
        self, query: str, k: int, mode: str, filters: Filters = NO_FILTERS
    ) -> list[tuple[Product, float]]:
        """(product, score), best first; all of them pass the filters."""
        from models.embedder.encoder import encode

        if mode not in MODES:
            raise ConfigError(explain(f"--mode {mode}", f"one of {', '.join(MODES)}", "fix it"))
        lexical = mode == "lexical"
        vector = np.zeros(0) if lexical else encode(self.encoder, [query], prompt="query")[0]
        hits = search(self.index, query, vector, k, mode, filters.sql())
        by_id = self.index.products([product_id for product_id, _ in hits])
        return [(by_id[product_id], score) for product_id, score in hits]


def find_products(
    store_name: str,
    query: str,
    k: int,
    mode: str,
    filters: Filters = NO_FILTERS,
    rerank: int = 0,
    judged: bool = True,
) -> list[Hit]:
    """The k best products, each with the judge's grade unless `judged` is off, which loads no
    judge; the best `rerank` of the channel's ranking are put in the order of the judge's expected
    grade first, equal ones as they were.

    Raises:
        ConfigError: a re-ranking without the judge.
    """
    if rerank and not judged:
        got = f"--rerank {rerank} with --no-tiers"
        raise ConfigError(explain(got, "one of the two", "leave one out: the judge re-ranks"))
    found = ProductSearch.open(store_name).search(query, max(k, rerank), mode, filters)
    if not judged:
        return [Hit(product, score, {}) for product, score in found]
    graded = Champion.open(store_name).grade([(Query("cli", query), p) for p, _ in found])
    hits = [Hit(p, score, row) for (p, score), row in zip(found, graded, strict=True)]
    top = sorted(hits[:rerank], key=lambda hit: -hit.expected_grade)
    return (top + hits[rerank:])[:k]


def score_table(judge: Champion, source: Path, out: Path) -> int:
    """Score a parquet of pairs; returns the number of rows.

    Raises:
        DataContractError: unreadable, a column is missing, or a query or title is empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(source)
    except (OSError, pa.ArrowInvalid) as error:
        got = f"{source}: {error}"
        raise DataContractError(explain(got, "a parquet file", "check the path")) from None
    missing = [c for c in ("query", "title") if c not in table.column_names]
    if missing:
        got = f"{source} with columns {table.column_names}"
        raise DataContractError(explain(got, f"columns {missing} as well", "add them"))
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            explain(f"--out {out}", "a file in an existing folder", "make the folder")
        )
    pairs = [pair_of(i, row, source) for i, row in enumerate(table.to_pylist())]
    rows = judge.grade(pairs, desc="scoring")
    for name in ("grade", "p1", "p2", "p3", "p4", "tier"):
        kind = pa.string() if name == "tier" else pa.int8() if name == "grade" else pa.float64()
        column = pa.array([row[name] for row in rows], kind)
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    partial = out.with_suffix(out.suffix + ".partial")
    pq.write_table(table, partial)
    partial.replace(out)
    return int(table.num_rows)


def evaluate_champion(
    judge: Champion, config: DataConfig, data: Path, max_pairs: int
) -> tuple[list[dict[str, Any]], str]:
    """Champion rows (argmax and CumPT) on the labelled pairs of any store in a known format, and
    what was refused of it (`cleaning.refusals`).

    Raises:
        DataContractError: no pairs, or more rows of a table were refused than the gate allows.
    """
    from models.evaluation.judge import grade_metrics, probability_metrics
    from models.sources import load
    from models.sources.cleaning import refusals
    from tasks.quality import CEILING, tables_over_ceiling

    loaded = load(config.source, data, config.split)
    pairs, refused = loaded.store.pairs(), refusals(loaded.quarantine)
    over = tables_over_ceiling(loaded.store, loaded.quarantine, config.quality)
    if over or not pairs:
        got = f"{len(pairs)} labelled pairs in {data}"
        got += f"; rows were refused: {refused}" if refused else ""
        expected = (
            f"pairs, and at most {config.quality.max_quarantine:.0%} of a table's rows refused"
        )
        raise DataContractError(explain(got, expected, CEILING))
    if len(pairs) > max_pairs:
        pairs = random.Random(0).sample(pairs, max_pairs)
    gold_N = np.array([p.grade for p in pairs])
    p_NL = judge.model.score([(p.query, p.product) for p in pairs], "evaluating")
    head = {"segment": "all", "n": len(pairs)}
    argmax, cumpt = p_NL.argmax(1) + 1, judge.cumpt.grades(p_NL)
    numbers = probability_metrics(gold_N, p_NL, np.array([p.rating for p in pairs]))
    return [
        {"judge": "champion", **head, **grade_metrics(gold_N, argmax), **numbers},
        {"judge": "champion + CumPT", **head, **grade_metrics(gold_N, cumpt)},
    ], refused
