"""The `relearn` command. Light at the top: heavy packages load when a command needs them."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.cli_ablate import ablate
from flows.console import Home, StoreName, console, guarded, prepare, say, start_server
from models.errors import ConfigError, explain
from models.text import price_text, terms
from tasks import temporary
from tasks.faults import databases_ready, sqlite_file
from tasks.settings import masked, settings

if TYPE_CHECKING:
    from models.index.filters import Filters

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep an e-commerce site's search relevance fresh: a thinking judge, and a retriever "
    "taught by it.\n\nStart with `relearn run`; everything it makes lies under --home.",
)
app.add_typer(ablate, name="ablate")


def main() -> None:
    """Run the command line."""
    try:
        guarded(lambda: app(obj=_process_began_s()))
    finally:
        gc.freeze()  # nothing is to be freed one by one any more: the process ends


def _process_began_s() -> float:
    """When this process began, on the clock of `time.monotonic`."""
    import psutil

    return time.monotonic() - (time.time() - psutil.Process().create_time())


@app.command()
def run(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Option(help="smoke (tiny models), small (two CPU cores) or full (a GPU).")
    ] = "small",
    store: Annotated[
        str, typer.Option(help="synthetic, homedepot, chorus, esci, wands or tables (your own).")
    ] = "synthetic",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the store's files; synthetic needs none.")
    ] = None,
    home: Home = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting, e.g. --set judge.dpo.beta=0.2. Repeatable."
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every setting as JSON and stop.")
    ] = False,
) -> None:
    """Take a store through every stage: data, judge, retriever, index, evaluation, registry, gate.

    Stages whose inputs and settings are unchanged are taken from the cache; the table at the end
    says which, and why the others were made. Safe to interrupt: run it again and it goes on.

    Examples:

        relearn run

        relearn run --store homedepot --data ~/data/homedepot

        relearn run --recipe smoke --set judge.dpo.beta=0.2
    """
    began_s = context.obj or time.monotonic()
    prepare(home, data)
    server = None if show_config else start_server()
    from flows.recipes import recipe as make_recipe

    config = make_recipe(recipe, store, changes or [])
    if show_config:
        print(config.model_dump_json(indent=1))
        return
    with _served(server) as loading:
        from flows.pipeline import run_pipeline

        result = run_pipeline(config)
    _show_result(result, time.monotonic() - began_s, loading.seconds, home)


@contextlib.contextmanager
def _served(server: temporary.TemporaryServer | None) -> Iterator[temporary.Loading]:
    """A Prefect server answers inside; while `server` starts, what the stages need is loaded."""
    loading = temporary.Loading()

    def open_store() -> None:
        from tasks.artifacts import ArtifactStore

        ArtifactStore(settings()).client.search_experiments(max_results=1)

    with contextlib.ExitStack() as inside:
        with temporary.uncollected():
            import flows.pipeline  # noqa: F401

            inside.enter_context(temporary.answering(server, (open_store, *loading)))
        yield loading


def _show_result(result: Any, seconds: float, loading_s: float, home: Path | None) -> None:
    from flows.tables import judge_table, registry_table, retrieval_table, spent, stage_table
    from tasks.artifacts import ArtifactStore
    from tasks.evaluate import JUDGE_TABLE, RETRIEVAL_TABLE, read_table

    artifacts = ArtifactStore(settings())
    console.print(stage_table(result.reports))
    rows = read_table(artifacts.path(result.judge.evaluation), JUDGE_TABLE)
    console.print(judge_table(rows))
    rows = read_table(artifacts.path(result.retriever.evaluation), RETRIEVAL_TABLE)
    console.print(retrieval_table(rows))
    console.print(registry_table(result.registered))
    _show_decision(result.release)
    made = sum(not r.cached for r in result.reports)
    name = result.release.store_name
    where = "" if name == "synthetic" else f" --store {name}"
    where += "" if home is None else f" --home {home}"
    parts = spent(result.reports, seconds, sum(result.release.seconds.values()), loading_s)
    console.print(
        f"{len(result.reports)} stages, {made} made, {len(result.reports) - made} cached, "
        f"{seconds:.0f} s in all: {parts}.\n"
        f"{_pages()}"
        f"Try:     relearn judge 'red couch' 'Blue leather sofa' --why{where}   |   "
        f"relearn search 'red couch'{where}",
        highlight=False,
        soft_wrap=True,
    )


def _pages() -> str:
    """Where to look: the pages that `relearn up` serves, or how to open them."""
    from tasks.services import RUNNING, status

    running = {s.title: s.url for s in status(settings()) if s.state == RUNNING}
    uri, home = masked(settings().tracking_uri), os.environ["PREFECT_HOME"]
    mlflow = f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}"
    prefect = f"PREFECT_HOME={home} prefect server start"
    return f"MLflow:  {running.get('MLflow', mlflow)}\nPrefect: {running.get('Prefect', prefect)}\n"


def _show_decision(released: Any) -> None:
    """The gate's checks, what became of the candidates, and how to decide otherwise."""
    from flows.tables import decision_table
    from models.evaluation.gate import Outcome

    decision, command = released.decision, f"relearn promote --store {released.store_name}"
    console.print(decision_table(decision))
    if released.action is not None:
        said = f"Champion by this run ({released.action})."
    elif decision.outcome is Outcome.ASK:
        said = f"Borderline, so held: {decision.summary}\nTo promote it all the same: {command}"
    elif len(decision.reasons) == 1:
        said = decision.reasons[0].note
    else:
        said = (
            f"Held: {decision.summary}\nTo promote it all the same: {command} --force --reason ..."
        )
    console.print(said, highlight=False, markup=False, soft_wrap=True)


@app.command()
def promote(
    store: StoreName = "synthetic",
    force: Annotated[
        bool, typer.Option("--force", help="Promote even what the gate holds; needs --reason.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Kept in the history with the promotion.")] = "",
    judge: Annotated[
        str | None,
        typer.Option(help="Version of an earlier candidate judge; alone: with the champion index."),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            help="Version of an earlier candidate index, with the encoder it was built "
            "with and, without --judge, the judge that taught that."
        ),
    ] = None,
    home: Home = None,
) -> None:
    """Make the candidates the champions: judge, embedder and index, all three or none.

    The newest candidates, or earlier ones by their numbers in `relearn versions`.

    The gate decides again, against the champions as they are now. A clear win and a borderline
    candidate are promoted; what the gate holds is not, unless --force says so with a --reason.

    Examples:

        relearn promote

        relearn promote --force --reason "new labels, agreed with the search team"

        relearn promote --index 7
    """
    prepare(home)
    from flows.release import promote_candidates
    from flows.tables import registry_table

    released = promote_candidates(store, force, reason, judge, index)
    console.print(registry_table(released.registered))
    _show_decision(released)
    if released.action is None and len(released.decision.reasons) > 1:
        raise typer.Exit(1)


@app.command()
def rollback(
    store: StoreName = "synthetic",
    to: Annotated[
        str | None,
        typer.Option("--to", help="Version of the index to go back to. [default: the one before]"),
    ] = None,
    reason: Annotated[str, typer.Option(help="Kept in the history.")] = "",
    home: Home = None,
) -> None:
    """Make earlier champions the champions again: judge, embedder and index together.

    What is rolled back is marked withdrawn: it is not promoted again by itself, an embedder that a
    withdrawn judge taught is flagged, and `relearn versions` shows both. Nothing is deleted.
    `relearn search` uses the earlier index at once, with the refreshes it had when it was left; one
    from further back than the last may be there only as it was built. Refreshes that it lacks have
    to be applied again, and a warning says how many.
    """
    prepare(home)
    from flows.release import roll_back

    before, after = roll_back(store, to, reason)
    console.print(f"champion: {after.title}   (was {before.title})", highlight=False)


@app.command()
def versions(store: StoreName = "synthetic", home: Home = None) -> None:
    """List every version: aliases, key metrics, what it was made with, and the gate's decision.

    A note says since when a version is or was champion, that it was withdrawn, or that it was made
    with something withdrawn. The index's version is the number that `relearn rollback --to` takes.
    """
    prepare(home)
    from flows.release import list_versions
    from flows.tables import versions_table

    console.print(versions_table(store, list_versions(store)))


@app.command()
def judge(
    query: Annotated[str, typer.Argument(help="What a shopper typed.")],
    title: Annotated[str, typer.Argument(help="The product's title.")],
    store: StoreName = "synthetic",
    why: Annotated[bool, typer.Option("--why", help="Decode the reasoning as well.")] = False,
    home: Home = None,
) -> None:
    """Grade one (query, product title) with the champion judge.

    Prints the grade (1 irrelevant .. 4 excellent, by the calibrated threshold), the four
    probabilities, and the tier a search page would show. --why adds the judge's steps for that
    grade: of several explanations the likeliest that agrees with it.
    """
    prepare(home)
    from flows.serving import Champion
    from models.types import Product, Query

    _not_blank(query, "QUERY")
    _not_blank(title, "TITLE")
    champion = Champion.open(store)
    question, product = Query("cli", query), Product("cli", title)
    row = champion.grade([(question, product)])[0]
    probabilities = "  ".join(f"{g}: {row[f'p{g}']:.3f}" for g in (1, 2, 3, 4))
    console.print(f"grade {row['grade']}   tier {row['tier']}   {probabilities}", highlight=False)
    if why:
        said = champion.reasoning(question, product, int(row["grade"]))
        console.print(said, highlight=False, markup=False)


@app.command()
def score(
    pairs: Annotated[Path, typer.Argument(help="Parquet with columns query, title, ...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the scored parquet goes.")],
    store: StoreName = "synthetic",
    home: Home = None,
) -> None:
    """Grade many pairs: adds grade, p1..p4 and tier to every row.

    Columns query and title are needed; description, brand, category, attributes and price are read
    where they are. Rows keep their order and every other column.
    """
    prepare(home)
    from flows.serving import Champion, score_table

    rows = score_table(Champion.open(store), pairs, out)
    console.print(f"{rows} pairs scored -> {out}")


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What a shopper typed.")],
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Products shown.")] = 10,
    mode: Annotated[str, typer.Option(help="vector, lexical or hybrid.")] = "vector",
    brand: Annotated[
        str, typer.Option(help="Only this brand, as the catalogue spells it; case counts.")
    ] = "",
    category: Annotated[
        str,
        typer.Option(
            help="Only this path and everything below it, as the catalogue spells it; case "
            "counts. E.g. 'Home > Sofas'."
        ),
    ] = "",
    min_price: Annotated[float | None, typer.Option(help="Lowest price, inclusive.")] = None,
    max_price: Annotated[float | None, typer.Option(help="Highest price, inclusive.")] = None,
    rerank: Annotated[
        int, typer.Option(min=0, max=1000, help="The judge re-orders the best N found.")
    ] = 0,
    tiers: Annotated[
        bool, typer.Option("--tiers/--no-tiers", help="Ask the judge; without it, seconds faster.")
    ] = True,
    store: StoreName = "synthetic",
    home: Home = None,
) -> None:
    """Search the published index and show the judge's tier of every product found.

    Examples:

        relearn search "red couch" --mode hybrid --max-price 300

        relearn search "trail shoes" --brand Acme --category "Sport > Shoes" --rerank 50

        relearn search "trail shoes" --no-tiers
    """
    prepare(home)
    from flows.serving import find_products
    from models.index.filters import Filters

    _not_blank(query, "QUERY")
    filters = Filters(brand, category, min_price, max_price)
    hits = find_products(store, query, k, mode, filters, rerank, tiers)
    if not hits:
        say(_nothing_found(query, mode, filters))
        return
    table = Table(title=escape(f"{query}  ({mode})"))
    judged = ("grade", "tier") if tiers else ()
    for column in ("rank", "product", "title", "brand", "price", "score", *judged):
        table.add_column(column)
    for rank, hit in enumerate(hits, 1):
        product, view = hit.product, [str(hit.graded[name]) for name in judged]
        price = "" if product.price is None else price_text(product.price)
        cells = [str(rank), product.product_id, product.title, product.brand, price]
        table.add_row(*map(escape, cells), f"{hit.score:.3f}", *view)
    console.print(table)


def _nothing_found(query: str, mode: str, filters: Filters) -> str:
    """Why a search found nothing, by what was asked."""
    if mode == "lexical" and not terms(query):
        return f"no words to search for in {query!r}: type some, or ask with --mode vector."
    names = {"brand": filters.brand, "category": filters.category}
    names = {name: value for name, value in names.items() if value}
    bounds = {"min-price": filters.min_price, "max-price": filters.max_price}
    asked = [f"--{name} {value!r}" for name, value in names.items()]
    asked += [f"--{name} {price_text(v)}" for name, v in bounds.items() if v is not None]
    faults = ["has a word of this query"] if mode == "lexical" else []
    faults += [f"passes {', '.join(asked)}"] if asked else []
    said = f"no product {' and '.join(faults) or 'found'}"
    if names:
        said += f"; case counts, so write {' and '.join(names)} as the catalogue does"
    elif not asked and mode == "lexical":
        said += "; --mode hybrid also finds what means the same"
    return f"{said}."


@app.command()
def refresh(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with products.parquet or .csv: changed rows, deleted ids."),
    ] = None,
    store: StoreName = "synthetic",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change one setting, as in `relearn run`: refresh.* or data.source.encoding. "
            "Repeatable.",
        ),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take the last refresh back instead.")
    ] = False,
    home: Home = None,
) -> None:
    """Bring the published index up to date with changed products.

    Columns as in the products table; a row replaces the product of its id, a true value in an
    optional column `deleted` removes it. Of several rows of one id the last counts, as in a log of
    changes; those before it are set aside and counted. Only changed texts are embedded again. The
    new version is served once its recall has passed; until then, and after a crash, the old one is.

    --set refresh.keep=N says how many versions stay from now on, refresh.rebuild_share and
    refresh.max_parts when the vector index is trained again; data.source.encoding is of a CSV.

    --undo serves the version before again, e.g. after wrong prices; the champions stay.

    Examples:

        relearn refresh --data DELTA

        relearn refresh --data DELTA --set data.source.encoding=latin-1 --set refresh.keep=10

        relearn refresh --undo
    """
    if (data is None) is not undo:
        got = "both --data and --undo" if undo else "neither --data nor --undo"
        raise ConfigError(explain(got, "one of the two", "give the delta's folder, or --undo"))
    if data is None:
        if changes:
            got = f"--undo with --set {changes[0]}"
            raise ConfigError(explain(got, "--undo alone", "leave --set out: an undo reads none"))
        prepare(home)
        from flows.index import take_back_refresh

        served = take_back_refresh(store)
        console.print(f"version {served.version} is served again: {served.facts.rows} products")
        return
    prepare(home, data)
    from flows.recipes import delta_settings

    config, encoding = delta_settings(changes or [])
    server = start_server()
    from flows.index import refresh_published

    with temporary.answering(server):
        done = refresh_published(store, config, encoding)
    console.print(
        f"version {done['version']}: {done['rows']} products; {done['inserted']} inserted, "
        f"{done['updated']} updated, {done['deleted']} deleted, {done['unchanged']} unchanged, "
        f"{done['absent']} not there, {done['refused']} set aside; "
        f"{done['encoded']} texts embedded. recall@10 {done['recall_at_10']:.3f}, "
        f"{done['latency_p50_ms']:.1f} ms a query.",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Folder with products, queries and judgments.")],
    kind: Annotated[str, typer.Option(help="Format: tables, homedepot, chorus, esci, wands.")] = (
        "tables"
    ),
    store: StoreName = "synthetic",
    max_pairs: Annotated[int, typer.Option(min=1, help="Pairs scored, drawn at random.")] = 1000,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="As in `relearn run`, e.g. --set data.source.grade_offset=1."),
    ] = None,
    home: Home = None,
) -> None:
    """Measure the champion judge on any labelled tables (all their judgments, no split).

    Faulty rows are set aside with a reason, under the ceiling of `relearn run`
    (data.quality.max_quarantine).
    """
    prepare(home, data)
    from flows.recipes import STORES, recipe
    from flows.serving import Champion, evaluate_champion
    from flows.tables import judge_table

    if kind not in STORES[1:]:
        got, known = f"--kind {kind}", ", ".join(STORES[1:])
        raise ConfigError(explain(got, f"one of {known}", "name the format of the files"))
    config = recipe("small", kind, changes or []).data
    rows, refused = evaluate_champion(Champion.open(store), config, data, max_pairs)
    if refused:
        say(f"Set aside: {refused}")
    console.print(judge_table(rows, f"Champion judge on all pairs of {data}"))


@app.command()
def monitor(
    recipe: Annotated[
        str, typer.Option(help="As given to `relearn run`: smoke, small or full.")
    ] = "small",
    store: Annotated[
        str, typer.Option(help="As given to `relearn run`: synthetic, homedepot, tables, ...")
    ] = "synthetic",
    data: Annotated[
        Path | None, typer.Option(help="Folder with today's files; synthetic needs none.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one setting, e.g. --set monitor.query_mmd.limit=0.05."),
    ] = None,
    home: Home = None,
) -> None:
    """Compare today's data with what the champions were trained on, and ask for what mends it.

    Looks at new terms, segments and embeddings of queries, terms and categories of products, the
    judge's confidence and contradictions on what search finds, the age of labels, and products that
    the served index lacks. Each value has a limit; a breach sends an event, and with `relearn up`
    an automation runs the deployment that helps (retrain, retrain-judge, retrain-embedder or
    refresh-index), at most once a cooldown. Without a server the pass says what it would have run.
    Every pass is an MLflow run. What needs a model is cached until data or champions change.

    Exit code 1 when a limit is passed.

    Examples:

        relearn monitor

        relearn monitor --store tables --data TODAY --set monitor.query_new_terms.limit=0.3

        relearn monitor --set monitor.cooldown_hours=72 --set monitor.query_mmd.reaction=none
    """
    prepare(home, data)
    server = start_server()
    from flows.monitor import monitor as run_monitor
    from flows.recipes import recipe as make_recipe
    from flows.scheduled import Chain
    from flows.tables import monitor_table

    make_recipe(recipe, store, changes or [])  # its errors name the option
    folder = None if data is None else str(data.expanduser().resolve())
    chain = Chain.model_validate(
        {"recipe": recipe, "store": store, "data": folder, "changes": changes or []}
    )
    with temporary.answering(server):
        done = run_monitor(chain)
    console.print(monitor_table(done.report))
    for line in done.outcomes or ["all within their limits: nothing to run"]:
        say(line)
    if done.report.over:
        raise typer.Exit(1)


@app.command()
def lineage(
    name: Annotated[str, typer.Argument(help="Registered model or artifact name.")],
    home: Home = None,
) -> None:
    """Show what an artifact was made from, down to the raw files."""
    prepare(home)
    from tasks.lineage import lineage as tree

    console.print(tree(name))


@app.command()
def up(
    home: Home = None,
    port_prefect: Annotated[
        int | None, typer.Option("--port-prefect", min=1, max=65535, help="[default: 4200]")
    ] = None,
    port_mlflow: Annotated[
        int | None, typer.Option("--port-mlflow", min=1, max=65535, help="[default: 5000]")
    ] = None,
    runs_at_once: Annotated[
        int, typer.Option("--runs-at-once", min=1, help="Flow runs the worker takes at once.")
    ] = 1,
) -> None:
    """Start Prefect, MLflow and a worker on this machine, and register the deployments.

    Everything listens on 127.0.0.1 alone; state lies under --home, logs in its folder logs. From
    then on the schedules of infra/prefect.yaml run by themselves, until `relearn down`. What runs
    already is left as it is.
    """
    prepare(home)
    databases_ready(settings())
    from tasks import services
    from tasks.artifacts import ArtifactStore

    if sqlite_file(settings().tracking_uri) is not None:
        # MLflow's server would make the tables too, but not whole or not at all
        ArtifactStore(settings()).client.search_experiments(max_results=1)
    services.up(settings(), say, port_prefect, port_mlflow, runs_at_once)
    status(home)


@app.command()
def down(home: Home = None) -> None:
    """Stop what `relearn up` started: the worker with its flow runs, then the servers.

    Each gets SIGTERM, and SIGKILL where it does not end in time. Nothing else on the machine is
    touched. A flow run that is ended keeps its finished stages and checkpoints.
    """
    prepare(home)
    from tasks import services

    stopped = services.down(settings(), say)
    say(f"{stopped} processes stopped" if stopped else "nothing was running")


@app.command()
def status(home: Home = None) -> None:
    """Show Prefect, MLflow and the worker of this home: state, address, pid and log.

    Ends with exit code 1 unless all three run.
    """
    prepare(home)
    from flows.tables import services_table
    from tasks import services

    rows = services.status(settings())
    console.print(services_table(rows), soft_wrap=True)
    if any(row.state != services.RUNNING for row in rows):
        raise typer.Exit(1)


def _not_blank(text: str, what: str) -> None:
    if not text.strip():
        raise ConfigError(explain(f"an empty {what}", "some words", f"pass a {what}"))


if __name__ == "__main__":
    main()
