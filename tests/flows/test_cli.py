"""The commands, on a home with one finished run: what they print, and how they refuse."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import ablate, ablate_retriever, cli, cli_ablate, console, index, monitor, pipeline
from models.errors import DataContractError, StoreError
from models.evaluation.gate import Decision, GateConfig, Outcome
from models.store import Store
from tasks import release, temporary
from tasks.gate import Verdict
from tasks.release import Action, Moved, promote, release_of
from tests.flows.conftest import SMALLER, Chain, at_home
from tests.releases import artifacts, make_release

STORE = ("--store", "synthetic-smoke")
COMMANDS = (
    "run judge score search refresh evaluate monitor lineage promote rollback versions up down "
    "status"
).split()


class Done:
    """How a command ended: its exit code and what it wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def check(self) -> str:
        """What a good command printed."""
        assert self.code == 0, self.err + self.out
        assert "Traceback" not in self.out + self.err
        return self.out

    def check_refused(self, *said: str) -> str:
        """The one clear error of a bad command: code 2, no traceback, and every word of `said`."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.out + self.err
        text = " ".join((self.err + self.out).split())
        assert [s for s in said if s not in text] == [], text
        return text


Relearn = Callable[..., Done]


@pytest.fixture
def relearn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Relearn:
    """`relearn ARGS` in this process, as the console script runs it."""
    from rich.console import Console

    for name in ("RELEARN_HOME", "RELEARN_DATA_DIR"):
        monkeypatch.setenv(name, "unused")  # restored afterwards, whatever a command sets
    monkeypatch.delenv("RELEARN_DATA_DIR")
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["relearn", *map(str, arguments)])
        for module in (cli, cli_ablate, console):
            monkeypatch.setattr(module, "console", Console(width=150))
        monkeypatch.setattr(console, "Console", lambda **kw: Console(width=1000, **kw))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else int(code is not None), out, err)

    return call


@pytest.fixture(scope="module")
def tables(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's own store as a folder of tables."""
    ref = next(r.ref for r in chain.results[0].reports if r.ref.name == "validate")
    store = Store.read(chain.artifacts.path(ref) / "store")
    folder = tmp_path_factory.mktemp("tables")
    for name in ("products", "queries", "judgments"):
        table = getattr(store, name)
        if name == "queries":
            table = table.drop_columns(["split"])
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def write_pairs(path: Path, **columns: list[object]) -> Path:
    """A parquet of pairs with the given columns."""
    pq.write_table(pa.table(columns), path)
    return path


# help


def test_help_teaches(relearn: Relearn) -> None:
    text = relearn("--help").check()
    assert all(f" {command} " in text for command in COMMANDS)
    assert "--home" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(relearn: Relearn, command: str) -> None:
    text = relearn(command, "--help").check()
    assert "Usage:" in text and "--home" in text and len(text.split()) > 40


def test_ablations_are_commands_of_their_own(relearn: Relearn) -> None:
    text = relearn("ablate", "retriever", "--help").check()
    assert all(option in text for option in ("--rows", "--seeds", "--set", "--home", "--store"))
    relearn("ablate", "retriever", "--seeds", "0,x").check_refused("--seeds 0,x", "whole numbers")


def test_the_script_is_installed_and_light() -> None:
    script = Path(sys.executable).with_name("relearn")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "relearn run" in done.stdout


# good commands


def test_judge_prints_grade_probabilities_and_tier(relearn: Relearn, chain: Chain) -> None:
    text = relearn("judge", "red sofa", "Blue lamp", *STORE, "--home", chain.home).check()
    words = text.split()
    assert words[0] == "grade" and words[1] in "1234"
    tier = {"1": "bad", "2": "mid", "3": "good", "4": "good"}[words[1]]
    assert words[words.index("tier") + 1].lower() == tier
    probabilities = [float(words[words.index(f"{g}:") + 1]) for g in (1, 2, 3, 4)]
    assert sum(probabilities) == pytest.approx(1, abs=0.003)


def test_judge_tells_why(relearn: Relearn, chain: Chain) -> None:
    short = relearn("judge", "red sofa", "Blue lamp", *STORE, "--home", chain.home).check()
    long = relearn("judge", "red sofa", "Blue lamp", "--why", *STORE, "--home", chain.home).check()
    assert long.startswith(short) and len(long) > len(short)


def test_score_adds_columns_and_keeps_order(relearn: Relearn, chain: Chain, tmp_path: Path) -> None:
    source = write_pairs(
        tmp_path / "pairs.parquet",
        note=["c", "a", "b"],
        query=["red sofa", "oak desk", "red sofa"],
        title=["Red sofa", "Steel cup", "Oak desk"],
        price=[10.0, None, 30.0],
    )
    out = tmp_path / "out.parquet"
    text = relearn("score", source, "-o", out, *STORE, "--home", chain.home).check()
    assert "3 pairs scored" in text
    table = pq.read_table(out)
    added = ["grade", "p1", "p2", "p3", "p4", "tier"]
    assert table.column_names == ["note", "query", "title", "price", *added]
    assert table.select(["note", "query", "title", "price"]).equals(pq.read_table(source))
    for row in table.to_pylist():
        assert sum(row[f"p{g}"] for g in (1, 2, 3, 4)) == pytest.approx(1, abs=1e-5)
        assert row["grade"] in (1, 2, 3, 4)
    # scoring the scored file again replaces the columns
    relearn("score", out, "-o", out, *STORE, "--home", chain.home).check()
    assert pq.read_table(out).equals(table)
    assert list(tmp_path.glob("*.partial")) == []


def test_score_of_no_rows(relearn: Relearn, chain: Chain, tmp_path: Path) -> None:
    source = tmp_path / "none.parquet"
    empty = pa.table({"query": pa.array([], pa.string()), "title": pa.array([], pa.string())})
    pq.write_table(empty, source)
    out = tmp_path / "out.parquet"
    assert "0 pairs" in relearn("score", source, "-o", out, *STORE, "--home", chain.home).check()
    assert pq.read_table(out).num_rows == 0


@pytest.mark.parametrize("mode", ["vector", "lexical", "hybrid"])
def test_search_ranks_products_with_tiers(relearn: Relearn, chain: Chain, mode: str) -> None:
    ref = next(r.ref for r in chain.results[0].reports if r.ref.name == "validate")
    store = Store.read(chain.artifacts.path(ref) / "store")
    word = next(iter(store.product_by_id.values())).title.split()[0]
    arguments = ("search", word, "-k", "3", "--mode", mode, *STORE, "--home", chain.home)
    text = relearn(*arguments).check()
    shown = [p for p in store.product_by_id if f" {p} " in text]
    assert 1 <= len(shown) <= 3 and (mode == "lexical" or len(shown) == 3)
    assert all(column in text for column in ("rank", "title", "grade", "tier"))


def test_search_filters_and_lets_the_judge_re_rank(relearn: Relearn, chain: Chain) -> None:
    from flows.serving import find_products
    from models.index.filters import Filters

    ref = next(r.ref for r in chain.results[0].reports if r.ref.name == "validate")
    store = Store.read(chain.artifacts.path(ref) / "store")
    brand = next(iter(store.product_by_id.values())).brand
    own = {i for i, p in store.product_by_id.items() if p.brand == brand}
    tail = (*STORE, "--home", chain.home)
    text = relearn("search", "sofa", "-k", "120", "--brand", brand, *tail).check()
    assert {p for p in store.product_by_id if f" {p} " in text} == own
    text = relearn("search", "sofa", "--brand", "x' OR '1'='1", *tail).check()
    assert [p for p in store.product_by_id if f" {p} " in text] == []
    refused = relearn("search", "sofa", "--min-price", "9", "--max-price", "3", *tail)
    refused.check_refused("prices from 9 to 3")
    relearn("search", "sofa", "--category", ">", *tail).check_refused("the category '>'")

    with at_home(chain.home):
        plain = find_products("synthetic-smoke", "sofa", 12, "vector")
        ranked = find_products("synthetic-smoke", "sofa", 5, "vector", Filters(), rerank=12)
    best = sorted(plain, key=lambda hit: -hit.expected_grade)[:5]
    assert [h.product.product_id for h in ranked] == [h.product.product_id for h in best]
    assert [h.product.product_id for h in ranked] != [h.product.product_id for h in plain[:5]]


@pytest.mark.parametrize(
    ("query", "more", "said"),
    [
        ("???", "--mode lexical", "no words to search for in '???'"),
        ("???", "--mode lexical --brand Acme", "no words to search for in '???'"),
        ("zyx", "--mode lexical", "no product has a word of this query; --mode hybrid"),
        (
            "zyx",
            "--mode lexical --max-price 3",
            "no product has a word of this query and passes --max-price 3.",
        ),
        ("sofa", "--min-price 9000000", "no product passes --min-price 9000000."),
        (
            "sofa",
            "--brand no --category X>Y --max-price 0.5",
            "no product passes --brand 'no', --category 'X>Y', --max-price 0.5; case counts, so "
            "write brand and category as the catalogue does.",
        ),
    ],
)
def test_a_search_that_finds_nothing_says_what_was_asked(
    relearn: Relearn, chain: Chain, query: str, more: str, said: str
) -> None:
    tail = ("--no-tiers", *STORE, "--home", chain.home)
    text = relearn("search", query, *more.split(), *tail).check()
    assert said in " ".join(text.split())


def test_search_without_tiers_loads_no_judge(
    relearn: Relearn, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.serving import Champion, find_products

    tail = ("search", "sofa", "-k", "3", "--no-tiers", *STORE, "--home", chain.home)
    text = relearn(*tail).check()
    assert "score" in text and "tier" not in text and "grade" not in text
    relearn(*tail, "--rerank", "3").check_refused("--rerank 3 with --no-tiers")
    with at_home(chain.home):
        asked = find_products("synthetic-smoke", "sofa", 3, "vector")
        monkeypatch.setattr(Champion, "open", None)
        plain = find_products("synthetic-smoke", "sofa", 3, "vector", judged=False)
    assert [(h.product, h.score) for h in plain] == [(h.product, h.score) for h in asked]


def test_refresh_applies_a_delta_to_what_is_served(
    relearn: Relearn, chain: Chain, tmp_path: Path
) -> None:
    """On a copy of the published table: other tests search the original."""
    ref = next(r.ref for r in chain.results[0].reports if r.ref.name == "validate")
    store = Store.read(chain.artifacts.path(ref) / "store")
    before = chain.home / "published" / "synthetic-smoke"
    kept = shutil.copytree(before, tmp_path / "kept")
    first, second = list(store.product_by_id)[:2]
    delta = tmp_path / "delta"
    delta.mkdir()
    write_pairs(
        delta / "products.parquet",
        product_id=["brand-new", first, second],
        title=["Zyxophone deluxe", None, "Renamed lamp"],
        deleted=[False, True, False],
    )
    tail = (*STORE, "--home", chain.home)
    try:
        text = relearn("refresh", "--data", delta, *tail).check()
        assert "1 inserted, 1 updated, 1 deleted" in text and "2 texts embedded" in text
        assert "120 products" in text
        text = relearn("search", "zyxophone", "--mode", "lexical", *tail).check()
        assert "brand-new" in text
        text = relearn("refresh", "--data", delta, *tail).check()
        assert "0 inserted, 0 updated, 0 deleted, 2 unchanged, 1 not there" in text
        text = relearn("refresh", "--undo", *tail).check()
        assert "is served again: 120 products" in text
        text = relearn("search", "zyxophone", "--mode", "lexical", *tail).check()
        assert "brand-new" not in text
        relearn("refresh", "--undo", *tail).check_refused("as built")
        latin = "product_id,title\nkuche,Old\nkuche,Küche zyxophone\n".encode("latin-1")
        (delta / "products.parquet").unlink()
        (delta / "products.csv").write_bytes(latin)
        refused = relearn("refresh", "--data", delta, *tail)
        refused.check_refused("--set data.source.encoding=latin-1")
        changes = ("--set", "data.source.encoding=latin-1", "--set", "refresh.keep=6")
        text = relearn("refresh", "--data", delta, *changes, *tail).check()
        assert "1 inserted" in text and "1 set aside" in text
        text = relearn("search", "zyxophone", "--mode", "lexical", *tail).check()
        assert "Küche zyxophone" in text
        assert (before / "keep").read_text() == "6"
    finally:
        shutil.rmtree(before)
        kept.rename(before)
    relearn("refresh", *tail).check_refused("neither --data nor --undo")
    relearn("refresh", "--undo", "--data", delta, *tail).check_refused("both --data and --undo")
    relearn("refresh", "--undo", *changes, *tail).check_refused("--undo with --set data.source")
    useless = relearn("refresh", "--data", delta, "--set", "judge.dpo.beta=1", *tail)
    useless.check_refused("'judge.dpo.beta'", "refresh.keep", "data.source.encoding")
    relearn("refresh", "--data", tmp_path / "absent", *tail).check_refused("absent")
    relearn("refresh", "--data", tmp_path, *tail).check_refused("products.parquet")


def test_lineage_goes_down_to_the_source(relearn: Relearn, chain: Chain) -> None:
    text = relearn("lineage", "synthetic-smoke-index", "--home", chain.home).check()
    for stage in ("index", "embedder_rgrpo", "judge_grpo", "judge_dpo", "judge_cot_sft", "ingest"):
        assert stage in text


def test_monitor_shows_every_value_and_ends_with_1_on_a_breach(
    relearn: Relearn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.evaluation.monitor import MonitorConfig, Report

    asked = []

    def one_pass(values: dict[str, float]) -> None:
        report = Report.of(MonitorConfig(), values, {"query_mmd": "9 queries"})
        said = [f"{reaction} asked for" for reaction in report.reactions]
        done = monitor.MonitorResult(report, said, "run")
        monkeypatch.setattr(monitor, "monitor", lambda chain: asked.append(chain) or done)

    tail = ("--data", tmp_path, "--store", "tables", "--home", tmp_path)
    one_pass({"query_mmd": 0.01})
    text = relearn("monitor", *tail).check()
    assert "0.01" in text and "9 queries" in text and "nothing to run" in text
    assert all(name in text for name in MonitorConfig().bounds) and "OVER" not in text
    one_pass({"query_mmd": 0.03})
    done = relearn("monitor", *tail, "--set", "monitor.query_mmd.limit=0.02")
    assert done.code == 1 and "OVER" in done.out and "retrain-embedder asked for" in done.out
    assert asked[-1].data == str(tmp_path) and asked[-1].store == "tables"
    assert asked[-1].config.monitor.query_mmd.limit == 0.02
    relearn("monitor", *tail, "--set", "monitor.query_mdm.limit=1").check_refused("query_mmd")
    relearn("monitor", "--recipe", "huge", "--home", tmp_path).check_refused("smoke")


@pytest.mark.parametrize(
    ("arguments", "module", "flow"),
    [
        ("run --recipe smoke", pipeline, "run_pipeline"),
        ("ablate judge --recipe smoke", ablate, "ablate_judge"),
        ("ablate retriever --recipe smoke", ablate_retriever, "ablate_retriever"),
        ("monitor --recipe smoke", monitor, "monitor"),
        ("refresh --data .", index, "refresh_published"),
    ],
)
def test_a_flow_runs_on_a_server_that_ends_with_its_command(
    relearn: Relearn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    module: ModuleType,
    flow: str,
) -> None:
    answers: list[bool] = []

    class Server:
        @contextlib.contextmanager
        def ready(self, meanwhile: object) -> Iterator[None]:
            answers.append(True)
            yield
            answers.append(False)

    def runs(*_: object) -> None:
        raise StoreError(f"answers: {answers}")

    monkeypatch.setattr(temporary, "start", lambda _: Server())
    monkeypatch.setattr(module, flow, runs)
    done = relearn(*arguments.split(), "--home", tmp_path)
    done.check_refused("answers: [True]")


def test_evaluate_measures_the_champion(relearn: Relearn, chain: Chain, tables: Path) -> None:
    arguments = ("--max-pairs", "30", *STORE, "--home", chain.home)
    text = relearn("evaluate", "--data", tables, *arguments).check()
    assert "champion" in text and "champion + CumPT" in text and "macro-F1" in text
    assert " 30 " in text and "Set aside" not in text and "held-out" not in text


def test_evaluate_says_what_it_refuses(
    relearn: Relearn, chain: Chain, tables: Path, tmp_path: Path
) -> None:
    for name in ("products", "queries"):
        shutil.copy(tables / f"{name}.parquet", tmp_path)
    judgments = pq.read_table(tables / "judgments.parquet").to_pandas()
    at = (*STORE, "--home", chain.home, "--max-pairs", "30")

    def evaluated(*more: str) -> Done:
        return relearn("evaluate", "--data", tmp_path, *at, *more)

    judgments.assign(grade=judgments["grade"] - 1).to_parquet(tmp_path / "judgments.parquet")
    evaluated().check_refused("unknown_grade", "grade_offset=1")
    evaluated("--set", "data.source.grade_offset=1").check()
    judgments.loc[0, "grade"] = 9
    judgments.to_parquet(tmp_path / "judgments.parquet")
    assert "Set aside: judgments: 1 unknown_grade, e.g." in evaluated().check()


def test_run_shows_the_tables_and_the_way_on(relearn: Relearn, chain: Chain) -> None:
    """All cached: the console script's own path through the flows."""
    changes = [part for change in SMALLER for part in ("--set", change)]
    text = relearn("run", "--recipe", "smoke", *changes, "--home", chain.home).check()
    assert "0 made" in text and "mlflow ui" in text and "prefect server start" in text
    assert "SFT + R-GRPO" in text and "+ GRPO + CumPT" in text and "candidate" in text
    assert text.index("Registered") < text.index("Gate: ") < text.index("mlflow ui")
    assert f"--why --store {STORE[1]} --home {chain.home}" in text


def test_show_config_prints_json_and_runs_nothing(relearn: Relearn, tmp_path: Path) -> None:
    from flows.recipes import PipelineConfig

    text = relearn(
        "run",
        "--recipe",
        "smoke",
        "--set",
        "judge.dpo.beta=0.2",
        "--show-config",
        "--home",
        tmp_path,
    ).check()
    assert PipelineConfig.model_validate_json(text).judge.dpo.beta == 0.2
    assert not (tmp_path / "mlflow.db").exists()


# promotion, on releases that nothing trained


@pytest.fixture
def shop(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a champion of quality .5 and a candidate of .4, whose indexes are one word."""
    monkeypatch.setattr(release, "PUBLISHERS", ())
    first = make_release(quality=0.5)
    moved = promote("shop", first, None, Action.FIRST, "the first", artifacts=artifacts())
    assert moved is Moved.DONE
    make_release(quality=0.4, judge=1)
    return home


def test_a_candidate_is_held_then_forced_then_rolled_back(relearn: Relearn, shop: Path) -> None:
    tail = ("--store", "shop", "--home", shop)
    held = relearn("promote", *tail)
    assert held.code == 1 and "Gate: hold" in held.out and "--force --reason" in held.out
    relearn("promote", "--force", *tail).check_refused("ConfigError", "--reason TEXT")

    forced = relearn("promote", "--force", "--reason", "agreed", *tail).check()
    assert "Champion by this run (forced)" in forced and "candidate, champion" in forced
    assert "nothing to do" in relearn("promote", *tail).check()
    text = relearn("versions", *tail).check()
    assert "kappa 0.500" in text and "recall 1.000" in text and "forced" in text
    assert "withdrawn" not in text

    text = relearn("rollback", "--reason", "complaints", *tail).check()
    assert "champion: judge 1, embedder 1, index 1" in text and "judge 2" in text
    text = relearn("versions", *tail).check()
    assert "complaints" in " ".join(text.split()) and "withdrawn" in text
    assert "nothing withdrawn" in relearn("promote", *tail).out
    relearn("rollback", *tail).check_refused("ArtifactError", "no champion before")
    relearn("rollback", "--to", "7", *tail).check_refused("ConfigError", "--to 7", "(2)")
    text = relearn("rollback", "--to", "2", *tail).check()
    assert "champion: judge 2, embedder 2, index 2" in text


def test_a_run_that_was_overtaken_holds_and_says_so(shop: Path) -> None:
    """It decided when there was no champion; by now another run has made one."""
    from flows.release import _promote

    candidate = release_of("shop", "candidate", artifacts=artifacts())
    assert candidate is not None
    late = Verdict(candidate, None, Decision.of([]))
    held, action = _promote("shop", late, Action.FIRST, "", GateConfig(), artifacts())
    assert action is None and held.decision.outcome is Outcome.HOLD
    assert "another run promoted" in held.decision.summary
    now = release_of("shop", "candidate", artifacts=artifacts())
    assert now is not None and now.parts["index"].tags["decision"].startswith("hold ")

    # a run of the very same settings was quicker: nothing is wrong with what it made
    champion = release_of("shop", "champion", artifacts=artifacts())
    assert champion is not None
    late = Verdict(champion, None, Decision.of([]))
    same, action = _promote("shop", late, Action.FIRST, "", GateConfig(), artifacts())
    assert action is None and "nothing to do" in same.decision.summary
    now = release_of("shop", "champion", artifacts=artifacts())
    assert now is not None and now.parts == champion.parts, "its versions are tagged as before"


# users' mistakes


@pytest.mark.parametrize("column", ["query", "title"])
def test_score_without_a_column(
    relearn: Relearn, chain: Chain, tmp_path: Path, column: str
) -> None:
    columns = {"query": ["red sofa"], "title": ["Red sofa"]}
    del columns[column]
    source = write_pairs(tmp_path / "pairs.parquet", **columns)
    out = tmp_path / "out.parquet"
    done = relearn("score", source, "-o", out, *STORE, "--home", chain.home)
    done.check_refused("DataContractError", column, "expected", "do this")
    assert not out.exists()


@pytest.mark.parametrize("bad", ["", "  \t", None])
def test_score_with_an_empty_title_names_the_row(
    relearn: Relearn, chain: Chain, tmp_path: Path, bad: str | None
) -> None:
    source = write_pairs(tmp_path / "p.parquet", query=["a", "b", "c"], title=["x", bad, "z"])
    done = relearn("score", source, "-o", tmp_path / "o.parquet", *STORE, "--home", chain.home)
    done.check_refused("title", "row 1")


def test_score_of_something_else(relearn: Relearn, chain: Chain, tmp_path: Path) -> None:
    text = tmp_path / "pairs.parquet"
    text.write_text("query,title\n")
    tail = ("-o", tmp_path / "o.parquet", *STORE, "--home", chain.home)
    relearn("score", text, *tail).check_refused("a parquet file")
    relearn("score", tmp_path / "absent.parquet", *tail).check_refused("absent.parquet")


def test_score_with_product_columns_of_another_type(
    relearn: Relearn, chain: Chain, tmp_path: Path
) -> None:
    """Prices as text, attributes as JSON text: common exports."""
    tail = ("-o", tmp_path / "o.parquet", *STORE, "--home", chain.home)
    prices = write_pairs(tmp_path / "a.parquet", query=["a"], title=["b"], price=["12 EUR"])
    relearn("score", prices, *tail).check_refused("price", "row 0")
    attributes = write_pairs(
        tmp_path / "b.parquet", query=["a"], title=["b"], attributes=['{"colour": "red"}']
    )
    relearn("score", attributes, *tail).check_refused("attributes", "row 0")
    brands = write_pairs(tmp_path / "c.parquet", query=["a"], title=["b"], brand=[7])
    relearn("score", brands, *tail).check_refused("brand", "row 0")


def test_score_into_a_folder_that_is_not_there(
    relearn: Relearn, chain: Chain, tmp_path: Path
) -> None:
    source = write_pairs(tmp_path / "p.parquet", query=["a"], title=["b"])
    out = tmp_path / "absent" / "o.parquet"
    relearn("score", source, "-o", out, *STORE, "--home", chain.home).check_refused("absent")


@pytest.mark.parametrize(
    "arguments", [("judge", " ", "sofa"), ("judge", "sofa", ""), ("search", "")]
)
def test_blank_texts(relearn: Relearn, chain: Chain, arguments: tuple[str, ...]) -> None:
    relearn(*arguments, *STORE, "--home", chain.home).check_refused("ConfigError", "an empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ("judge", "a", "b"),
        ("search", "a"),
        ("lineage", "nothing"),
        ("score", "x", "-o", "y"),
        ("promote",),
        ("rollback",),
        ("versions",),
    ],
)
def test_a_home_without_champions(relearn: Relearn, home: Path, arguments: tuple[str, ...]) -> None:
    relearn(*arguments, "--home", home).check_refused("expected", "do this")


def test_an_unknown_store_of_a_good_home(relearn: Relearn, chain: Chain) -> None:
    done = relearn("judge", "a", "b", "--store", "amazon", "--home", chain.home)
    done.check_refused("no champion of amazon", f"there are {STORE[1]}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--recipe", "tiny"), "smoke, small, full"),
        (("--store", "amazon"), "synthetic, homedepot"),
        (("--set", "judge.dpo.bta=1"), "beta"),
        (("--set", "judge.dpo.beta=-1"), "greater than 0"),
        (("--data", "no/such/folder"), "no/such/folder"),
    ],
)
def test_run_refuses_what_it_cannot_do(
    relearn: Relearn, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    relearn("run", *arguments, "--home", tmp_path).check_refused("ConfigError", said)


def test_run_of_a_store_without_its_files(
    relearn: Relearn, tmp_path: Path, prefect_server: None
) -> None:
    empty = tmp_path / "data"
    empty.mkdir()
    arguments = ("--recipe", "smoke", "--store", "tables", "--data", empty)
    done = relearn("run", *arguments, "--home", tmp_path / "home")
    done.check_refused("DataContractError", "products")


def test_search_and_evaluate_refuse_clearly(
    relearn: Relearn, chain: Chain, tmp_path: Path, tables: Path
) -> None:
    tail = (*STORE, "--home", chain.home)
    relearn("search", "sofa", "--mode", "fuzzy", *tail).check_refused("vector, lexical, hybrid")
    relearn("search", "sofa", "-k", "0", *tail).check_refused("-k")
    absent = tmp_path / "absent"
    relearn("evaluate", "--data", absent, *tail).check_refused("absent")
    relearn("evaluate", "--data", tmp_path, *tail).check_refused("DataContractError", "products")
    relearn("evaluate", "--data", tables, "--kind", "csv", *tail).check_refused("--kind csv")


def test_a_champion_whose_files_are_gone(
    relearn: Relearn, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.artifacts import ArtifactStore

    folder = chain.artifacts.path(chain.results[0].judge.judge)
    weights = folder / "model.safetensors"
    hidden = weights.with_suffix(".hidden")
    weights.rename(hidden)
    try:
        done = relearn("judge", "a", "b", *STORE, "--home", chain.home)
        done.check_refused("Error", "do this")
    finally:
        hidden.rename(weights)
    assert isinstance(chain.artifacts, ArtifactStore)


# the ablation


def test_ablation_rows_are_listed_with_their_settings(relearn: Relearn, tmp_path: Path) -> None:
    at = ("--recipe", "smoke", "--home", tmp_path)
    text = relearn("ablate", "judge", "--list-rows", "--rows", "think-first,dpo", *at).check()
    assert "judge.prompt.order=think_then_respond" in text and "+ DPO" in text
    assert "zero-shot" not in text


def test_wrong_ablations_are_refused(relearn: Relearn, tmp_path: Path) -> None:
    at = ("--recipe", "smoke", "--home", tmp_path)
    relearn("ablate", "judge", "--rows", "dqo", *at).check_refused("dqo", "label-only", "--rows")
    wrong = ("ablate", "judge", "--seeds", "0,x", "--rows", "dpo")
    relearn(*wrong, *at).check_refused("--seeds 0,x", "0,1,2")
    text = relearn("ablate", "judge", "--help").check()
    assert "--home" in text and "graded" in text


def test_a_mistake_inside_a_flow_is_logged_without_the_way_there() -> None:
    """Prefect logs the traceback of whatever ends a flow or task."""

    def logged(error: Exception) -> str:
        try:
            raise error
        except Exception:
            record = logging.LogRecord(
                "prefect.flow_runs", logging.ERROR, "", 1, "ended: %r", (error,), sys.exc_info()
            )
        assert console.NoTraceback().filter(record)
        return logging.Formatter().format(record)

    assert logged(DataContractError("got no column title")).startswith("ended: DataContractError")
    assert "Traceback" not in logged(DataContractError("got no column title"))
    assert "Traceback" in logged(ZeroDivisionError("a fault of ours"))
    console.guarded(lambda: None)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        filters = logging.getLogger(name).filters
        assert sum(isinstance(f, console.NoTraceback) for f in filters) == 1
