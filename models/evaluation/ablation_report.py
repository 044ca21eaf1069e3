"""The ablation for people: a wide table, the same as markdown, and a plot of macro-F1.

Consumes the records of `ablation_rows` -> produces text and a matplotlib figure. Shares are shown
in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "macro_f1": "macro-F1",
    "macro_f1_gain": "gain",
    "f1_1": "F1-1",
    "f1_2": "F1-2",
    "f1_3": "F1-3",
    "f1_4": "F1-4",
    "accuracy": "acc",
    "kappa": "kappa",
    "median_macro_f1": "F1 median",
    "median_kappa": "kappa median",
    "spearman": "rho",
    "rule_adherence": "adherence",
    "contradiction_rate": "contra",
}
"""Metrics shown, in order; pass@1.. follow. Those in `WITH_INTERVAL` with their interval."""
WITH_INTERVAL = ("macro_f1", "macro_f1_gain")

Record = Mapping[str, Any]


def wide(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """(headings, one row a judge) as text; "-" where a judge lacks the metric."""
    names = list(dict.fromkeys(r["judge"] for r in records))
    found = {(r["judge"], r["metric"]): r for r in records}
    passes = sorted({m for _, m in found if m.startswith("pass@")}, key=lambda m: int(m[5:]))
    metrics = [*COLUMNS, *passes]
    shown = [m for m in metrics if any((n, m) in found for n in names)]
    headings = ["judge"]
    for metric in shown:
        title = COLUMNS.get(metric, metric)
        headings.append(f"{title} [95 %]" if metric in WITH_INTERVAL else title)
    spread = any(r["spread"] is not None for r in records)
    if spread:
        headings.insert(2, "± seeds")
    rows = []
    for name in names:
        cells = [name, *(_cell(metric, found.get((name, metric))) for metric in shown)]
        if spread:
            value = found[name, "macro_f1"]["spread"]
            cells.insert(2, "-" if value is None else f"{100 * value:.1f}")
        rows.append(cells)
    return headings, rows


def _cell(metric: str, record: Record | None) -> str:
    if record is None:
        return "-"
    sign = "+" if metric.endswith("_gain") else ""
    value = f"{100 * record['mean']:{sign}.1f}"
    if metric not in WITH_INTERVAL:
        return value
    text = f"{value} [{100 * record['low']:{sign}.1f}, {100 * record['high']:{sign}.1f}]"
    if sign and record["spread"] is not None:
        text += f" ± {100 * record['spread']:.1f}"
    return text


def markdown(records: Sequence[Record], caption: str = "") -> str:
    """The wide table for a log or a report, with `caption` above it. After "±" of a gain, as in the
    column of that name, stands the standard deviation over seeds, which no interval holds.
    """
    headings, rows = wide(records)
    lines = [headings, ["---"] * len(headings), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{caption}\n\n{table}\n" if caption else f"{table}\n"


def figure(records: Sequence[Record], title: str) -> Any:
    """macro-F1 of every judge, a point and its interval, first row on top: a matplotlib Figure."""
    from matplotlib.figure import Figure

    chosen = [r for r in records if r["metric"] == "macro_f1"]
    fig = Figure(figsize=(8, 1.2 + 0.4 * len(chosen)), layout="constrained")
    axes = fig.add_subplot()
    places = range(len(chosen))
    means = [100 * r["mean"] for r in chosen]
    reach = [
        [max(0.0, 100 * (r["mean"] - r["low"])) for r in chosen],
        [max(0.0, 100 * (r["high"] - r["mean"])) for r in chosen],
    ]
    axes.errorbar(means, places, xerr=reach, fmt="o", capsize=3)
    axes.set_yticks(places, [r["judge"] for r in chosen])
    axes.invert_yaxis()
    axes.set_xlabel("macro-F1 on held-out queries, percent (mean over seeds, 95 % over queries)")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    return fig
