"""The gate: whether a candidate release takes the champion's place, with every reason.

Consumes two `Contender`s (judge, embedder and index that belong together, and what they did on one
frozen evaluation set) -> produces a `Decision`: promote, ask a person, or hold. Pure: no clock, no
files, the same arguments give the same decision. Expected outcomes are values, nothing is raised.

Each check is one `Reason` row that passes, or fails towards `ask` or towards `hold`; the decision
is the most careful of the rows. The rules, all ours (no paper describes its gate):

1. Absolute floors: judge kappa against humans (below it a judge may not be a reward), judge
   macro-F1, retrieval nDCG@10, recall of the index. Missing and NaN fail.
2. Lineage: index, embedder and judge belong together and none of them was withdrawn.
3. Comparable: both were measured on the same units of the same set.
4. No slice worse than a bound. A drop the paired bootstrap cannot tell from chance asks.
5. A clear gain of the judge or of the retriever: large enough and significant. A gain that is not
   clear asks, and so does a set of few units; no gain at all holds.

The first release of a store has nothing to be compared with: it is promoted, its floors are noted.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.evaluation.outcomes import Outcomes
from models.evaluation.significance import Comparison, paired_bootstrap

METRIC_OF_ROLE = {"judge": "accuracy", "retrieval": "nDCG@10"}
"""What `Outcomes.values` holds, and so what is compared unit by unit."""
ALL = "all"


class GateConfig(BaseModel):
    """What a candidate must reach. Every default is ours, with its reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    min_kappa: float = Field(0.2, ge=-1, le=1)
    """Quadratic kappa of the served grades against humans, below which a judge may not be a reward.
    0.2 is where Landis and Koch (1977) stop calling agreement slight; humans reach .74 to .80."""
    min_macro_f1: float = Field(0.2, ge=0, le=1)
    """Judge's macro-F1. Above what the majority grade alone reaches (.11 to .16 on our stores)."""
    min_ndcg: float = Field(0.05, ge=0, le=1)
    """Retriever's nDCG@10 over the whole catalogue. Far above random (.002), far below BM25 (.22):
    it catches a broken encoder, the comparison does the rest."""
    min_index_recall: float = Field(0.97, ge=0, le=1)
    """Recall@10 of the index against the exact one; the default of `IndexConfig.min_recall`, so
    that an index built with that lowered is not released by the way."""
    min_gain: float = Field(0.01, ge=0)
    """Relative gain of judge accuracy or nDCG@10 that is worth a release: every new judge pays for
    its reward cache again."""
    max_drop: float = Field(0.01, ge=0)
    """Absolute drop of either metric over all units that is let through for a gain of the other."""
    max_slice_drop: float = Field(0.05, ge=0)
    """Absolute drop within one segment; wider, because a segment has a tenth of the units."""
    min_units: int = Field(30, ge=1)
    """Queries below which a percentile bootstrap is too narrow to be believed; with fewer a person
    is asked."""
    min_slice_units: int = Field(10, ge=1)
    """Queries below which a segment is shown but not decided on."""
    bootstrap_samples: int = Field(2000, ge=100)
    """Resamples of a 95 % interval; its ends move by about a twentieth of its width."""
    seed: int = 0


class Outcome(enum.StrEnum):
    """What happens to the candidate."""

    PROMOTE = "promote"
    ASK = "ask"
    HOLD = "hold"


CAREFUL = (Outcome.PROMOTE, Outcome.ASK, Outcome.HOLD)
"""From the least to the most careful."""
Value = float | str | None


@dataclass(frozen=True, slots=True)
class Reason:
    """One check. `otherwise`: what its failure leads to (promote: it is only noted)."""

    name: str
    candidate: Value
    champion: Value
    bound: Value
    passed: bool
    otherwise: Outcome = Outcome.HOLD
    note: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome and every check behind it."""

    outcome: Outcome
    reasons: tuple[Reason, ...]

    @classmethod
    def of(cls, reasons: Iterable[Reason]) -> Decision:
        """The most careful outcome that a failed check leads to; promote when none failed."""
        rows = tuple(reasons)
        outcome = max((r.otherwise for r in rows if not r.passed), key=CAREFUL.index, default=None)
        return cls(outcome or Outcome.PROMOTE, rows)

    def but(self, reason: Reason) -> Decision:
        """The decision with one more check."""
        return Decision.of((*self.reasons, reason))

    @property
    def failed(self) -> tuple[Reason, ...]:
        """The failed checks, the most careful first."""
        rows = [r for r in self.reasons if not r.passed]
        return tuple(sorted(rows, key=lambda r: -CAREFUL.index(r.otherwise)))

    @property
    def summary(self) -> str:
        """One line: why it was not promoted, or what was gained.

        >>> Decision.of([Reason("judge kappa", 0.1, 0.3, 0.2, False)]).summary
        'judge kappa: 0.1, bound 0.2'
        """
        if self.outcome is Outcome.PROMOTE:
            return next((f"{r.name}: {r.note}" for r in self.reasons if r.name == GAIN), "") or (
                "the first release of this store"
            )
        deciding = [r for r in self.failed if r.otherwise is self.outcome]
        return "; ".join(f"{r.name}: {r.note or _against_bound(r)}" for r in deciding)

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes null."""
        rows = [{k: _plain(v) for k, v in asdict(r).items()} for r in self.reasons]
        return {"outcome": str(self.outcome), "summary": self.summary, "reasons": rows}

    def as_markdown(self) -> str:
        """A heading and the table of checks."""
        lines = [
            f"# Decision: {self.outcome}",
            "",
            self.summary,
            "",
            "| check | candidate | champion | bound | passed | note |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for r in self.reasons:
            cells = (r.name, *map(shown, (r.candidate, r.champion, r.bound)), verdict(r), r.note)
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        return "\n".join(lines) + "\n"


GAIN = "a clear gain"


@dataclass(frozen=True, slots=True)
class Contender:
    """A judge, an embedder and an index that belong together, and what is known of them."""

    labels: Mapping[str, str]
    """Artifact of each role: judge, embedder, index."""
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    """Of the judge and of the retriever (keys of METRIC_OF_ROLE); one may be missing."""
    index_recall: float | None = None
    broken_lineage: str = ""
    """What does not belong together, "" when everything does."""
    withdrawn: tuple[str, ...] = ()
    """Parts, or the judge that taught the embedder, which were rolled back once."""
    not_comparable: str = ""
    """Why it could not be measured on the candidate's set, and what to do; "" when it was."""


def decide(candidate: Contender, champion: Contender | None, config: GateConfig) -> Decision:
    """Whether `candidate` takes the place of `champion` (None: there is none yet).

    >>> decide(Contender({"judge": "judge@1"}), None, GateConfig()).outcome
    <Outcome.PROMOTE: 'promote'>
    """
    floors = list(_floors(candidate, champion, config))
    if champion is None:
        first = Reason("champion", "first", None, None, True, note="there is none to compare with")
        return Decision.of([first, *(replace(r, otherwise=Outcome.PROMOTE) for r in floors)])
    if dict(candidate.labels) == dict(champion.labels):
        note = "the candidate is the champion: nothing to do"
        return Decision.of([Reason("something new", "none", None, None, False, note=note)])
    rows = [*_lineage(candidate), *floors]
    compared: dict[str, Comparison] = {}
    for role in METRIC_OF_ROLE:
        comparable, pairs = _comparable(role, candidate, champion)
        rows.append(comparable)
        if comparable.passed:
            slices, compared[role] = _slices(role, pairs, config)
            rows += [_enough(role, _num_queries(pairs[0], pairs[3]), config), *slices]
    if len(compared) == len(METRIC_OF_ROLE):
        rows.append(_gain(compared, champion, config))
    return Decision.of(rows)


def _lineage(candidate: Contender) -> Iterable[Reason]:
    broken, gone = candidate.broken_lineage, ", ".join(candidate.withdrawn)
    yield Reason("parts belong together", broken or "yes", None, None, not broken, note=broken)
    yield Reason("nothing withdrawn", gone or "none", None, None, not gone)


def _floors(
    candidate: Contender, champion: Contender | None, config: GateConfig
) -> Iterable[Reason]:
    """One row a floor; a missing or non-finite number does not reach it."""
    for name, number, bound in (
        ("judge kappa", lambda c: _number(c, "judge", "kappa"), config.min_kappa),
        ("judge macro-F1", lambda c: _number(c, "judge", "macro_f1"), config.min_macro_f1),
        ("retrieval nDCG@10", lambda c: _number(c, "retrieval", "ndcg@10"), config.min_ndcg),
        ("index recall@10", lambda c: c.index_recall, config.min_index_recall),
    ):
        value = number(candidate)
        reached = value is not None and math.isfinite(value) and value >= bound
        yield Reason(
            name,
            value,
            None if champion is None else number(champion),
            bound,
            reached,
            note="not measured" if value is None else _not_finite(value),
        )


def _not_finite(value: float) -> str:
    return "" if math.isfinite(value) else "not a finite number"


def _number(contender: Contender, role: str, name: str) -> float | None:
    outcomes = contender.outcomes.get(role)
    return None if outcomes is None else outcomes.numbers.get(name)


Paired = tuple[Mapping[str, float], Mapping[str, float], Mapping[str, str], Mapping[str, str]]
"""Candidate's and champion's value by unit, the unit's segment, and the query of a pair."""


def _comparable(role: str, candidate: Contender, champion: Contender) -> tuple[Reason, Paired]:
    """Whether both were measured on the same units of the same set."""
    ours, theirs = candidate.outcomes.get(role), champion.outcomes.get(role)
    pairs: Paired = ({}, {}, {}, {})
    note = ""
    if ours is None:
        note = "the candidate was not measured"
    elif theirs is None or ours.evaluation_set != theirs.evaluation_set:
        note = champion.not_comparable or "the champion was measured on another evaluation set"
    elif ours.values.keys() != theirs.values.keys():
        note = "other units were measured"
    elif not all(map(math.isfinite, (*ours.values.values(), *theirs.values.values()))):
        note = "a value is not a finite number"
    elif not ours.values:
        note = "no units"
    else:
        pairs = ours.values, theirs.values, ours.segments, ours.queries
    reason = Reason(
        f"{role}: same evaluation set",
        None if ours is None else ours.evaluation_set[:12],
        None if theirs is None else theirs.evaluation_set[:12],
        None,
        not note,
        note=note,
    )
    return reason, pairs


def _enough(role: str, queries: int, config: GateConfig) -> Reason:
    passed = queries >= config.min_units
    note = "" if passed else "too few for a significance test"
    return Reason(f"{role}: queries", queries, None, config.min_units, passed, Outcome.ASK, note)


def _num_queries(units: Iterable[str], queries: Mapping[str, str]) -> int:
    return len({queries.get(unit, unit) for unit in units})


def _slices(role: str, pairs: Paired, config: GateConfig) -> tuple[list[Reason], Comparison]:
    """One row for all units and one a segment, and the comparison over all units."""
    ours, theirs, segments, queries = pairs
    rows, overall = [], None
    for segment in (ALL, *sorted({segments.get(unit, ALL) for unit in ours} - {ALL})):
        units = [u for u in sorted(ours) if segment in (ALL, segments.get(u))]
        found = paired_bootstrap(
            [ours[u] for u in units],
            [theirs[u] for u in units],
            config.bootstrap_samples,
            config.seed,
            clusters=[queries.get(u, u) for u in units],
        )
        overall = overall or found
        bound = config.max_drop if segment == ALL else config.max_slice_drop
        few = segment != ALL and _num_queries(units, queries) < config.min_slice_units
        note = f"{found.diff:+.3f} [{found.low:+.3f}, {found.high:+.3f}], "
        note += f"{found.win} better, {found.loss} worse of {found.n}"
        rows.append(
            Reason(
                f"{role} {METRIC_OF_ROLE[role]}, {segment}",
                _mean(ours[u] for u in units),
                _mean(theirs[u] for u in units),
                f"drop <= {bound:g}",
                few or found.diff >= -bound,
                Outcome.HOLD if found.high < 0 else Outcome.ASK,
                note + (": too few to decide on" if few else ""),
            )
        )
    assert overall is not None, "all units come first"
    return rows, overall


def _gain(compared: Mapping[str, Comparison], champion: Contender, config: GateConfig) -> Reason:
    """Whether judge or retriever gained clearly; no gain of either holds, an unclear one asks."""
    relative: dict[str, float] = {}
    clear, notes = False, []
    for role, found in compared.items():
        before = _mean(champion.outcomes[role].values.values())
        change = found.diff / before if before else math.copysign(math.inf, found.diff)
        relative[role] = change if found.diff else 0.0
        clear = clear or (found.low > 0 and relative[role] >= config.min_gain)
        sure = "significant" if found.significant else "not significant"
        notes.append(f"{role} {100 * relative[role]:+.1f} % ({sure})")
    gained = any(found.diff > 0 for found in compared.values())
    return Reason(
        GAIN,
        max(relative.values()),
        None,
        config.min_gain,
        clear,
        Outcome.ASK if gained else Outcome.HOLD,
        ", ".join(notes),
    )


def _mean(values: Iterable[float]) -> float:
    kept: Sequence[float] = list(values)
    return math.fsum(kept) / len(kept)


def shown(value: Value) -> str:
    """A cell: four digits, "-" for nothing."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def verdict(reason: Reason) -> str:
    """yes, noted, or what the failed check leads to."""
    if reason.passed:
        return "yes"
    return "noted" if reason.otherwise is Outcome.PROMOTE else f"no: {reason.otherwise}"


def _against_bound(reason: Reason) -> str:
    bound = "" if reason.bound is None else f", bound {shown(reason.bound)}"
    return f"{shown(reason.candidate)}{bound}"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
