"""The retriever's ablation: rows that differ in one thing each, on the same queries.

    relearn ablate retriever --recipe small --seeds 0,1,2 --rows sft,rgrpo

Consumes a recipe -> produces one table, its markdown and its plot. Every row is made of the stages
of an ordinary run with other settings, so what such a run has made is taken from the cache.

With a second store that nobody trained on (`Unseen`) the same encoders are measured there too, on
all of its judged queries: a table more.
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
from flows.data import data_folder, prepare_data
from flows.embedder import base_encoder
from flows.judge import JudgeStages
from flows.recipes import DataConfig, EmbedderConfig, PipelineConfig
from models.embedder.config import (
    ContrastiveConfig,
    HardNegativeConfig,
    MiningConfig,
    RetrievalGRPOConfig,
)
from models.errors import ConfigError, explain
from models.evaluation.retriever_report import cell, columns, cost, difference
from models.sources import SourceConfig, SyntheticSource
from models.split import SplitConfig
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
BRIEF = {
    "hitrate@100": "Hit 100",
    "recall@10": "Rec 10",
    "ndcg@10": "nDCG 10",
    "goodrate@10": "Good 10",
    "true_goodrate@10": "true Good",
    "lexical_overlap@10": "words",
    "quality@10": "items",
}
"""Metrics of the terminal's table: Goodrate by the judge and by the store's truth, word overlap
with the query, quality of the items."""
BASELINE = "sft"
"""What rows are compared with, unless told otherwise."""
UNSEEDED = ("bm25", "base")
"""Rows without anything random: measured once."""
UNSEEN_NOTE = "a store that no row was trained on, all of its judged queries but a few"
HELD_OUT = SplitConfig(validation=0.01, test=0.98)
"""An unseen store's queries: nothing is trained on any of them. A split that is left empty takes
one query, so all but a few are measured."""


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
    config, seeded = config.in_step(), {"seed": seed}
    sft = config.sft.model_copy(update=seeded)
    if name == "sft_longer":
        more = config.rgrpo.steps
        longer = {"extra_steps": more} if sft.steps is None else {"steps": sft.steps + more}
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


class Unseen(BaseModel):
    """A store that the rows are measured on and not trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataConfig
    """`split` is not looked at: HELD_OUT is."""
    folder: str | None = None
    """Where its files are; None: where the other store's are."""


class AblationResult(BaseModel):
    """The tables' artifacts and what the stages did."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    table: ArtifactRef
    unseen: ArtifactRef | None
    """The table of the unseen store, where one was given."""
    reports: list[StageReport]
    run_id: str


@flow(name="ablate-retriever", flow_run_name="{config.name}", log_prints=False)
def ablate_retriever(
    config: PipelineConfig,
    seeds: Sequence[int] = (0, 1, 2),
    rows: Sequence[str] = tuple(TITLES),
    against: str = BASELINE,
    unseen: Unseen | None = None,
) -> AblationResult:
    """Train and measure every row for every seed of the retriever; the judge's seed stays.

    against: the row that the others are compared with, query by query. unseen: another store whose
    queries the same encoders answer; the judge was not validated there and says nothing on it.

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
        benches = {"": _Bench(config.embedder, store, config.data.source, lab.judges.get("full"))}
        if unseen is not None:
            benches["unseen"] = _unseen_bench(config.embedder, unseen)
        measured: dict[str, dict[str, list[ArtifactRef]]] = {bench: {} for bench in benches}
        trained: dict[str, list[ArtifactRef]] = {}
        for name in names:
            own = seeds[:1] if name in UNSEEDED else seeds
            plans = [row_plan(name, config.embedder, seed) for seed in own]
            made = [lab.trained(plan) for plan in plans]
            trained[TITLES[name]] = [ref for _, stages in made for ref in stages]
            for bench, rows_of in measured.items():
                rows_of[TITLES[name]] = [
                    benches[bench].row(plan.channel, encoder, seed)
                    for plan, (encoder, _), seed in zip(plans, made, own, strict=True)
                ]
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
        tables = {
            bench: retriever_ablation(
                rows=rows_of,
                trained=trained,
                against=TITLES[against],
                notes=notes if bench == "" else [UNSEEN_NOTE, *notes],
            )
            for bench, rows_of in measured.items()
        }
    return AblationResult(
        table=tables[""],
        unseen=tables.get("unseen"),
        reports=current.reports,
        run_id=current.run_id,
    )


class _Lab:
    """What the rows are trained with: the store, the base encoder and the judges."""

    def __init__(self, config: PipelineConfig, store: ArtifactRef, names: Sequence[str]) -> None:
        self.config, self.store = config.embedder, store
        plans = [row_plan(name, config.embedder, 0) for name in names]
        asked = {p.judge for p in plans} | (
            {"full"} if self.config.evaluation.judged_queries else set()
        )
        self.base = base_encoder(self.config, store)
        stages = JudgeStages(config.judge, store)
        self.judges: dict[str | None, ArtifactRef] = {}
        if "full" in asked:
            self.judges["full"] = stages.calibrated(stages.grpo)
        if "weak" in asked:
            self.judges["weak"] = stages.calibrated(stages.probed)
        if "cross_encoder" in asked:
            self.judges["cross_encoder"] = cross_encoder(config.ablation.cross_encoder, stages)

    def trained(self, plan: RowPlan) -> tuple[ArtifactRef | None, list[ArtifactRef]]:
        """The encoder of a plan and the stages that trained it; None for a row without one."""
        if plan.channel != "encoder":
            return None, []
        encoder, stages = self.base, []
        if plan.sft is not None:
            encoder = embedder_sft(config=plan.sft, base=self.base, store=self.store)
            stages.append(encoder)
        if plan.hard is not None:
            index = index_catalogue(config=self.config.index, encoder=encoder, store=self.store)
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
        return encoder, stages


class _Bench:
    """What the rows are measured on: a store, its BM25 row, and a judge that may be asked there."""

    def __init__(
        self,
        config: EmbedderConfig,
        store: ArtifactRef,
        source: SourceConfig,
        judge: ArtifactRef | None,
    ) -> None:
        self.config, self.store, self.judge = config, store, judge
        self.truth = source if isinstance(source, SyntheticSource) else None
        self.lexical: ArtifactRef | None = None
        self.lexical = self.row("bm25", None, 0)

    def row(self, channel: Channel, encoder: ArtifactRef | None, seed: int) -> ArtifactRef:
        """One measured row. seed: of the random channel alone."""
        if channel == "bm25" and self.lexical is not None:
            return self.lexical
        index = None
        if encoder is not None:
            index = index_catalogue(config=self.config.index, encoder=encoder, store=self.store)
        return retriever_row(
            config=self.config.evaluation,
            channel=channel,
            store=self.store,
            seed=seed if channel == "random" else 0,
            encoder=encoder,
            index=index,
            lexical=self.lexical,
            judge=self.judge,
            truth=self.truth,
        )


def _unseen_bench(config: EmbedderConfig, unseen: Unseen) -> _Bench:
    quiet = config.evaluation.model_copy(update={"judged_queries": 0})
    data = unseen.data.model_copy(update={"split": HELD_OUT})
    with data_folder(unseen.folder):
        store = prepare_data(data)
    return _Bench(config.model_copy(update={"evaluation": quiet}), store, data.source, None)


def ablation_table(rows: Sequence[dict[str, Any]], title: str, against: str = BASELINE) -> Table:
    """The rows of all queries under the names `--rows` takes, as many columns as fit a terminal;
    markdown has all of them."""
    overall, named = [r for r in rows if r["segment"] == "all"], {v: k for k, v in TITLES.items()}
    metrics = [name for name in columns(overall) if name in BRIEF]
    table = Table(title=f"{title}, in percent", title_justify="left")
    table.add_column("row", no_wrap=True)
    for name in (*(BRIEF[m] for m in metrics), f"nDCG - {against}", "s", "judge pairs"):
        table.add_column(name, justify="right", no_wrap=name.startswith("nDCG"))
    for row in overall:
        cells = [cell(row, m, plain=True) for m in metrics] + [difference(row)]
        costs = [cost(row, name) for name in ("train_s", "judge_pairs")]
        table.add_row(*map(escape, [named[str(row["run"])], *cells, *costs]))
    return table


def read_report(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows and markdown of a `retriever_ablation` artifact."""
    from tasks.evaluate import read_table
    from tasks.retriever_ablation import REPORT, TABLE

    return read_table(folder, TABLE), (folder / REPORT).read_text(encoding="utf-8")
