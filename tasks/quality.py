"""The blocking data gate: Great Expectations suites over the four tables and the quarantine.

Consumes a `Store` and its quarantine -> produces a `QualityReport` and, in a folder, report.md,
results.json, quarantine.parquet and data_docs/. A failed blocking expectation raises, after all of
that is written, so that the reason can be looked up.

Every check that Great Expectations has no expectation for (a dangling reference, a text in two
splits) is a derived column that holds the offending value and must be null: its examples then are
the offenders themselves.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from models.errors import DataContractError, explain
from models.schemas import EVENTS, MAX_TEXT, QUARANTINE_FILE, TABLES
from models.split import leaks
from models.store import SPLITS, Store
from models.text import normalise
from models.types import GRADES, SEGMENTS, Category

if TYPE_CHECKING:
    from great_expectations.expectations import Expectation

log = logging.getLogger(__name__)

CEILING = (
    "repair these rows at the source, or raise data.quality.max_quarantine; grades that begin at 0 "
    "are read with --set data.source.grade_offset=1"
)
_EXAMPLES = 3
_LOOKED_AT = 20
"""Offending values asked for; the first _EXAMPLES distinct ones are shown."""
_EXAMPLE_CHARS = 160


class QualityConfig(BaseModel):
    """Ceilings of the gate."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_quarantine: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a table's rows that may be refused."""
    max_one_grade: float = Field(default=0.97, gt=0, le=1)
    """Largest share of the judgments that one grade may have."""
    max_damaged: float = Field(default=0.01, ge=0, le=1)
    """A text is damaged when more than this share of its characters is U+FFFD."""
    damaged_rows: float = Field(default=0.01, ge=0, le=1)
    """Largest share of damaged texts in a table."""


@dataclass(frozen=True)
class Check:
    """The outcome of one expectation. examples: at most three offending values, as text."""

    table: str
    name: str
    passed: bool
    blocking: bool
    unexpected: int
    examples: tuple[str, ...]
    do: str


@dataclass(frozen=True)
class QualityReport:
    """What the gate found.

    rows: table -> good rows. refused: (table, reason) -> quarantined rows. grades: grade -> rows.
    """

    checks: tuple[Check, ...]
    rows: Mapping[str, int]
    refused: Mapping[tuple[str, str], int]
    grades: Mapping[int, int]
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Check, ...]:
        """Failed blocking checks."""
        return tuple(c for c in self.checks if c.blocking and not c.passed)

    @property
    def warnings(self) -> tuple[Check, ...]:
        """Failed checks that do not block."""
        return tuple(c for c in self.checks if not c.blocking and not c.passed)

    def markdown(self) -> str:
        """The report as markdown."""
        refused = Counter[str]()
        for (table, _), count in self.refused.items():
            refused[table] += count
        lines = ["# Data quality", "", "| table | rows | refused |", "| --- | ---: | ---: |"]
        lines += [f"| {t} | {n} | {refused[t]} |" for t, n in self.rows.items()]
        total = sum(self.grades.values()) or 1
        lines += ["", "| grade | judgments | share |", "| --- | ---: | ---: |"]
        lines += [f"| {g} | {n} | {n / total:.1%} |" for g, n in sorted(self.grades.items())]
        if self.refused:
            lines += ["", "| refused from | reason | rows |", "| --- | --- | ---: |"]
            lines += [f"| {t} | {r} | {n} |" for (t, r), n in sorted(self.refused.items())]
        lines += [
            "",
            "| expectation | result | unexpected | examples |",
            "| --- | --- | ---: | --- |",
        ]
        lines += [_row(check) for check in self.checks]
        lines += ["", *(f"* {name}: {text}" for name, text in sorted(self.notes.items()))]
        return "\n".join(lines) + "\n"


def validate(store: Store, quarantine: pa.Table, config: QualityConfig, out: Path) -> QualityReport:
    """Run every suite, write the report into `out`, and stop at a failed blocking expectation.

    A `split` column of nulls only (before the split stage) is not checked for leaks.

    Raises:
        DataContractError: names each failed expectation, its count, three examples and what to do.
    """
    out.mkdir(parents=True, exist_ok=True)
    frames = _frames(store, quarantine, config)
    checks = _run(frames, _suites(frames, config), out)
    report = QualityReport(
        checks=tuple(checks),
        rows={name: len(getattr(store, name)) for name in TABLES},
        refused=dict(_reasons(quarantine)),
        grades=Counter(store.judgments["grade"].to_pylist()),
        notes=store.notes,
    )
    (out / "report.md").write_text(report.markdown())
    (out / "results.json").write_text(json.dumps([asdict(c) for c in checks], indent=1))
    pq.write_table(quarantine, out / QUARANTINE_FILE)
    for check in report.warnings:
        log.warning("%s: %s (%d) %s", check.table, check.name, check.unexpected, check.do)
    if report.failures:
        raise DataContractError(_message(report.failures, out))
    log.info("%d expectations hold over %s", len(checks) - len(report.warnings), report.rows)
    return report


def _message(failures: tuple[Check, ...], out: Path) -> str:
    """The first failure in full, the others by name."""
    first = failures[0]
    got = f"{first.unexpected} unexpected in {first.table}"
    if first.examples:
        got += f", e.g. {'; '.join(first.examples)}"
    if len(failures) > 1:
        others = ", ".join(f"{c.table}: {c.name} ({c.unexpected})" for c in failures[1:])
        got += f" [also failed: {others}]"
    return explain(got, f'"{first.name}"', f"{first.do}; the whole report is {out / 'report.md'}")


def _row(check: Check) -> str:
    result = "ok" if check.passed else "FAILED" if check.blocking else "warning"
    examples = "; ".join(check.examples).replace("|", "\\|").replace("\n", " ")
    return f"| {check.table}: {check.name} | {result} | {check.unexpected} | {examples} |"


def _reasons(quarantine: pa.Table) -> Counter[tuple[str, str]]:
    tables, reasons = quarantine["table"].to_pylist(), quarantine["reason"].to_pylist()
    return Counter(zip(tables, reasons, strict=True))


# ---------------------------------------------------------------- the frames looked at


def _frames(store: Store, quarantine: pa.Table, config: QualityConfig) -> dict[str, pd.DataFrame]:
    """One frame a table: nested columns as lengths, and the derived columns that must be null."""
    frames = {name: _flat(getattr(store, name)) for name in TABLES}
    frames["products"]["damaged_title"] = _damaged(store.products["title"], config)
    frames["queries"]["damaged_text"] = _damaged(store.queries["text"], config)
    frames["queries"]["leaked_text"] = _leaked(store.queries)
    judged = pc.is_in(store.queries["query_id"], store.judgments["query_id"].combine_chunks())
    frames["queries"]["unjudged"] = _only(store.queries["text"], pc.invert(judged))
    for name in ("judgments", "interactions"):
        table = getattr(store, name)
        for key, other in (("query_id", store.queries), ("product_id", store.products)):
            known = pc.is_in(table[key], other[key].combine_chunks())
            frames[name][f"unknown_{key}"] = _only(table[key], pc.invert(known))
    frames["judgments"]["too_common"] = _too_common(store.judgments, config)
    frames["quarantine"] = _over_ceiling(store, quarantine, config)
    return frames


def _flat(table: pa.Table) -> pd.DataFrame:
    for i, column in enumerate(table.schema):
        if pa.types.is_map(column.type) or pa.types.is_list(column.type):
            if pa.types.is_map(column.type):
                lengths = pa.array([None if v is None else len(v) for v in table[i].to_pylist()])
            else:
                lengths = pc.list_value_length(table[i])
            table = table.set_column(i, column.name, lengths)
    return table.to_pandas()


def _only(values: pa.ChunkedArray, wanted: pa.ChunkedArray) -> pd.Series:
    """`values` where `wanted`, else null."""
    return pc.if_else(wanted, values, None).to_pandas().astype(object)


def _damaged(texts: pa.ChunkedArray, config: QualityConfig) -> pd.Series:
    bad = pc.cast(pc.count_substring(texts, "\ufffd"), pa.float64())
    share = pc.divide(bad, pc.cast(pc.utf8_length(texts), pa.float64()))
    return _only(texts, pc.greater(share, config.max_damaged))


def _leaked(queries: pa.Table) -> pd.Series:
    if queries["split"].null_count == len(queries):
        return pd.Series([None] * len(queries), dtype=object)
    found = set(leaks(queries))
    texts = queries["text"].to_pylist()
    return pd.Series([t if normalise(t) in found else None for t in texts], dtype=object)


def _too_common(judgments: pa.Table, config: QualityConfig) -> pd.Series:
    """The grade, where one grade has more than its share."""
    grades = judgments["grade"].to_pandas()
    share = grades.map(grades.value_counts(normalize=True))
    return ("grade " + grades.astype(str)).astype(object).where(share > config.max_one_grade, None)


def tables_over_ceiling(store: Store, quarantine: pa.Table, config: QualityConfig) -> list[str]:
    """Tables that lost more rows than the ceiling."""
    refused = quarantine["table"].to_pandas().value_counts()
    return [
        str(name)
        for name, count in refused.items()
        if count > config.max_quarantine * (count + len(getattr(store, str(name))))
    ]


def _over_ceiling(store: Store, quarantine: pa.Table, config: QualityConfig) -> pd.DataFrame:
    """The quarantine, with the rows of tables that lost more than the ceiling in `over_ceiling`."""
    frame = quarantine.to_pandas()
    over = tables_over_ceiling(store, quarantine, config)
    told = (frame["table"] + " " + frame["reason"] + " " + frame["row"]).astype(object)
    return frame.assign(over_ceiling=told.where(frame["table"].isin(over), None))


# ---------------------------------------------------------------- the suites


def _suites(
    frames: Mapping[str, pd.DataFrame], config: QualityConfig
) -> dict[str, list[Expectation]]:
    """Expectations a table; tables without rows have only those that concern emptiness."""
    makers = {
        "quarantine": _quarantine_suite,
        "judgments": _judgments_suite,
        "queries": _queries_suite,
        "products": _products_suite,
        "interactions": _interactions_suite,
    }
    suites: dict[str, list[Expectation]] = {}
    for name, make in makers.items():
        must_have = [_at_least_one(name)] if name in ("products", "queries", "judgments") else []
        suites[name] = must_have + (make(config) if len(frames[name]) else [])
    return {name: suite for name, suite in suites.items() if suite}


def _expect(kind: str, name: str, do: str, blocking: bool = True, **arguments: Any) -> Expectation:
    import great_expectations.expectations as gxe

    severity = "critical" if blocking else "warning"
    meta = {"name": name, "do": do, "blocking": blocking}
    return getattr(gxe, kind)(**arguments, meta=meta, severity=severity, notes=name)


def _at_least_one(table: str) -> Expectation:
    do = {
        "judgments": "bring human labels; without a single one there is nothing to learn from",
        "queries": "bring the queries of your judgments",
        "products": "bring the catalogue",
    }[table]
    return _expect("ExpectTableRowCountToBeBetween", "at least one row", do, min_value=1)


def _schema(table: str) -> Expectation:
    return _expect(
        "ExpectTableColumnsToMatchSet",
        "the columns of models/schemas.py",
        "run ingest again",
        column_set=TABLES[table].names,
        exact_match=False,
    )


def _key(column: str) -> list[Expectation]:
    do = f"give every row its own {column}"
    return [
        _expect("ExpectColumnValuesToNotBeNull", f"{column} is given", do, column=column),
        _expect("ExpectColumnValuesToBeUnique", f"{column} is unique", do, column=column),
    ]


def _none(column: str, name: str, do: str, blocking: bool = True, mostly: float = 1.0
          ) -> Expectation:  # fmt: skip
    return _expect("ExpectColumnValuesToBeNull", name, do, blocking, column=column, mostly=mostly)


def _one_of(column: str, values: list[Any]) -> Expectation:
    return _expect(
        "ExpectColumnValuesToBeInSet",
        f"{column} is one of {', '.join(map(str, values))}",
        f"map {column} to one of these",
        column=column,
        value_set=values,
    )


def _between(column: str, low: float, high: float | None, **more: Any) -> Expectation:
    least = "above" if more.get("strict_min") else "at least"
    most = "" if high is None else f" and at most {high:g}"
    return _expect(
        "ExpectColumnValuesToBeBetween",
        f"{column} is {least} {low:g}{most}",
        f"repair {column}",
        column=column,
        min_value=low,
        max_value=high,
        **more,
    )


def _length(column: str) -> Expectation:
    return _expect(
        "ExpectColumnValueLengthsToBeBetween",
        f"{column} has 1 to {MAX_TEXT} characters",
        "shorten it",
        column=column,
        min_value=1,
        max_value=MAX_TEXT,
    )


def _encoding(column: str, config: QualityConfig) -> Expectation:
    return _none(
        f"damaged_{column}",
        f"at most {config.damaged_rows:.0%} of {column}s with replacement characters (U+FFFD)",
        "read the files in their own encoding",
        mostly=1.0 - config.damaged_rows,
    )


def _products_suite(config: QualityConfig) -> list[Expectation]:
    return [
        _schema("products"),
        *_key("product_id"),
        _length("title"),
        _encoding("title", config),
        _between("price", 0.0, None, strict_min=True),
        _between("rating", 0.0, 5.0),
        _between("rating_count", 0, None),
        _between("sales", 0.0, None),
    ]


def _queries_suite(config: QualityConfig) -> list[Expectation]:
    return [
        _schema("queries"),
        *_key("query_id"),
        _length("text"),
        _encoding("text", config),
        _one_of("segment", list(SEGMENTS)),
        _one_of("split", list(SPLITS)),
        _between("frequency", 0.0, None),
        _none("leaked_text", "no query text in two splits", "split by models.split.assign"),
        _none(
            "unjudged",
            "every query has judgments",
            "nothing: such queries serve no stage",
            blocking=False,
        ),
    ]


def _judgments_suite(config: QualityConfig) -> list[Expectation]:
    return [
        _none(
            "too_common",
            f"at least two grades, none above {config.max_one_grade:.0%}",
            "a store with one grade only teaches nothing: bring labels of other grades",
        ),
        _schema("judgments"),
        _expect(
            "ExpectCompoundColumnsToBeUnique",
            "(query_id, product_id) is unique",
            "keep one judgment a pair",
            column_list=["query_id", "product_id"],
        ),
        _none("unknown_query_id", "every judged query exists", "add the query"),
        _none("unknown_product_id", "every judged product exists", "add the product"),
        _one_of("grade", list(GRADES)),
        _one_of("verdict_category", [c.value for c in Category]),
        _between("weight", 0.0, None, strict_min=True),
    ]


def _interactions_suite(config: QualityConfig) -> list[Expectation]:
    return [
        _schema("interactions"),
        _none("unknown_query_id", "every query of the log exists", "add the query"),
        _none("unknown_product_id", "every product of the log exists", "add the product"),
        _one_of("event", list(EVENTS)),
    ]


def _quarantine_suite(config: QualityConfig) -> list[Expectation]:
    name = f"at most {config.max_quarantine:.0%} of a table's rows refused"
    return [_none("over_ceiling", name, f"{CEILING}; quarantine.parquet lists all rows")]


# ---------------------------------------------------------------- Great Expectations


def _run(
    frames: Mapping[str, pd.DataFrame], suites: Mapping[str, list[Expectation]], out: Path
) -> list[Check]:
    """Validate every frame, and build the Data Docs in out/data_docs."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    _add_docs(context, out / "data_docs")
    source = context.data_sources.add_pandas("store")
    checks: list[Check] = []
    for name, expectations in suites.items():
        suite = context.suites.add(gx.ExpectationSuite(name, expectations=expectations))
        batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=name, data=batch, suite=suite)
        )
        result = definition.run(
            batch_parameters={"dataframe": frames[name]},
            result_format={"result_format": "BASIC", "partial_unexpected_count": _LOOKED_AT},
        )
        checks += [_check(name, one) for one in result.results]
    context.build_data_docs(site_names=["docs"])
    return checks


def _add_docs(context: Any, folder: Path) -> None:
    for name, site in list(context.variables.data_docs_sites.items()):
        context.delete_data_docs_site(
            name
        )  # the default one, in a folder made for it in the temp folder
        shutil.rmtree(site["store_backend"]["base_directory"], ignore_errors=True)
    context.add_data_docs_site(
        "docs",
        {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(folder.resolve()),
            },
        },
    )


def _check(table: str, outcome: Any) -> Check:
    meta, result = outcome.expectation_config.meta, outcome.result
    broken = outcome.exception_info or {}
    unexpected = result.get("unexpected_count")
    if unexpected is None:
        unexpected = 0 if outcome.success else 1
    examples = result.get("partial_unexpected_list") or []
    if not outcome.success and not examples:
        examples = [result.get("observed_value", broken or "not computed")]
    return Check(
        table=table,
        name=meta["name"],
        passed=bool(outcome.success),
        blocking=bool(meta["blocking"]),
        unexpected=int(unexpected),
        examples=tuple(dict.fromkeys(map(_clip, examples)))[:_EXAMPLES],
        do=meta["do"],
    )


def _clip(value: object) -> str:
    text = str(value)
    return text if len(text) <= _EXAMPLE_CHARS else text[: _EXAMPLE_CHARS - 3] + "..."
