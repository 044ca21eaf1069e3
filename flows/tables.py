"""Terminal tables of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from models.evaluation.ablation_report import wide
from models.evaluation.gate import Decision, Outcome, shown, verdict
from models.evaluation.monitor import Report
from tasks.services import RUNNING, Status
from tasks.stage import StageReport

JUDGE_COLUMNS = {
    "n": "n",
    "macro_f1": "macro-F1",
    "f1_1": "F1-1",
    "f1_2": "F1-2",
    "f1_3": "F1-3",
    "f1_4": "F1-4",
    "accuracy": "acc",
    "kappa": "kappa",
    "spearman": "rho",
    "ece": "ECE",
    "rule_adherence": "adherence",
    "contradiction_rate": "contra",
}
RETRIEVAL_COLUMNS = {
    "n": "n",
    "recall@10": "R@10",
    "recall@100": "R@100",
    "hitrate@100": "Hit@100",
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "goodrate@10": "Good@10",
    "judged@10": "judged@10",
    "condensed_ndcg@10": "nDCG judged",
    "hybrid_ndcg@10": "nDCG +BM25",
    "hybrid_recall@100": "R@100 +BM25",
    "lexical_overlap@10": "lex@10",
    "bm25_overlap@10": "BM25@10",
    "quality@10": "quality",
}


def judge_table(
    rows: Sequence[Mapping[str, Any]], title: str = "Judge on held-out queries"
) -> Table:
    """Judges by row; segments follow the overall block."""
    return _table(title, "judge", JUDGE_COLUMNS, rows)


def retrieval_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Runs by row; segments follow the overall block."""
    ordered = sorted(rows, key=lambda r: (r["segment"] != "all", r["segment"]))
    return _table("Retrieval on held-out queries", "run", RETRIEVAL_COLUMNS, ordered)


def ablation_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Judges by row, means over seeds; intervals over queries where there is room for them."""
    headings, rows = wide(records)
    title = "Judge ablation on held-out queries, percent"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(headings):
        table.add_column(escape(name), justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def ablation_rows_table(rows: Sequence[Any]) -> Table:
    """Every row of an ablation: what it adds, and the settings that make it."""
    table = Table(title="Rows", title_justify="left")
    for name in ("row", "title", "adds", "settings"):
        table.add_column(name, overflow="fold", no_wrap=name in ("row", "title"))
    for row in rows:
        table.add_row(row.key, row.title, escape(row.adds), escape("\n".join(row.settings)))
    return table


def stage_table(reports: Sequence[StageReport]) -> Table:
    """What every stage did, why, and how long it took."""
    table = Table(title="Stages", title_justify="left")
    for name in ("stage", "state", "seconds", "why"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for r in reports:
        state = "[green]cached[/]" if r.cached else "made"
        table.add_row(r.ref.label, state, f"{r.seconds:.1f}", escape(r.reason))
    return table


def spent(
    reports: Sequence[StageReport],
    seconds: float,
    release_s: float = 0.0,
    loading_s: float = 0.0,
) -> str:
    """What of `seconds` was the work itself (stages; registering, gate and publishing; loading the
    libraries of stages before the first of them), and what the rest did: servers, records, looking
    up cached stages. Where a stage was made, the rest is shown as a share of the work.

    >>> spent([], 12.0, release_s=2.0, loading_s=4.0)
    'stages 0.0 s, release 2.0 s, libraries 4.0 s, everything else 6.0 s'
    """
    stages = sum(r.seconds for r in reports if not r.cached)
    parts = {"stages": stages, "release": release_s, "libraries": loading_s}
    work = sum(parts.values())
    shown = [f"{name} {s:.1f} s" for name, s in parts.items() if s or name == "stages"]
    share = f" ({(seconds - work) / work:.0%} on top)" if stages else ""
    return f"{', '.join(shown)}, everything else {seconds - work:.1f} s{share}"


def registry_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Registered versions."""
    table = Table(title="Registered", title_justify="left")
    for name in ("model", "version", "alias", "artifact"):
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("model", "version", "alias", "artifact")))
    return table


def decision_table(decision: Decision) -> Table:
    """Every check of the gate."""
    table = Table(title=f"Gate: {decision.outcome}", title_justify="left")
    for name in ("check", "candidate", "champion", "bound", "passed", "note"):
        right = name in ("candidate", "champion", "bound")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    colours = {Outcome.ASK: "yellow", Outcome.HOLD: "red", Outcome.PROMOTE: "dim"}
    for r in decision.reasons:
        said = "yes" if r.passed else f"[{colours[r.otherwise]}]{verdict(r)}[/]"
        values = (shown(v) for v in (r.candidate, r.champion, r.bound))
        table.add_row(escape(r.name), *map(escape, values), said, escape(r.note))
    return table


def monitor_table(report: Report) -> Table:
    """Every value of a monitor pass, with its limit."""
    table = Table(title="Monitor", title_justify="left")
    for name in ("measure", "value", "limit", "state", "runs", "note"):
        table.add_column(name, justify="right" if name in ("value", "limit") else "left")
    colours = {"OVER": "red", "ok": "green"}
    for row in report.rows():
        state = f"[{colours.get(row['state'], 'dim')}]{row['state']}[/]"
        value, note = shown(row["value"]), escape(row["note"])
        table.add_row(row["measure"], value, shown(row["limit"]), state, row["reaction"], note)
    return table


VERSION_METRICS = {
    "judge": ("macro_f1", "accuracy", "kappa"),
    "embedder": ("ndcg_at_10", "recall_at_100"),
    "index": ("index_recall",),
}
"""Metrics of `relearn versions`, by role."""


def versions_table(store_name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Versions by role, newest first."""
    table = Table(title=f"Versions of {store_name}", title_justify="left")
    for name in ("model", "version", "alias", "metrics", "made with", "decision", "note"):
        table.add_column(name, overflow="fold", no_wrap=name in ("model", "version"))
    before = None
    for row in rows:
        if before is not None and row["role"] != before:
            table.add_section()
        before = row["role"]
        known = [m for m in VERSION_METRICS[before] if m in row["metrics"]]
        metrics = "  ".join(f"{m.replace('_at_', '@')} {row['metrics'][m]:.3f}" for m in known)
        note = "; ".join(filter(None, (row["promoted"], row["flag"])))
        cells = (before, row["version"], row["alias"], metrics, row["made_with"])
        table.add_row(*cells, escape(row["decision"]), escape(note))
    return table


def services_table(rows: Sequence[Status]) -> Table:
    """What `relearn up` started, and where to look."""
    table = Table(title="Services", title_justify="left")
    for name in ("service", "state", "address", "pid", "log"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        pid, log = (str(row.record.pid), str(row.record.log)) if row.record else ("", "")
        colour = "green" if row.state == RUNNING else "red"
        table.add_row(row.title, f"[{colour}]{row.state}[/]", row.url, pid, log)
    return table


def _table(
    title: str, key: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("segment", no_wrap=True)
    table.add_column(key, no_wrap=True)
    shown = {c: label for c, label in columns.items() if any(c in row for row in rows)}
    for label in shown.values():
        table.add_column(label, justify="right")
    before = None
    for row in rows:
        if before is not None and row["segment"] != before:
            table.add_section()
        first = "" if row["segment"] == before else str(row["segment"])
        before = row["segment"]
        table.add_row(first, str(row[key]), *(_cell(c, row.get(c)) for c in shown))
    return table


def _cell(column: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if column == "n":
        return f"{value:.0f}"
    return f"{100 * value:.1f}"
