"""The report of an evaluation: every row overall, the last one by segment."""

from __future__ import annotations

from tasks.evaluate import evaluation_report


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
