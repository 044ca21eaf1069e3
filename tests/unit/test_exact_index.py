"""The numpy oracle."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from models.index import exact as module
from models.index.exact import ExactIndex, exact_top, recall_with_ties, top_k


def test_search_is_the_full_sort() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(300, 16)), rng.normal(size=(5, 16))
    index = ExactIndex([str(i) for i in range(300)], vectors)
    ids, scores = index.search(queries, 7)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    for row, (found, score) in enumerate(zip(ids, scores, strict=True)):
        order = np.argsort(-cosines[row])[:7]
        assert found == [str(i) for i in order]
        assert score == pytest.approx(cosines[row][order].tolist(), abs=1e-6)


def test_blocks_of_queries_change_nothing() -> None:
    rng = np.random.default_rng(1)
    index = ExactIndex([str(i) for i in range(50)], rng.normal(size=(50, 4)))
    queries = rng.normal(size=(9, 4)).astype(np.float32)
    assert (index.rows(queries, 5, block=2) == index.rows(queries, 5)).all()


@given(
    num_products=st.integers(0, 40),
    num_queries=st.integers(0, 5),
    k=st.integers(0, 45),
    products_at_once=st.integers(1, 45),
    block=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_rows_are_the_stable_sort_whatever_the_blocks(
    num_products: int, num_queries: int, k: int, products_at_once: int, block: int, seed: int
) -> None:
    """Four signs a vector: cosines are exact and most are tied."""
    rng = np.random.default_rng(seed)
    vectors_ND, queries_QD = (rng.choice([-1.0, 1.0], (n, 4)) for n in (num_products, num_queries))
    index = ExactIndex([str(i) for i in range(num_products)], vectors_ND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PRODUCTS_AT_ONCE", products_at_once)
        found_QK = index.rows(queries_QD, k, block)
    wanted_QK = np.argsort(-(queries_QD @ vectors_ND.T), axis=1, kind="stable")[:, :k]
    assert found_QK.dtype == np.int64 and found_QK.tolist() == wanted_QK.tolist()


def test_the_scores_of_a_large_catalogue_are_never_all_in_memory() -> None:
    num_products, num_queries = 65_536, 64
    rng = np.random.default_rng(3)
    vectors_ND, queries_QD = (rng.normal(size=(n, 2)) for n in (num_products, num_queries))
    index = ExactIndex([""] * num_products, vectors_ND)
    tracemalloc.start()
    try:
        index.rows(queries_QD, 10)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < num_queries * num_products * queries_QD.itemsize


def test_ties_go_to_the_earlier_product() -> None:
    assert top_k(np.array([[0.5, 0.7, 0.7, 0.5]]), 3).tolist() == [[1, 2, 0]]


def test_asking_for_more_than_there_is() -> None:
    ids, _ = ExactIndex(["a", "b"], np.eye(2)).search(np.array([[0.0, 2.0]]), 5)
    assert ids == [["b", "a"]]


def test_a_filter_is_refused_not_ignored() -> None:
    with pytest.raises(ConfigError, match="LanceIndex"):
        ExactIndex(["a"], np.eye(1)).search(np.eye(1), 1, where="price < 3")


def test_ids_and_vectors_must_match() -> None:
    with pytest.raises(ConfigError):
        ExactIndex(["a"], np.eye(2))


def test_a_stream_of_batches_gives_what_all_vectors_give() -> None:
    rng = np.random.default_rng(2)
    vectors, queries = rng.normal(size=(60, 5)), rng.normal(size=(7, 5))
    ids = [str(i) for i in range(60)]
    parts = [(ids[a:b], vectors[a:b]) for a, b in ((0, 1), (1, 20), (20, 60))]
    found, scores = exact_top(parts, queries, 8)
    wanted, cosines = ExactIndex(ids, vectors).search(queries, 8)
    assert found == wanted
    assert scores == pytest.approx(np.array(cosines), abs=1e-6)


def test_recall_counts_what_was_found() -> None:
    truth, cosines = [["a", "b"], ["c", "d"]], [[0.9, 0.8], [0.9, 0.8]]
    found, scores = [["b", "a"], ["c", "x"]], [[0.8, 0.9], [0.9, 0.7]]
    assert recall_with_ties(found, scores, truth, cosines, 2) == (2 / 2 + 1 / 2) / 2
    assert recall_with_ties([["c"]], [[0.9]], [["c", "d"]], [[0.9, 0.8]], 2) == 1 / 2


def test_recall_counts_a_copy_of_the_last_neighbour_and_nothing_farther() -> None:
    truth, cosines = [["a", "b", "c"]], [[0.9, 0.8, 0.8]]
    assert recall_with_ties([["a", "c"]], [[0.9, 0.8]], truth, cosines, 2) == 1.0
    assert recall_with_ties([["a", "z"]], [[0.9, 0.79]], truth, cosines, 2) == 1 / 2
