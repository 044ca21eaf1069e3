"""The numpy oracle."""

from __future__ import annotations

import numpy as np
import pytest

from models.errors import ConfigError
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
