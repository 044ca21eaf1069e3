"""What one model did on each unit of a frozen evaluation set, so that a later one can be compared.

Consumes a judge's answers or a retriever's run -> produces `Outcomes`, a small JSON file: the value
of each unit (a pair for the judge, a query for the retriever), its segment, numbers that are no
mean over units, and the identity of the set. Two models are comparable where that identity agrees.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ArtifactError, explain
from models.evaluation.judge import grade_metrics
from models.evaluation.retrieval import Grades, ndcg
from models.evaluation.tiers import CumPT
from models.store import Store

FILE = "outcomes.json"


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One model on one frozen set."""

    evaluation_set: str
    """sha256 over the set's content: texts and gold grades, for retrieval the catalogue too."""
    values: Mapping[str, float]
    """By unit id. Units that cannot be measured (no relevant product) are left out."""
    segments: Mapping[str, str]
    """Segment of each unit in `values`."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the whole set: kappa, macro_f1, ..."""
    queries: Mapping[str, str] = field(default_factory=dict)
    """Query of each unit that is a pair: those of one query are not independent. Empty: each unit
    stands for itself."""

    def write(self, folder: Path) -> None:
        """Write outcomes.json into `folder`."""
        (folder / FILE).write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Outcomes:
        """Inverse of `write`.

        Raises:
            ArtifactError: no outcomes.json there: an evaluation made before there was a gate.
        """
        path = folder / FILE
        if not path.is_file():
            raise ArtifactError(
                explain(f"no {FILE} in {folder}", "an evaluation", "run the pipeline again")
            )
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def judge_outcomes(answers: Sequence[Mapping[str, Any]], store: Store, cumpt: CumPT) -> Outcomes:
    """1 where the served grade (CumPT) is the human one, else 0, by "query_id product_id".

    A pair that is labelled twice is two units. numbers: those of `grade_metrics`.
    """
    p_NL = np.array([a["p"] for a in answers], dtype=np.float64)
    gold_N = np.array([a["grade"] for a in answers])
    grades_N = cumpt.grades(p_NL)
    ids = _distinct(f"{a['query_id']} {a['product_id']}" for a in answers)
    queries, products = store.query_by_id, store.product_by_id
    content = [(queries[a["query_id"]], products[a["product_id"]], a["grade"]) for a in answers]
    return Outcomes(
        evaluation_set=_digest(map(repr, content)),
        values={i: float(g == t) for i, g, t in zip(ids, grades_N, gold_N, strict=True)},
        segments={i: q.segment for i, (q, _, _) in zip(ids, content, strict=True)},
        numbers=grade_metrics(gold_N, grades_N),
        queries={i: q.query_id for i, (q, _, _) in zip(ids, content, strict=True)},
    )


def retrieval_outcomes(
    run: Mapping[str, Sequence[str]], qrels: Mapping[str, Grades], store: Store
) -> Outcomes:
    """nDCG@10 of each query that has a product with a gain; numbers: the mean nDCG@10."""
    queries, products = store.query_by_id, store.product_by_id
    each = {q: ndcg(run.get(q, ()), grades) for q, grades in qrels.items()}
    values = {q: v for q, v in each.items() if not math.isnan(v)}
    judged = (repr((queries[q], sorted(grades.items()))) for q, grades in qrels.items())
    catalogue = map(repr, products.values())
    return Outcomes(
        evaluation_set=_digest([_digest(judged), _digest(catalogue)]),
        values=values,
        segments={q: queries[q].segment for q in values},
        numbers={"ndcg@10": float(np.mean(list(values.values())))} if values else {},
    )


def _distinct(ids: Iterable[str]) -> list[str]:
    """Ids with " #2", " #3" behind those that appear again.

    >>> _distinct(["a", "b", "a"])
    ['a', 'b', 'a #2']
    """
    seen: dict[str, int] = {}
    out = []
    for name in ids:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return out


def _digest(texts: Iterable[str]) -> str:
    """sha256 over the texts, whatever their order."""
    total = hashlib.sha256()
    for text in sorted(texts):
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()
