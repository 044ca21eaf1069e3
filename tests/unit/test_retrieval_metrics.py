"""Retrieval metrics as arithmetic, and against ir_measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from models.errors import DataContractError
from models.evaluation import retrieval as m
from models.evaluation.lexical import Bm25, random_run
from models.evaluation.retriever_rows import row_parts
from models.types import Product, Query

GRADES = {"a": 4, "b": 3, "c": 2, "d": 1, "e": 4}


def test_counts_as_arithmetic() -> None:
    ranking = ["x", "a", "d", "b"]
    assert m.recall(ranking, GRADES, 4) == 2 / 3
    assert m.precision(ranking, GRADES, 4) == 2 / 4
    assert m.judged(ranking, GRADES, 4) == 3 / 4
    assert m.mrr(ranking, GRADES) == 1 / 2
    assert m.mrr(ranking, GRADES, k=1) == 0
    assert m.recall([], GRADES, 10) == 0


def test_ndcg_as_arithmetic_over_all_judged_documents() -> None:
    """Trap: an IDCG of the retrieved documents only would be 1 here."""
    dcg = 3 / math.log2(2)
    idcg = 7 / math.log2(2) + 7 / math.log2(3) + 3 / math.log2(4) + 1 / math.log2(5)
    assert m.ndcg(["b"], GRADES, 10) == pytest.approx(dcg / idcg)
    assert m.ndcg(["a", "e", "b", "c", "d"], GRADES, 10) == pytest.approx(1.0)


def test_repeating_a_product_wins_nothing() -> None:
    assert m.ndcg(["a", "a", "a"], GRADES, 10) == m.ndcg(["a"], GRADES, 10)
    assert m.ndcg(["a", "a", "e"], {"a": 4, "e": 4}, 10) <= 1.0
    assert m.recall(["a", "a", "e"], GRADES, 2) == 2 / 3


def test_the_two_esci_gain_tables_differ() -> None:
    grades = {"s": 3, "c": 2, "e": 4}
    ranking = ["s"]
    paper, code = (
        m.ndcg(ranking, grades, 10, m.GAIN_TABLES[n]) for n in ("esci_paper", "esci_code")
    )
    assert paper == pytest.approx(10 * code)


def test_queries_without_relevant_products_have_no_recall() -> None:
    assert math.isnan(m.recall(["d"], {"d": 1}, 5))
    assert math.isnan(m.mrr(["d"], {"d": 1}))
    assert math.isnan(m.ndcg(["d"], {"d": 1}))


def test_hitrate_pools_pairs_where_recall_averages_queries() -> None:
    qrels = {"q": {"a": 4}, "r": {"b": 4, "c": 3, "d": 3}}
    run = {"q": ["a"], "r": ["b"]}
    assert m.hitrate(run, qrels, 10) == 2 / 4
    rows = m.evaluate_runs({"run": run}, qrels, {i: Query(i, "x") for i in "qr"}, {}, ks=(10,))
    assert rows[0]["recall@10"] == pytest.approx((1 + 1 / 3) / 2)
    assert rows[0]["hitrate@10"] == 2 / 4


def test_segments_split_the_queries_and_all_comes_first() -> None:
    queries = {"q": Query("q", "x", "general"), "r": Query("r", "y", "negation")}
    qrels = {
        "q": {"a": 4},
        "r": {"a": 4},
    }
    rows = m.evaluate_runs({"run": {"q": ["a"]}}, qrels, queries, {}, ks=(10,))
    table = {row["segment"]: row for row in rows}
    assert list(table) == ["all", "general", "negation"]
    assert (table["all"]["recall@10"], table["general"]["recall@10"]) == (0.5, 1.0)
    assert table["negation"]["recall@10"] == 0.0, "a query the run lacks found nothing"
    assert table["all"]["n"] == 2


def test_judge_quality_and_channel_columns() -> None:
    products = {p: Product(p, t) for p, t in {"a": "red shoe", "b": "blue hat"}.items()}
    queries, qrels = {"q": Query("q", "red shoe")}, {"q": {"a": 4}}
    rows = m.evaluate_runs(
        {"bm25": {"q": ["a"]}, "dense": {"q": ["b", "a"]}},
        qrels,
        queries,
        products,
        judge_good=lambda query, shown: [p.product_id == "a" for p in shown],
        quality={"a": 0.25, "b": 0.75},
        ks=(10,),
    )
    dense = next(r for r in rows if r["run"] == "dense" and r["segment"] == "all")
    assert dense["goodrate@10"] == 1 / 10, "a place without a product is not good"
    assert dense["quality@10"] == (0.75 + 0.25) / 2
    assert dense["lexical_overlap@10"] == (0 + 1) / 2
    assert dense["bm25_overlap@10"] == 1 / 2


def test_a_query_without_results_has_no_good_ones_and_an_unread_one_no_rate() -> None:
    products = {"a": Product("a", "red shoe")}
    queries = {q: Query(q, "red shoe") for q in ("found", "empty", "unread")}
    qrels = {q: {"a": 4} for q in queries}

    def good(query: Query, shown: Sequence[Product]) -> list[float]:
        return [float("nan")] if query.query_id == "unread" else [1.0 for _ in shown]

    run = {"found": ["a"], "unread": ["a"]}
    rates = m.per_query(run, qrels, queries, products, good)["goodrate@10"]
    assert (rates["found"], rates["empty"]) == (0.1, 0.0) and math.isnan(rates["unread"])
    parts = row_parts(run, qrels, queries, products, {}, good, truth=lambda q, s: [True for _ in s])
    assert parts["goodrate@10"] == {"found": (0.1, 1.0), "empty": (0.0, 1.0)}
    assert parts["true_goodrate@10"] == {q: (0.1 * (q != "empty"), 1.0) for q in queries}


def test_unjudged_products_cost_ndcg_and_not_its_condensed_kind() -> None:
    queries, qrels = {"q": Query("q", "x")}, {"q": {"a": 4, "b": 2}}
    runs = {"first": {"q": ["u", "v", "a", "b"]}, "last": {"q": ["u", "v", "b", "a"]}}
    first, last = (r for r in m.evaluate_runs(runs, qrels, queries, {}) if r["segment"] == "all")
    assert (first["ndcg@10"], first["condensed_ndcg@10"]) == (pytest.approx(0.5, abs=0.05), 1.0)
    assert last["condensed_ndcg@10"] == m.ndcg(["b", "a"], qrels["q"])


def test_a_run_is_also_measured_beside_the_lexical_channel() -> None:
    """Fused by reciprocal rank: what both find comes first, and neither's own find is lost."""
    queries, qrels = {"q": Query("q", "x")}, {"q": {"a": 4, "b": 4}}
    runs = {"bm25": {"q": ["a", "u"]}, "dense": {"q": ["v", "b"]}, "same": {"q": ["a", "u"]}}
    rows = {r["run"]: r for r in m.evaluate_runs(runs, qrels, queries, {}) if r["segment"] == "all"}
    assert rows["dense"]["recall@10"] == 0.5
    assert rows["dense"]["hybrid_recall@10"] == 1.0
    fused = ["v", "a", "b", "u"]  # of equal ranks the run's own comes first
    assert rows["dense"]["hybrid_ndcg@10"] == m.ndcg(fused, qrels["q"])
    short = {"bm25": {"q": ["u", "a", "b"]}, "dense": {"q": ["v"]}, "none": {}}
    found = m.evaluate_runs(short, qrels, queries, {})
    assert [r["hybrid_recall@10"] for r in found if r["segment"] == "all"] == [1.0, 1.0, 1.0]
    assert rows["same"]["hybrid_ndcg@10"] == rows["same"]["ndcg@10"]
    alone = m.evaluate_runs({"dense": runs["dense"]}, qrels, queries, {})
    assert not any(name.startswith("hybrid") for name in alone[0])


def test_unknown_queries_are_refused() -> None:
    with pytest.raises(DataContractError, match="unknown"):
        m.evaluate_runs({"run": {}}, {"q": {"a": 4}}, {}, {})


def random_case(seed: int) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    rng = np.random.default_rng(seed)
    docs = [f"d{i}" for i in range(60)]
    qrels = {
        f"q{q}": {d: int(rng.integers(1, 5)) for d in rng.choice(docs, 25, replace=False)}
        for q in range(12)
    }
    run = {q: [str(d) for d in rng.permutation(docs)[:40]] for q in qrels}
    return run, qrels


def test_equal_to_ir_measures(tmp_path: Path) -> None:
    ir = pytest.importorskip("ir_measures")
    run, qrels = random_case(0)
    m.write_trec_run(run, tmp_path / "run.txt")
    m.write_trec_qrels(qrels, tmp_path / "qrels.txt")
    measures = {
        "p": ir.P(rel=2) @ 10,
        "rr": ir.RR(rel=2) @ 10,
        "r": ir.R(rel=2) @ 20,
        "linear": ir.nDCG @ 10,
        "exponential": ir.nDCG(gains={0: 0, 1: 1, 2: 3, 3: 7}) @ 10,
        "condensed": ir.nDCG(judged_only=True) @ 10,
    }
    theirs: dict[str, dict[str, float]] = {}
    read = list(ir.read_trec_qrels(str(tmp_path / "qrels.txt")))
    found = list(ir.read_trec_run(str(tmp_path / "run.txt")))
    for name, measure in measures.items():  # one a call: two nDCGs in one call get mixed up
        theirs[name] = {row.query_id: row.value for row in ir.iter_calc([measure], read, found)}
    for q, grades in qrels.items():
        ours = {
            "p": m.precision(run[q], grades, 10),
            "rr": m.mrr(run[q], grades, 10),
            "r": m.recall(run[q], grades, 20),
            "linear": m.ndcg(run[q], grades, 10, m.LINEAR),
            "exponential": m.ndcg(run[q], grades, 10, m.EXPONENTIAL),
            "condensed": m.ndcg(m.condensed(run[q], grades), grades, 10, m.LINEAR),
        }
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name][q], abs=1e-9), (name, q)


def test_the_tables_means_are_those_of_ir_measures_over_queries_with_something_to_find(
    tmp_path: Path,
) -> None:
    """The library counts a query without a relevant product as 0, the table leaves it out."""
    ir = pytest.importorskip("ir_measures")
    run, qrels = random_case(1)
    # grade 1 alone; grade 2 at most, which has a gain and is not relevant; one the run lacks
    qrels = {**qrels, "none": {"d1": 1, "d2": 1}, "poor": {"d4": 2}, "lost": {"d3": 4}}
    run |= {"none": ["d1", "d5"], "poor": ["d9", "d4"]}
    m.write_trec_run(run, tmp_path / "run.txt")
    m.write_trec_qrels(qrels, tmp_path / "qrels.txt")
    read = list(ir.read_trec_qrels(str(tmp_path / "qrels.txt")))
    found = list(ir.read_trec_run(str(tmp_path / "run.txt")))
    table = m.evaluate_runs({"run": run}, qrels, {q: Query(q, "x") for q in qrels}, {}, ks=(10,))[0]
    left_out = {"ndcg@10": {"none"}, "recall@10": {"none", "poor"}, "mrr@10": {"none", "poor"}}
    asked = {
        "ndcg@10": ir.nDCG(gains={0: 0, 1: 1, 2: 3, 3: 7}) @ 10,
        "recall@10": ir.R(rel=2) @ 10,
        "mrr@10": ir.RR(rel=2) @ 10,
    }
    for name, measure in asked.items():
        theirs = {r.query_id: r.value for r in ir.iter_calc([measure], read, found)}
        assert "lost" in theirs and len(theirs) == len(qrels)
        assert table[name] == pytest.approx(
            np.mean([theirs[q] for q in qrels if q not in left_out[name]]), abs=1e-9
        ), name
    assert (table["n"], table["n_relevant"]) == (len(qrels), len(qrels) - 2)


def test_trec_run_round_trip(tmp_path: Path) -> None:
    run, _ = random_case(1)
    m.write_trec_run(run, tmp_path / "run.txt")
    assert m.read_trec_run(tmp_path / "run.txt") == run
    # the evaluation's runs are named like its table's rows, and a store names its ids as it likes
    odd = {"q 1": ["a\tb", "c", "50%20off", "%"], "q%201": ["ü\u2003"]}
    m.write_trec_run(odd, tmp_path / "blank.txt", tag="SFT + R-GRPO")
    assert all(len(line.split()) == 6 for line in (tmp_path / "blank.txt").open(encoding="utf-8"))
    assert m.read_trec_run(tmp_path / "blank.txt") == odd
    m.write_trec_qrels({"q 1": {"a\tb": 4}}, tmp_path / "qrels.txt")
    assert (tmp_path / "qrels.txt").read_text() == "q%201 0 a%09b 3\n"
    (tmp_path / "bad.txt").write_text("q Q0 d 1\n")
    with pytest.raises(DataContractError, match="line 1"):
        m.read_trec_run(tmp_path / "bad.txt")


def test_bm25_finds_rare_terms_first_and_never_strangers() -> None:
    products = [Product("1", "red shoe"), Product("2", "red hat"), Product("3", "zebra mask")]
    found = Bm25(products).search(
        [Query("a", "red zebras"), Query("b", "hats"), Query("c", "the"), Query("d", "piano")], 10
    )
    assert found["a"][0] == "3"
    assert set(found["a"]) == {"1", "2", "3"}
    assert found["b"] == ["2"]
    assert found["c"] == found["d"] == []


def test_random_run_is_seeded_and_has_no_repeats() -> None:
    queries = [Query(f"q{i}", "x") for i in range(5)]
    ids = [str(i) for i in range(30)]
    run = random_run(queries, ids, 10, seed=4)
    assert run == random_run(queries, ids, 10, seed=4)
    assert all(len(set(r)) == 10 for r in run.values())
    assert len({tuple(r) for r in run.values()}) > 1
