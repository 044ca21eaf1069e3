"""The probes' exact neighbours follow what a refresh does to the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.index.exact import ExactIndex
from models.index.nearest import DEPTH, NearestProducts

DIM, PROBES = 6, 5


def vectors(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.normal(size=(rows, DIM)).astype(np.float32)


def known(catalogue: dict[str, np.ndarray], probes_PD: np.ndarray) -> NearestProducts:
    batch = list(catalogue), np.stack(list(catalogue.values()))
    return NearestProducts.scan([batch], probes_PD)


@pytest.mark.parametrize("seed", range(8))
def test_lists_stay_the_exact_nearest_as_far_as_they_go(seed: int) -> None:
    rng = np.random.default_rng(seed)
    catalogue = {f"p{i}": v for i, v in enumerate(vectors(rng, 400))}
    probes_PD = vectors(rng, PROBES)
    nearest, depths = known(catalogue, probes_PD), []
    for turn in range(6):
        gone = rng.choice(list(catalogue), 25, replace=False).tolist()
        changed = rng.choice(list(catalogue), 25, replace=False).tolist()
        ids = [*changed, *[f"new{turn}-{i}" for i in range(10)]]
        rows_ND = vectors(rng, len(ids))
        catalogue |= dict(zip(ids, rows_ND, strict=True))
        nearest.replace(ids, rows_ND)
        nearest.remove([*gone, "never there"])
        for i in gone:
            del catalogue[i]
        exact = ExactIndex(list(catalogue), np.stack(list(catalogue.values())))
        truth, cosines = exact.search(probes_PD, DEPTH)
        for row, scores, true, near in zip(
            nearest.ids, nearest.scores, truth, cosines, strict=True
        ):
            assert row == true[: len(row)]
            assert scores == pytest.approx(near[: len(row)], abs=1e-6)
        depths.append(min(map(len, nearest.ids)))
    assert depths[0] > depths[-1] >= 10, "they grow shorter, and serve the gate for a while"


def test_a_written_product_beyond_what_is_known_is_not_taken_in() -> None:
    """Products that no list holds may be nearer than it."""
    catalogue = {f"p{i}": np.float32([1, i / 100, 0, 0, 0, 0]) for i in range(300)}
    nearest = known(catalogue, np.float32([[1, 0, 0, 0, 0, 0]]))
    nearest.remove([f"p{i}" for i in range(95)])
    nearest.replace(["near", "far"], np.float32([[1, 0.5, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0]]))
    assert nearest.ids == [["near", "p95", "p96", "p97", "p98", "p99"]]
    assert nearest.reach(1, 6) and not nearest.reach(1, 7) and not nearest.reach(2, 1)
    nearest.remove(nearest.ids[0])
    nearest.replace(["other"], np.float32([[1, 0, 0, 0, 0, 0]]))
    assert nearest.ids == [[]], "nothing is known of the others any more"


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probes_PD = vectors(rng, PROBES)
    nearest = known({f'p"{i}ß': v for i, v in enumerate(vectors(rng, 30))}, probes_PD)
    nearest.write(tmp_path / "1.parquet")
    again = NearestProducts.read(tmp_path / "1.parquet", probes_PD)
    assert (again.ids, again.scores) == (nearest.ids, nearest.scores)
    nothing = NearestProducts.read(tmp_path / "2.parquet", probes_PD)
    assert nothing.ids == [] and not nothing.reach(1, 1)
