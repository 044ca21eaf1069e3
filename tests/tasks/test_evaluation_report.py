"""The report of an evaluation: every row overall, the last one by segment."""

from __future__ import annotations

import pytest

from tasks.evaluate import RetrievalEvalConfig, evaluation_report


def test_the_last_row_is_read_by_segment_and_what_is_missing_is_blank() -> None:
    rows = [
        {"judge": "majority", "segment": "all", "n": 8, "macro_f1": 0.125},
        {"judge": "majority", "segment": "brand", "n": 3, "macro_f1": 0.1},
        {"judge": "SFT", "segment": "all", "n": 8, "macro_f1": 0.5, "kappa": 0.25},
        {"judge": "SFT", "segment": "brand", "n": 3, "macro_f1": 0.375, "kappa": float("nan")},
    ]
    assert evaluation_report("judge", rows).splitlines() == [
        "# judge on held-out queries",
        "",
        "| judge | n | macro_f1 | kappa |",
        "| --- | ---: | ---: | ---: |",
        "| majority | 8 | 0.125 |  |",
        "| SFT | 8 | 0.500 | 0.250 |",
        "",
        "## SFT by segment",
        "",
        "| segment | n | macro_f1 | kappa |",
        "| --- | ---: | ---: | ---: |",
        "| brand | 3 | 0.375 |  |",
    ]


@pytest.mark.parametrize(
    ("settings", "depth"),
    [
        ({}, 100),
        ({"ks": (5, 20)}, 100),
        ({"ks": (10, 6000)}, 6000),
        ({"depth": 11}, 100),
        ({"depth": 500}, 500),
        ({"depth": 20, "ks": ()}, 20),
    ],
)
def test_a_run_is_as_deep_as_its_largest_cutoff(settings: dict[str, object], depth: int) -> None:
    config = RetrievalEvalConfig.model_validate(settings)
    assert config.depth == config.model_dump(mode="json")["depth"] == depth
