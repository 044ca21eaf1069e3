"""The retriever's ablation as markdown and as a plot.

Consumes the rows of `retriever_rows.table_rows` -> produces text for a log, and a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
PERCENT = (
    "hitrate@100 recall@10 recall@100 ndcg@10 mrr@10 goodrate@10 true_goodrate@10 judged@10 "
    "judged@100 condensed_ndcg@10 hybrid_ndcg@10 hybrid_recall@100 lexical_overlap@10 "
    "bm25_overlap@10 quality@10"
).split()
"""Columns, in percent; those no row has are left out."""
INTERVALS = ("hitrate@100", "ndcg@10", "goodrate@10")
"""Columns that show their interval, and are plotted."""
COSTS = {
    "train_s": "seconds",
    "mining_s": "of them mining",
    "judge_pairs": "judge pairs",
    "judge_tokens": "judge tokens",
}
COMPARED = (
    "ndcg@10 recall@10 recall@100 goodrate@10 true_goodrate@10 condensed_ndcg@10 hybrid_ndcg@10 "
    "lexical_overlap@10 quality@10"
).split()
"""Metrics compared with the baseline query by query, those that are means over queries."""


def columns(rows: Sequence[Row]) -> list[str]:
    """The metrics of PERCENT, at whatever cut-offs the rows have, that some row could measure."""
    named = {key for row in rows for key, value in row.items() if _number(value)}
    stems = list(dict.fromkeys(name.split("@")[0] for name in PERCENT))
    plain = [n for n in named if n.split("@")[0] in stems and n.rpartition("@")[2].isdigit()]
    return sorted(plain, key=lambda n: (stems.index(n.split("@")[0]), int(n.rpartition("@")[2])))


def cell(row: Row, metric: str, plain: bool = False) -> str:
    """A metric in percent; those of INTERVALS with interval and scatter over seeds, unless it is to
    be plain; "-" for none.

    >>> cell({"ndcg@10": 0.25, "ndcg@10_low": 0.2, "ndcg@10_high": 0.3}, "ndcg@10")
    '25.0 [20.0, 30.0]'
    """
    value = row.get(metric)
    if not _number(value):
        return "-"
    shown = f"{100 * float(value):.1f}"  # type: ignore[arg-type]
    if metric in INTERVALS and not plain:
        shown += f" [{100 * row[f'{metric}_low']:.1f}, {100 * row[f'{metric}_high']:.1f}]"
    if metric in INTERVALS and not plain and _number(row.get(f"{metric}_sd")):
        shown += f" sd {100 * row[f'{metric}_sd']:.1f}"
    return shown


def difference(row: Row, metric: str = "ndcg@10") -> str:
    """The paired difference with the baseline in points, with interval; "" where there is none."""
    if not _number(row.get(f"{metric}_diff")):
        return ""
    points = [100 * float(row[f"{metric}_diff{end}"]) for end in ("", "_low", "_high")]
    return f"{points[0]:+.1f} [{points[1]:+.1f}, {points[2]:+.1f}]"


def cost(row: Row, name: str) -> str:
    """A cost as a whole number; "-" for none."""
    return f"{row[name]:.0f}" if _number(row.get(name)) else "-"


def markdown(rows: Sequence[Row], against: str, notes: Sequence[str]) -> str:
    """The overall table with intervals and costs, the differences, then one table a segment with
    the difference in nDCG."""
    overall = [r for r in rows if r["segment"] == "all"]
    metrics = columns(overall)
    head = ["row", "seeds", *metrics, f"nDCG@10 against {against}", *COSTS.values()]
    lines = [*(f"* {note}" for note in notes), "", *_head(head)]
    for row in overall:
        cells = [str(row["run"]), f"{row['seeds']:.0f}", *(cell(row, m) for m in metrics)]
        lines.append(_line([*cells, difference(row), *(cost(row, c) for c in COSTS)]))
    known = [m for m in COMPARED if any(difference(row, m) for row in overall)]
    if known:
        lines += [
            "",
            f"Points against {against}, the same queries [95 %]",
            "",
            *_head(["row", *known]),
        ]
        others = [row for row in overall if row["run"] != against]
        lines += [_line([str(r["run"]), *(difference(r, m) for m in known)]) for r in others]
    for segment in dict.fromkeys(r["segment"] for r in rows if r["segment"] != "all"):
        part = [r for r in rows if r["segment"] == segment]
        lines += [
            "",
            f"Segment {segment}, {part[0]['n']:.0f} queries",
            "",
            *_head(["row", *metrics, f"nDCG@10 against {against}"]),
        ]
        for row in part:
            cells = [str(row["run"]), *(cell(row, m) for m in metrics)]
            lines.append(_line([*cells, difference(row)]))
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[Row]) -> Any:
    """A matplotlib figure: one panel a metric of INTERVALS, one bar a row, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    overall = [r for r in rows if r["segment"] == "all"]
    metrics = [m for m in INTERVALS if any(_number(r.get(m)) for r in overall)]
    made = Figure(figsize=(4.2 * max(1, len(metrics)), 0.45 * len(overall) + 1.2), layout="tight")
    FigureCanvasAgg(made)
    axes = made.subplots(1, max(1, len(metrics)), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=False):
        kept = [(i, r) for i, r in enumerate(overall) if _number(r.get(metric))]
        values = [100 * r[metric] for _, r in kept]
        low = [v - 100 * r[f"{metric}_low"] for v, (_, r) in zip(values, kept, strict=True)]
        high = [100 * r[f"{metric}_high"] - v for v, (_, r) in zip(values, kept, strict=True)]
        axis.barh([i for i, _ in kept], values, xerr=[low, high], color="#7a9cc6", capsize=3)
        axis.set_xlabel(f"{metric}, %")
        axis.set_yticks(range(len(overall)), [str(r["run"]) for r in overall])
        axis.set_ylim(len(overall) - 0.5, -0.5)
    return made


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
