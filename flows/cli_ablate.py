"""`relearn ablate`: what each part of the method adds, a command a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from flows.console import Home, console, prepare, start_server
from models.errors import ConfigError, explain
from tasks import temporary
from tasks.settings import settings

ablate = typer.Typer(
    no_args_is_help=True,
    help="Measure what each part of the method adds. Nothing is registered or promoted.",
)


@ablate.command("judge")
def ablate_judge(
    recipe: Annotated[str, typer.Option(help="smoke, small or full, as for `relearn run`.")] = (
        "small"
    ),
    store: Annotated[
        str, typer.Option(help="synthetic, homedepot, chorus, esci, wands or tables (your own).")
    ] = "synthetic",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the store's files; synthetic needs none.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Training seeds, with commas. Seed 0 is that of `relearn run`.")
    ] = "0,1,2",
    rows: Annotated[
        str | None,
        typer.Option(help="Rows by name, with commas (see --list-rows). [default: all]"),
    ] = None,
    home: Home = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting in every row. Repeatable."),
    ] = None,
    list_rows: Annotated[
        bool,
        typer.Option("--list-rows", help="Print what each row adds and its settings, and stop."),
    ] = False,
) -> None:
    """Train and measure the judge with and without each of its parts, on held-out queries.

    Rows: majority, zero-shot, a fine-tuned cross-encoder, the same told the judge's evidence, SFT
    on grades alone, with the reasoning first, with the grade first, then + probe, DPO, GRPO,
    dynamic sampling, rule-aware rewards and guided replay, each on top of the row above. Every row
    is `relearn run` with a few settings changed: stages that a run has made are not made again, and
    the other way round. Safe to interrupt.

    How rows are graded: the most likely of the four grades; columns "median" read the median of
    their probabilities instead, which is CumPT without calibration. The grade comes first in
    all formats but think-then-respond, which decodes its own reasoning (greedy) and is graded at
    the place where its grade is due. pass@k: 5 sampled responses a pair, right where the grade is.

    Printed: means over seeds, 95 % intervals over queries (bootstrap), "± seeds" the standard
    deviation over seeds, "gain" the macro-F1 above the row before it in the table, its own
    deviation over seeds after "±". The MLflow run of stage judge_ablation keeps ablation.json,
    .csv, .md and .png.

    Examples:

        relearn ablate judge --recipe smoke --seeds 0 --rows majority,label-only

        relearn ablate judge --seeds 0,1,2

        relearn ablate judge --rows dpo,grpo,sampling --set judge.grpo.steps=20
    """
    numbers = _seeds(seeds)
    prepare(home, data)
    server = None if list_rows else start_server()
    from flows import ablate as ablation
    from flows.recipes import recipe as make_recipe
    from flows.tables import ablation_rows_table, ablation_table, stage_table
    from tasks.ablation import MARKDOWN
    from tasks.artifacts import ArtifactStore

    config = make_recipe(recipe, store, changes or [])
    names = None if rows is None else tuple(name.strip() for name in rows.split(","))
    chosen = ablation.chosen_rows(config, names)
    if list_rows:
        console.print(ablation_rows_table(chosen))
        return
    started = time.monotonic()
    with temporary.answering(server):
        result = ablation.ablate_judge(config, numbers, names)
    console.print(stage_table(result.reports))
    console.print(ablation_table(result.records))
    folder = ArtifactStore(settings()).path(result.table)
    made = sum(not r.cached for r in result.reports)
    console.print(
        f"{len(result.reports)} stages, {made} made, {time.monotonic() - started:.0f} s in all.\n"
        f"Markdown, CSV, JSON and plot: {folder}\n\n{(folder / MARKDOWN).read_text()}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@ablate.command("retriever")
def ablate_retriever(
    recipe: Annotated[str, typer.Option(help="smoke, small or full.")] = "small",
    store: Annotated[
        str, typer.Option(help="synthetic, homedepot, chorus, esci, wands or tables (your own).")
    ] = "synthetic",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the store's files; synthetic needs none.")
    ] = None,
    home: Home = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting, as in `relearn run`.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the retriever's stages.")] = "0,1,2",
    rows: Annotated[
        str, typer.Option(help="Rows by name, e.g. bm25,sft,rgrpo. [default: all]")
    ] = "",
    against: Annotated[
        str, typer.Option(help="The row that others are compared with, query by query.")
    ] = "sft",
    unseen: Annotated[
        str | None, typer.Option(help="Measure the same encoders on this store as well.")
    ] = None,
    unseen_data: Annotated[
        Path | None, typer.Option(help="Folder with that store's files. [default: as --data]")
    ] = None,
) -> None:
    """Measure the paper's rows and the rewards' ablations on the held-out queries.

    Rows: random, bm25, base, sft, sft_longer, rgrpo_no_sft, ranking, dpo, rgrpo; rgrpo_relevance,
    rgrpo_relevance_quality, rgrpo_weak_judge, rgrpo_cross_encoder, rgrpo_no_anchor. Stages that an
    ordinary run with the same settings has made are taken from the cache. Safe to interrupt: run it
    again.

    --unseen names a store that no row is trained on: what the encoders do for its queries tells
    what they learned beyond their own catalogue. The judge has no say there.

    Examples:

        relearn ablate retriever

        relearn ablate retriever --seeds 0 --rows sft,ranking,dpo,rgrpo

        relearn ablate retriever --rows sft_longer,rgrpo --against sft_longer

        relearn ablate retriever --store homedepot --data HD --unseen chorus --unseen-data CHORUS
    """
    numbers = _seeds(seeds)
    prepare(home, data)
    server = start_server()
    from flows import ablate_retriever as flow
    from flows.recipes import recipe as make_recipe
    from tasks.artifacts import ArtifactStore

    config = make_recipe(recipe, store, changes or [])
    names = [name.strip() for name in rows.split(",") if name.strip()] or list(flow.TITLES)
    other = None
    if unseen is not None:
        files = None if unseen_data is None else str(unseen_data)
        other = flow.Unseen(data=make_recipe(recipe, unseen).data, folder=files)
    elif unseen_data is not None:
        got = f"--unseen-data {unseen_data} without --unseen"
        raise ConfigError(explain(got, "the store whose files these are", "name it: --unseen"))
    with temporary.answering(server):
        result = flow.ablate_retriever(config, numbers, names, against, other)
    shown = [(f"Retriever ablation, {config.name}", result.table)]
    if result.unseen is not None:
        shown.append((f"{config.name}'s encoders on {unseen}, unseen", result.unseen))
    for title, ref in shown:
        folder = ArtifactStore(settings()).path(ref)
        table, text = flow.read_report(folder)
        console.print(flow.ablation_table(table, title, against))
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print(
            f"Table, markdown and plot: {folder}", highlight=False, markup=False, soft_wrap=True
        )
    made = sum(not r.cached for r in result.reports)
    console.print(f"{len(result.reports)} stages, {made} made.", highlight=False)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        expected = "whole numbers with commas"
        raise ConfigError(explain(f"--seeds {text}", expected, "write e.g. 0,1,2")) from None
