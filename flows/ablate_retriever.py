"""The retriever's ablation: rows that differ in one thing each, on the same queries.

    relearn ablate retriever --recipe small --seeds 0,1,2 --rows sft,rgrpo

Consumes a recipe -> produces one table, its markdown and its plot. Every row is made of the stages
of an ordinary run with other settings, so what such a run has made is taken from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.table import Table

from flows.ablate import cross_encoder
from flows.data import prepare_data
from flows.embedder import base_encoder
from flows.judge import JudgeStages
from flows.recipes import EmbedderConfig, PipelineConfig
from models.embedder.config import (
    ContrastiveConfig,
    HardNegativeConfig,
    MiningConfig,
    RetrievalGRPOConfig,
)
from models.errors import ConfigError, explain
from models.evaluation.retriever_report import COSTS, cell, columns, cost, difference
from models.sources import SyntheticSource
from tasks.artifacts import ArtifactRef
from tasks.embedder import (
    RewardsConfig,
    embedder_hard,
    embedder_negatives,
    embedder_rgrpo,
    embedder_sft,
    index_catalogue,
)
from tasks.retriever_ablation import Channel, retriever_ablation, retriever_row
from tasks.stage import StageReport, pipeline

TITLES = {
    "random": "random",
    "bm25": "BM25",
    "base": "base",
    "sft": "SFT",
    "sft_longer": "SFT, as many steps as SFT + R-GRPO",
    "rgrpo_no_sft": "R-GRPO without SFT",
    "ranking": "SFT + ranking loss on hard negatives",
    "dpo": "SFT + DPO on hard negatives",
    "rgrpo": "SFT + R-GRPO",
    "rgrpo_relevance": "SFT + R-GRPO, relevance alone",
    "rgrpo_relevance_quality": "SFT + R-GRPO, relevance + quality",
    "rgrpo_weak_judge": "SFT + R-GRPO, SFT-only judge",
    "rgrpo_cross_encoder": "SFT + R-GRPO, cross-encoder as the judge",
    "rgrpo_no_anchor": "SFT + R-GRPO, no InfoNCE anchor",
}
"""Rows by the name `--rows` takes, in the order of the table. The first nine are the paper's, and
longer SFT, which tells what R-GRPO's anchor would have added by itself."""
BASELINE = "sft"
"""What rows are compared with, unless told otherwise."""
UNSEEDED = ("bm25", "base")
"""Rows without anything random: measured once."""


class RowPlan(BaseModel):
    """What one row trains, in order; None: it does not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channel: Channel = "encoder"
    sft: ContrastiveConfig | None = None
    mining: MiningConfig | None = None
    hard: HardNegativeConfig | None = None
    rgrpo: RetrievalGRPOConfig | None = None
    rewards: RewardsConfig | None = None
    judge: Literal["full", "weak", "cross_encoder"] | None = None
    """Who mines or rewards: the finished judge, the one after CoT SFT and its probe, or a small
    encoder that was fine-tuned to grade pairs (the paper's weak judge is a BERT of 4 layers)."""


def row_plan(name: str, config: EmbedderConfig, seed: int) -> RowPlan:
    """The settings of a row: those of the recipe, but for what its title says.

    Raises:
        ConfigError: an unknown row.
    """
    if name not in TITLES:
        raise ConfigError(explain(f"row {name!r}", f"some of {', '.join(TITLES)}", "fix --rows"))
    if name in ("random", "bm25"):
        return RowPlan(channel="random" if name == "random" else "bm25")
    config, seeded = config.with_sft_positives(), {"seed": seed}
    sft = config.sft.model_copy(update=seeded)
    if name == "sft_longer":
        longer = (
            {"epochs": sft.epochs + 1}
            if sft.steps is None
            else {"steps": sft.steps + config.rgrpo.steps}
        )
        return RowPlan(sft=sft.model_copy(update=longer))
    if name in ("base", "sft"):
        return RowPlan(sft=sft if name == "sft" else None)
    if name in ("ranking", "dpo"):
        hard = config.hard.model_copy(update=seeded)
        if name == "dpo" or hard.loss == "dpo":
            hard = hard.model_copy(update={"loss": "dpo" if name == "dpo" else "infonce"})
        mining = config.mining.model_copy(update=seeded)
        return RowPlan(sft=sft, mining=mining, hard=hard, judge="full")
    rgrpo, rewards = config.rgrpo.model_copy(update=seeded), config.rewards
    if name in ("rgrpo_no_sft", "rgrpo_no_anchor"):  # the anchor is SFT's loss
        rgrpo = rgrpo.model_copy(update={"sft_weight": 0.0})
    if name == "rgrpo_relevance":
        rewards = rewards.model_copy(update={"quality": 0.0, "exclusivity": 0.0})
    if name == "rgrpo_relevance_quality":
        rewards = rewards.model_copy(update={"exclusivity": 0.0})
    return RowPlan(
        sft=None if name == "rgrpo_no_sft" else sft,
        rgrpo=rgrpo,
        rewards=rewards,
        judge=_JUDGES.get(name, "full"),
    )


_JUDGES: dict[str, Literal["weak", "cross_encoder"]] = {
    "rgrpo_weak_judge": "weak",
    "rgrpo_cross_encoder": "cross_encoder",
}


class AblationResult(BaseModel):
    """The table's artifact and what the stages did."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    table: ArtifactRef
    reports: list[StageReport]
    run_id: str


@flow(name="ablate-retriever", flow_run_name="{config.name}", log_prints=False)
def ablate_retriever(
    config: PipelineConfig,
    seeds: Sequence[int] = (0, 1, 2),
    rows: Sequence[str] = tuple(TITLES),
    against: str = BASELINE,
) -> AblationResult:
    """Train and measure every row for every seed of the retriever; the judge's seed stays.

    against: the row that the others are compared with, query by query.

    Raises:
        ConfigError: an unknown row, no row or seed at all, or `against` is none of the rows.
    """
    names = [name for name in TITLES if name in rows]
    unknown = [name for name in (*rows, against) if name not in TITLES]
    if unknown or not names or not seeds or len(set(seeds)) < len(seeds):
        got = f"rows {list(rows)} against {against}, seeds {list(seeds)}"
        expected = f"rows among {', '.join(TITLES)}, and different seeds"
        raise ConfigError(explain(got, expected, "fix --rows, --against or --seeds"))
    if against != BASELINE and against not in names:
        asked = f"--against {against} without that row"
        raise ConfigError(explain(asked, f"one of {', '.join(names)}", f"add {against} to --rows"))
    with pipeline(f"ablate-retriever {config.name}", experiment=config.name) as current:
        store = prepare_data(config.data)
        lab = _Lab(config, store, names)
        measured: dict[str, list[ArtifactRef]] = {}
        trained: dict[str, list[ArtifactRef]] = {}
        for name in names:
            own = seeds[:1] if name in UNSEEDED else seeds
            made = [lab.row(row_plan(name, config.embedder, seed), seed) for seed in own]
            measured[TITLES[name]] = [row for row, _ in made]
            trained[TITLES[name]] = [ref for _, stages in made for ref in stages]
        notes = [f"seeds of the retriever: {', '.join(map(str, seeds))}; the judge has one"]
        if config.embedder.evaluation.judged_queries:
            notes.append("Goodrate is read by the finished judge, the reward of most R-GRPO rows")
        notes.append("seconds are those of the machine that made a stage, maybe on another day")
        notes.append("a pair that one row has asked the judge about costs later rows nothing")
        if any(name.startswith("rgrpo") for name in names):
            notes.append(
                "R-GRPO's encoder is the best of its looks at the validation split, all others are "
                "the last step's"
            )
        if "rgrpo_no_sft" in names:
            notes.append("R-GRPO without SFT has no InfoNCE anchor either")
        table = retriever_ablation(
            rows=measured, trained=trained, against=TITLES[against], notes=notes
        )
    return AblationResult(table=table, reports=current.reports, run_id=current.run_id)


class _Lab:
    """What the rows share: the store, the base encoder, the judges and the BM25 row."""

    def __init__(self, config: PipelineConfig, store: ArtifactRef, names: Sequence[str]) -> None:
        self.config, self.store = config.embedder, store
        plans = [row_plan(name, config.embedder, 0) for name in names]
        asked = {p.judge for p in plans} | (
            {"full"} if self.config.evaluation.judged_queries else set()
        )
        source = config.data.source
        self.truth = source if isinstance(source, SyntheticSource) else None
        self.base = base_encoder(self.config, store)
        stages = JudgeStages(config.judge, store)
        self.judges: dict[str | None, ArtifactRef] = {}
        if "full" in asked:
            self.judges["full"] = stages.calibrated(stages.grpo)
        if "weak" in asked:
            self.judges["weak"] = stages.calibrated(stages.probed)
        if "cross_encoder" in asked:
            self.judges["cross_encoder"] = cross_encoder(config.ablation.cross_encoder, stages)
        self.lexical = self._measure("bm25", None, None, 0)

    def row(self, plan: RowPlan, seed: int) -> tuple[ArtifactRef, list[ArtifactRef]]:
        """The measured row of a plan, and the stages that trained it."""
        if plan.channel == "bm25":
            return self.lexical, []
        if plan.channel == "random":
            return self._measure("random", None, None, seed), []
        encoder, stages = self.base, []
        if plan.sft is not None:
            encoder = embedder_sft(config=plan.sft, base=self.base, store=self.store)
            stages.append(encoder)
        if plan.hard is not None:
            index = self._index(encoder)
            negatives = embedder_negatives(
                config=plan.mining,
                encoder=encoder,
                index=index,
                judge=self.judges[plan.judge],
                store=self.store,
            )
            encoder = embedder_hard(
                config=plan.hard, encoder=encoder, negatives=negatives, store=self.store
            )
            stages += [index, negatives, encoder]
        if plan.rgrpo is not None:
            encoder = embedder_rgrpo(
                config=plan.rgrpo,
                rewards=plan.rewards,
                encoder=encoder,
                judge=self.judges[plan.judge],
                store=self.store,
            )
            stages.append(encoder)
        return self._measure("encoder", encoder, self._index(encoder), 0), stages

    def _index(self, encoder: ArtifactRef) -> ArtifactRef:
        return index_catalogue(config=self.config.index, encoder=encoder, store=self.store)

    def _measure(
        self, channel: Channel, encoder: ArtifactRef | None, index: ArtifactRef | None, seed: int
    ) -> ArtifactRef:
        return retriever_row(
            config=self.config.evaluation,
            channel=channel,
            store=self.store,
            seed=seed,
            encoder=encoder,
            index=index,
            lexical=None if channel == "bm25" else self.lexical,
            judge=self.judges.get("full"),
            truth=self.truth,
        )


def ablation_table(rows: Sequence[dict[str, Any]], title: str, against: str = BASELINE) -> Table:
    """The rows of all queries, for a terminal."""
    overall = [r for r in rows if r["segment"] == "all"]
    metrics = columns(overall)
    table = Table(title=title, title_justify="left")
    table.add_column("row")
    for name in ("seeds", *metrics, f"nDCG@10 - {TITLES[against]}", *COSTS.values()):
        table.add_column(name, justify="right")
    for row in overall:
        cells = [cell(row, m) for m in metrics] + [difference(row)]
        costs = [cost(row, name) for name in COSTS]
        table.add_row(*map(escape, [str(row["run"]), f"{row['seeds']:.0f}", *cells, *costs]))
    return table


def read_report(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows and markdown of a `retriever_ablation` artifact."""
    from tasks.evaluate import read_table
    from tasks.retriever_ablation import REPORT, TABLE

    return read_table(folder, TABLE), (folder / REPORT).read_text(encoding="utf-8")
