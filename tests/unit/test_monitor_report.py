"""Limits, the reactions they ask for, and the cooldown: values in, a report out."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from models.evaluation.monitor import Bound, MonitorConfig, Reaction, Report, cooling

CONFIG = MonitorConfig()
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def report(**values: float | None) -> Report:
    """A pass in which every value that is not named is 0."""
    return Report.of(CONFIG, dict.fromkeys(CONFIG.bounds, 0.0) | values, {})


def asked(**values: float | None) -> dict[str, list[str]]:
    """Names of the breaches, by the reaction that they ask for."""
    found = report(**values).reactions
    return {str(reaction): [v.name for v in row] for reaction, row in found.items()}


def test_a_limit_is_kept_at_its_value_and_broken_above() -> None:
    limit = CONFIG.query_mmd.limit
    assert report(query_mmd=limit).over == () and asked() == {}
    assert asked(query_mmd=math.nextafter(limit, 1)) == {"retrain-embedder": ["query_mmd"]}


def test_what_is_not_a_number_is_a_breach_and_what_was_not_measured_is_none() -> None:
    assert asked(entropy_rise=math.nan) == {"retrain-judge": ["entropy_rise"]}
    unmeasured = report(label_age_days=None)
    assert unmeasured.over == () and "drift/label_age_days" not in unmeasured.metrics
    (row,) = [r for r in unmeasured.rows() if r["measure"] == "label_age_days"]
    assert (row["value"], row["state"]) == (None, "not measured")


def test_each_deployment_is_asked_for_once() -> None:
    found = asked(query_mmd=1.0, category_shift=1.0, index_stale_share=1.0, label_age_days=99.0)
    assert found == {
        "none": ["label_age_days"],
        "retrain-embedder": ["query_mmd", "category_shift"],
        "refresh-index": ["index_stale_share"],
    }


def test_the_whole_chain_stands_for_its_parts() -> None:
    found = asked(query_new_terms=1.0, query_mmd=1.0)
    assert found == {"retrain": ["query_new_terms", "query_mmd"]}
    # a retriever must be taught by the judge that it is released with
    found = asked(query_mmd=1.0, confidence_drop=1.0)
    assert found == {"retrain": ["confidence_drop", "query_mmd"]}


def test_the_report_names_breaches_first_and_says_what_became_of_them() -> None:
    text = report(query_mmd=0.5).markdown(["retrain-embedder asked for: query_mmd"])
    assert text.startswith(f"**1 of {len(CONFIG.bounds)} over their limit**")
    first = next(line for line in text.splitlines() if "OVER" in line)
    assert "query_mmd | 0.5 | 0.02 | retrain-embedder" in first
    assert text.index(first) < text.index("ok |") < text.index("* retrain-embedder asked for")
    assert report().markdown().startswith("**all within their limits**")


def test_metrics_are_every_value_and_the_number_of_breaches() -> None:
    metrics = report(query_mmd=0.5).metrics
    assert metrics["drift/query_mmd"] == 0.5 and metrics["drift/breaches"] == 1
    assert metrics.keys() == {f"drift/{name}" for name in CONFIG.bounds} | {"drift/breaches"}


@pytest.mark.parametrize(
    ("reaction", "hours"), [(Reaction.RETRAIN, 24), (Reaction.REFRESH_INDEX, 1)]
)
def test_the_cooldown_ends_on_the_minute(reaction: Reaction, hours: int) -> None:
    last = NOW - timedelta(hours=hours)
    assert cooling(reaction, None, NOW, CONFIG) is None
    assert cooling(reaction, last, NOW, CONFIG) is None
    assert cooling(reaction, last + timedelta(minutes=1), NOW, CONFIG) == NOW + timedelta(minutes=1)


def test_a_bound_can_be_told_to_run_nothing() -> None:
    config = MonitorConfig(query_mmd=Bound(limit=0.0))
    found = Report.of(config, {"query_mmd": 1.0}, {}).reactions
    assert list(found) == [Reaction.NONE]
