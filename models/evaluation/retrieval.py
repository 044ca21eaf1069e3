"""Retrieval metrics: one function a metric, and the table of runs by segment [TaoSearchEmb s4].

Consumes runs {query_id: product ids, best first} and qrels {query_id: {product_id: grade}} ->
produces one row per run and segment.

Ours, where names differ between houses: Recall@k is averaged over queries; Hitrate@k pools all
(query, relevant product) pairs, so that a query weighs by its relevant products; both count
products of grade >= 3. A query without a relevant product has no recall (NaN, left out of means and
counted in `n_relevant`). Unjudged products are not relevant, and judged@k says how many there were;
condensed_ndcg@k leaves them out of the ranking instead. A product that appears twice in a run
counts once, at its best rank.

These are full-catalogue retrieval numbers; they compare with no re-ranking nDCG.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from models.errors import DataContractError, explain
from models.fusion import reciprocal_rank_fusion
from models.text import product_text, terms
from models.types import RELEVANT_GRADE, Product, Query

NAN = float("nan")
Grades = Mapping[str, int]
Gains = Mapping[int, float]

LINEAR: Gains = {1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0}
"""gain = grade - 1."""
EXPONENTIAL: Gains = {1: 0.0, 2: 1.0, 3: 3.0, 4: 7.0}
"""gain = 2^(grade - 1) - 1."""
ESCI_PAPER: Gains = {1: 0.0, 2: 0.01, 3: 0.1, 4: 1.0}
"""Irrelevant, Complement, Substitute, Exact as the ESCI paper prints them."""
ESCI_CODE: Gains = {1: 0.0, 2: 0.1, 3: 0.01, 4: 1.0}
"""The same as the official code has them: Substitute and Complement swapped."""
GAIN_TABLES: Mapping[str, Gains] = {
    "linear": LINEAR,
    "exponential": EXPONENTIAL,
    "esci_paper": ESCI_PAPER,
    "esci_code": ESCI_CODE,
}


def top(ranking: Sequence[str], k: int) -> list[str]:
    """The first k distinct products.

    >>> top(["a", "b", "a", "c"], 3)
    ['a', 'b', 'c']
    """
    return list(dict.fromkeys(ranking))[:k]


def relevant(grades: Grades, min_grade: int = RELEVANT_GRADE) -> set[str]:
    """Products of grade >= `min_grade`."""
    return {p for p, grade in grades.items() if grade >= min_grade}


def recall(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """|relevant & top k| / |relevant|; NaN without a relevant product.

    >>> recall(["a", "x"], {"a": 4, "b": 3, "c": 1}, 2)
    0.5
    """
    wanted = relevant(grades)
    return len(wanted.intersection(top(ranking, k))) / len(wanted) if wanted else NAN


def hitrate(run: Mapping[str, Sequence[str]], qrels: Mapping[str, Grades], k: int) -> float:
    """Share of all truly relevant (query, product) pairs inside their top k [TaoSearchEmb s4.1].

    NaN when no query has a relevant product.

    >>> hitrate({"q": ["a"], "r": []}, {"q": {"a": 4}, "r": {"b": 4, "c": 3}}, 1) == 1 / 3
    True
    """
    wanted = {q: relevant(grades) for q, grades in qrels.items()}
    total = sum(map(len, wanted.values()))
    found = sum(len(w.intersection(top(run.get(q, ()), k))) for q, w in wanted.items())
    return found / total if total else NAN


def precision(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """|relevant & top k| / k; unjudged products and empty places count as not relevant.

    >>> precision(["a", "x"], {"a": 4}, 2)
    0.5
    """
    return len(relevant(grades).intersection(top(ranking, k))) / k


def mrr(ranking: Sequence[str], grades: Grades, k: int = 10) -> float:
    """1 / rank of the first relevant product in the top k, else 0; NaN without a relevant product.

    >>> mrr(["x", "a"], {"a": 3})
    0.5
    """
    wanted = relevant(grades)
    if not wanted:
        return NAN
    ranks = (rank for rank, p in enumerate(top(ranking, k), start=1) if p in wanted)
    return 1.0 / next(ranks, math.inf)


def ndcg(ranking: Sequence[str], grades: Grades, k: int = 10, gains: Gains = EXPONENTIAL) -> float:
    """DCG@k / IDCG@k, DCG = sum_r gain(grade_r) / log2(r + 1) [Jarvelin 2002].

    IDCG is over **all** judged products of the query, not over the retrieved ones, so that a run
    which finds nothing cannot have a high nDCG. NaN when no judged product has a gain.

    >>> ndcg(["x", "a"], {"a": 4}) == 1 / math.log2(3)
    True
    """
    ideal = sorted((gains[grade] for grade in grades.values()), reverse=True)[:k]
    best = _discounted(ideal)
    if best <= 0:
        return NAN
    return _discounted(gains[grades[p]] if p in grades else 0.0 for p in top(ranking, k)) / best


def condensed(ranking: Sequence[str], grades: Grades) -> list[str]:
    """The judged products of a ranking, in its order: its condensed list [Sakai 2007].

    Where few products are judged, nDCG punishes whatever the labels' own search engine had not
    found. nDCG of the condensed list asks how many of the judged ones are found and in what order,
    as if there were no others.

    >>> condensed(["x", "b", "a"], {"a": 4, "b": 1})
    ['b', 'a']
    """
    return [p for p in ranking if p in grades]


def _discounted(gains: Iterable[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))


def judged(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """Share of the top k that a human judged; NaN for an empty run.

    >>> judged(["a", "x"], {"a": 1}, 2)
    0.5
    """
    found = top(ranking, k)
    return sum(p in grades for p in found) / len(found) if found else NAN


def goodrate(good: Sequence[bool | float], k: int) -> float:
    """Share of k places whose product the judge grades 4 or 3 [TaoSearchEmb s4.1].

    A place without a product is not good, so that a list is no better for being short or empty.

    good: the judge's word on the ranked products, best first; a NaN among them makes it NaN.

    >>> goodrate([True, False, True, True], 2), goodrate([True], 2), goodrate([], 2)
    (0.5, 0.5, 0.0)
    """
    return sum(float(g) for g in good[:k]) / k


def lexical_overlap(query: Query, products: Sequence[Product]) -> float:
    """Mean |terms(q) & terms(d)| / |terms(q)| of the products shown; NaN without products or terms.

    >>> lexical_overlap(Query("q", "red shoe"), [Product("1", "shoe"), Product("2", "hat")])
    0.25
    """
    wanted = set(terms(query.text))
    if not wanted or not products:
        return NAN
    return float(
        np.mean([len(wanted & set(terms(product_text(p)))) / len(wanted) for p in products])
    )


def item_quality(ranking: Sequence[str], quality: Mapping[str, float], k: int) -> float:
    """Mean quality level of the top k; NaN when none of them has one.

    >>> item_quality(["a", "b"], {"a": 1.0, "b": 0.5}, 2)
    0.75
    """
    known = [quality[p] for p in top(ranking, k) if p in quality]
    return float(np.mean(known)) if known else NAN


def channel_overlap(ranking: Sequence[str], other: Sequence[str], k: int) -> float:
    """Share of the top k that another channel (BM25) returns in its own top k [TaoSearchEmb s4.3].

    NaN for an empty run.

    >>> channel_overlap(["a", "b"], ["b", "c"], 2)
    0.5
    """
    found = top(ranking, k)
    return len(set(found).intersection(top(other, k))) / len(found) if found else NAN


JudgeGood = Callable[[Query, Sequence[Product]], Sequence[bool | float]]
"""The judge's word on each product: good (grade 4 or 3), or its probability; one NaN for a query
that was not read, whether products were found for it or not."""


def per_query(
    run: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Grades],
    queries: Mapping[str, Query],
    products: Mapping[str, Product],
    judge_good: JudgeGood | None = None,
    quality: Mapping[str, float] | None = None,
    ks: Sequence[int] = (10, 100),
    gains: Gains = EXPONENTIAL,
    lexical: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[str, float]]:
    """{metric: {query_id: value}} over the queries of `qrels`; a query the run lacks found nothing.

    Metrics: recall@k, judged@k for each k; ndcg@10, mrr@10, precision@10, lexical_overlap@10;
    condensed_ndcg@10, of the run as deep as it is read; goodrate@10 with a judge, quality@10 with
    levels; with the lexical run bm25_overlap@10, and ndcg@10 and recall@k of both fused by
    reciprocal rank, as `hybrid_*`: what the run is worth beside it.
    """
    out: dict[str, dict[str, float]] = {}
    for q, grades in qrels.items():
        ranking = top(run.get(q, ()), max(*ks, 10))
        shown = [products[p] for p in ranking[:10] if p in products]
        values = {f"recall@{k}": recall(ranking, grades, k) for k in ks}
        values |= {f"judged@{k}": judged(ranking, grades, k) for k in ks}
        values["ndcg@10"] = ndcg(ranking, grades, 10, gains)
        values["condensed_ndcg@10"] = ndcg(condensed(ranking, grades), grades, 10, gains)
        values["mrr@10"] = mrr(ranking, grades, 10)
        values["precision@10"] = precision(ranking, grades, 10)
        values["lexical_overlap@10"] = lexical_overlap(queries[q], shown)
        if judge_good is not None:
            values["goodrate@10"] = goodrate(judge_good(queries[q], shown), 10)
        if quality is not None:
            values["quality@10"] = item_quality(ranking, quality, 10)
        if lexical is not None:
            words = top(lexical.get(q, ()), max(*ks, 10))
            values["bm25_overlap@10"] = channel_overlap(ranking, words, 10)
            both = [p for p, _ in reciprocal_rank_fusion([ranking, words], max(*ks, 10))]
            values["hybrid_ndcg@10"] = ndcg(both, grades, 10, gains)
            values |= {f"hybrid_recall@{k}": recall(both, grades, k) for k in ks}
        for name, value in values.items():
            out.setdefault(name, {})[q] = value
    return out


def evaluate_runs(
    runs: Mapping[str, Mapping[str, Sequence[str]]],
    qrels: Mapping[str, Grades],
    queries: Mapping[str, Query],
    products: Mapping[str, Product],
    judge_good: JudgeGood | None = None,
    quality: Mapping[str, float] | None = None,
    ks: Sequence[int] = (10, 100),
    gains: Gains = EXPONENTIAL,
    lexical: str = "bm25",
) -> list[dict[str, float | str]]:
    """The table: one row per run and segment ("all" first), means over queries.

    Args:
        runs: by name, in the order of the table; the one named `lexical`, if there, is the channel
            that bm25_overlap@10 compares with and that `hybrid_*` fuses each run with.

    Returns:
        rows with run, segment, n (queries), n_relevant (queries with a relevant product), hitrate@k
        (pooled), and the means of `per_query`; NaN where nothing could be measured.

    Raises:
        DataContractError: no judged query, or judged queries that are not in `queries`.
    """
    missing = [q for q in qrels if q not in queries]
    if not qrels or missing:
        raise DataContractError(
            explain(
                f"{len(qrels)} judged queries, unknown ones: {missing[:3]}",
                "judged queries that the query table holds",
                "evaluate on a split with judgments, from one store",
            )
        )
    segments = sorted({queries[q].segment for q in qrels})
    rows: list[dict[str, float | str]] = []
    for name, run in runs.items():
        values = per_query(
            run, qrels, queries, products, judge_good, quality, ks, gains, runs.get(lexical)
        )
        for segment in ("all", *segments):
            ids = [q for q in qrels if segment in ("all", queries[q].segment)]
            rows.append({"run": name, "segment": segment, **_means(run, qrels, values, ids, ks)})
    return rows


def _means(
    run: Mapping[str, Sequence[str]],
    qrels: Mapping[str, Grades],
    values: Mapping[str, Mapping[str, float]],
    ids: Sequence[str],
    ks: Sequence[int],
) -> dict[str, float]:
    part = {q: qrels[q] for q in ids}
    row = {"n": float(len(ids)), "n_relevant": float(sum(bool(relevant(g)) for g in part.values()))}
    row |= {f"hitrate@{k}": hitrate(run, part, k) for k in ks}
    for metric, by_query in values.items():
        kept = [by_query[q] for q in ids if not math.isnan(by_query[q])]
        row[metric] = float(np.mean(kept)) if kept else NAN
    return row


def write_trec_run(run: Mapping[str, Sequence[str]], path: Path, tag: str = "relearn") -> None:
    """query Q0 product rank score tag; the score falls with the rank, so tools keep the order.

    The format separates by blanks: those of ids are written as %20 (and % as %25), those of the
    tag as "_".
    """
    tag = "_".join(tag.split())
    with path.open("w", encoding="utf-8") as file:
        for q, ranking in run.items():
            found = top(ranking, len(ranking))
            for rank, product in enumerate(found, start=1):
                score = len(found) - rank + 1
                file.write(f"{_field(q)} Q0 {_field(product)} {rank} {score} {tag}\n")


def write_trec_qrels(qrels: Mapping[str, Grades], path: Path) -> None:
    """query 0 product label; label = grade - 1, so that 0 is not relevant and 2 on is.

    Blanks in ids as in `write_trec_run`.
    """
    with path.open("w", encoding="utf-8") as file:
        for q, grades in qrels.items():
            for product, grade in grades.items():
                file.write(f"{_field(q)} 0 {_field(product)} {grade - 1}\n")


def _field(name: str) -> str:
    return re.sub(r"[\s%]", lambda found: quote(found[0], safe=""), name)


def read_trec_run(path: Path) -> dict[str, list[str]]:
    """What `write_trec_run` and other tools write, ordered by falling score, then rank.

    %20 and the like in ids are read as what they stand for.

    Raises:
        DataContractError: a line without six fields.
    """
    scored: dict[str, list[tuple[float, int, str]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if len(fields) != 6:
            raise DataContractError(
                explain(f"line {number} of {path.name}: {line[:60]!r}", "six fields", "fix the run")
            )
        q, product = unquote(fields[0]), unquote(fields[2])
        scored.setdefault(q, []).append((-float(fields[4]), int(fields[3]), product))
    return {q: [p for _, _, p in sorted(rows)] for q, rows in scored.items()}
