"""The split: by query text, stable, never empty, never leaking."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from models.errors import DataContractError
from models.schemas import QUERIES
from models.split import SplitConfig, assign, leaks, position


def make_queries(*texts: str) -> pa.Table:
    rows = [{"query_id": f"q{i}", "text": text} for i, text in enumerate(texts)]
    return pa.Table.from_pylist(rows, schema=QUERIES)


def split_of(queries: pa.Table, config: SplitConfig, **more: set[str]) -> dict[str, str]:
    table = assign(queries, config, **more)
    assert table.schema == QUERIES
    return dict(zip(table["query_id"].to_pylist(), table["split"].to_pylist(), strict=True))


def test_shares_are_about_what_was_asked() -> None:
    queries = make_queries(*(f"query {i}" for i in range(5000)))
    count = Counter(split_of(queries, SplitConfig(validation=0.1, test=0.3)).values())
    assert count["test"] / 5000 == pytest.approx(0.3, abs=0.02)
    assert count["validation"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_a_query_keeps_its_split_when_others_come_and_go() -> None:
    texts = [f"query {i}" for i in range(300)]
    first = assign(make_queries(*texts), SplitConfig())
    second = assign(make_queries(*reversed(texts[:200])), SplitConfig())
    known = dict(zip(first["text"].to_pylist(), first["split"].to_pylist(), strict=True))
    assert all(
        known[t] == s
        for t, s in zip(second["text"].to_pylist(), second["split"].to_pylist(), strict=True)
    )


def test_what_is_held_out_can_be_told_before_the_split() -> None:
    config = SplitConfig(validation=0.1, test=0.3, salt="x")
    queries = assign(make_queries(*(f"Query {i}" for i in range(300))), config)
    for text, split in zip(queries["text"].to_pylist(), queries["split"].to_pylist(), strict=True):
        assert config.holds_out(text.upper()) == (split != "train")


def test_one_text_under_two_ids_falls_in_one_split() -> None:
    texts = [f"red shoe {i}" for i in range(200)]
    queries = make_queries(*texts, *(f"  RED   Shoe {i} " for i in range(200)))
    found = assign(queries, SplitConfig())
    split = found["split"].to_pylist()
    assert split[:200] == split[200:]
    assert len(set(split)) == 3
    assert leaks(found) == []


def test_leaks_are_found() -> None:
    queries = make_queries("red shoe", "Red  SHOE", "hat")
    column = pa.array(["train", "test", "test"], pa.string())
    leaky = queries.set_column(queries.schema.get_field_index("split"), "split", column)
    assert leaks(leaky) == ["red shoe"]


@pytest.mark.parametrize("salt", [f"salt {i}" for i in range(30)])
def test_three_texts_are_enough_for_three_splits(salt: str) -> None:
    queries = make_queries("shoe", "hat", "lamp")
    found = split_of(queries, SplitConfig(salt=salt))
    assert sorted(found.values()) == ["test", "train", "validation"]
    again = split_of(queries.take([2, 0, 1]), SplitConfig(salt=salt))
    assert again == found


def test_only_queries_with_judgments_count_as_filling_a_split() -> None:
    queries = make_queries(*(f"query {i}" for i in range(100)))
    judged = {"q3", "q50", "q97"}
    found = split_of(queries, SplitConfig(), judged=judged)
    assert sorted(found[i] for i in judged) == ["test", "train", "validation"]


def test_fewer_than_three_texts_are_refused() -> None:
    with pytest.raises(DataContractError, match="got 2 distinct queries"):
        assign(make_queries("shoe", "hat", "SHOE"), SplitConfig())


def test_shares_must_leave_training_queries() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        SplitConfig(validation=0.5, test=0.5)


def test_position_is_of_the_normalised_text_and_the_salt() -> None:
    assert position("Red  Shoe", "a") == position("red shoe", "a") != position("red shoe", "b")
    assert 0.0 <= position("red shoe", "a") < 1.0
