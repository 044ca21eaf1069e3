"""A calibrated judge over rows of text: what a table, a command or an endpoint asks of it.

Consumes rows with query, title and, where known, more of the product -> produces grade, P(grade)
and tier of each row, in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ArtifactError, DataContractError, explain
from models.evaluation.tiers import TIER_OF_GRADE, CumPT
from models.text import category_path
from models.types import GRADES, Product, Query

if TYPE_CHECKING:
    from models.judge.scoring import ScoringJudge

OPTIONAL_COLUMNS: dict[str, tuple[type, ...]] = {
    "description": (str,),
    "brand": (str,),
    "category": (str,),
    "attributes": (dict, list),
    "price": (int, float),
}


def load_graded(folder: Path, device: str) -> tuple[ScoringJudge, CumPT]:
    """The judge in `folder`, and how its probabilities are read as a grade.

    Raises:
        ArtifactError: no judge there, or one that was never calibrated.
    """
    from models.judge.scoring import ScoringJudge

    model = ScoringJudge.load(folder, device)
    cumpt = model.encoder.spec.cumpt
    if cumpt is None:
        got = f"the judge in {folder} without a calibration"
        raise ArtifactError(explain(got, "a calibrated judge", "take the one that is registered"))
    return model, cumpt


def grade_pairs(
    model: ScoringJudge, cumpt: CumPT, pairs: Sequence[tuple[Query, Product]], desc: str = ""
) -> list[dict[str, int | float | str]]:
    """grade, p1..p4 and tier of each pair, in order."""
    if not pairs:
        return []
    p_NL = model.score(pairs, desc)
    grades_N = cumpt.grades(p_NL)
    return [
        {
            "grade": int(g),
            **{f"p{c}": float(p) for c, p in zip(GRADES, row, strict=True)},
            "tier": str(TIER_OF_GRADE[int(g)]),
        }
        for g, row in zip(grades_N, p_NL, strict=True)
    ]


def pair_of(index: int, row: Mapping[str, Any], source: object) -> tuple[Query, Product]:
    """Row number `index` of `source` as a pair; NaN in an optional column is nothing.

    Raises:
        DataContractError: an empty query or title, a column of another type, an infinite price,
            attributes that are no pairs of name and value.
    """
    row = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in row.items()
    }
    for name in ("query", "title"):
        if not isinstance(row[name], str) or not row[name].strip():
            got = f"{name} {row[name]!r} in row {index} of {source}"
            raise DataContractError(explain(got, "some text", "drop or fill that row"))
    for name, kinds in OPTIONAL_COLUMNS.items():
        value = row.get(name)
        if value is not None and not isinstance(value, kinds):
            got = f"{name} {value!r} in row {index} of {source}"
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise DataContractError(explain(got, expected, f"convert the column {name}"))
    attributes = row.get("attributes") or {}
    if not isinstance(attributes, Mapping) and any(
        not isinstance(item, tuple) or len(item) != 2 for item in attributes
    ):
        got = f"attributes {attributes!r} in row {index} of {source}"
        raise DataContractError(explain(got, "pairs of name and value", "make it a map"))
    price = row.get("price")
    if price is not None and math.isinf(price):
        got = f"price {price!r} in row {index} of {source}"
        raise DataContractError(explain(got, "a finite number", "drop or repair that price"))
    return Query(f"row:{index}", row["query"]), Product(
        f"row:{index}",
        row["title"],
        description=row.get("description") or "",
        brand=row.get("brand") or "",
        category=category_path(row.get("category") or ""),
        attributes=dict(attributes),
        price=price,
    )
