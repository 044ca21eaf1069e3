"""Mining says what it mines; the losses on hard negatives as arithmetic; both stages learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from models.embedder.config import HardNegativeConfig, MiningConfig
from models.embedder.encoder import encode_products, load_encoder
from models.embedder.hard_negatives import (
    HardNegativeCollator,
    HardNegativeLoss,
    train_on_hard_negatives,
)
from models.embedder.mining import HardNegative, mine, read_negatives, write_negatives
from models.embedder.pairs import PositivePair
from models.embedder.tiny import build_tiny_encoder
from models.errors import DataContractError
from models.index.exact import ExactIndex
from models.metrics import ListSink
from models.objectives.infonce import infonce
from models.objectives.ranking import hard_infonce, margin_ranking, similarity_dpo
from models.rewards.relevance import JudgeRelevance, ScoreCache
from models.schemas import TABLES
from models.store import Store
from models.types import Product, Query

KINDS = ("sofa", "lamp", "rug", "mug")
MAKERS = ("acme", "zed", "bolt", "fern")


class KindJudge:
    """Good for the asked kind, poor for any other."""

    def score(self, pairs: Sequence[tuple[Query, Product]]) -> list[list[float]]:
        right = [q.text.split()[0] in p.title for q, p in pairs]
        return [[0.0, 0.1, 0.2, 0.7] if r else [0.8, 0.1, 0.1, 0.0] for r in right]


@pytest.fixture(scope="module")
def store() -> Store:
    """Every query has one judged good product and one judged poor one; the rest is unjudged."""
    products = [{"product_id": f"{m}-{k}", "title": f"{m} {k}"} for m in MAKERS for k in KINDS]
    queries = [
        {"query_id": f"q-{k}", "text": f"{k} acme", "split": "test" if k == "mug" else "train"}
        for k in KINDS
    ]
    judgments = [
        {"query_id": f"q-{k}", "product_id": f"{m}-{kind}", "grade": grade}
        for i, k in enumerate(KINDS)
        for m, kind, grade in (("acme", k, 4), ("acme", KINDS[i - 1], 1))
    ]
    rows = {"products": products, "queries": queries, "judgments": judgments, "interactions": []}
    tables = {n: pa.Table.from_pylist(r, schema=TABLES[n]) for n, r in rows.items()}
    return Store(**tables, notes={})


@pytest.fixture(scope="module")
def encoder_dir(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = store.products["title"].to_pylist() + store.queries["text"].to_pylist()
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"), corpus, seed=1)


def mined(
    store: Store, encoder_dir: Path, **settings: float
) -> tuple[list[HardNegative], dict[str, float], JudgeRelevance]:
    encoder = load_encoder(str(encoder_dir))
    products = list(store.product_by_id.values())
    index = ExactIndex([p.product_id for p in products], encode_products(encoder, products))
    relevance = JudgeRelevance(KindJudge(), ScoreCache(":memory:", "v1"))
    config = MiningConfig(**{"depth": 16, "per_query": 3} | settings)
    return (*mine(encoder, index, store, relevance, config), relevance)


def test_mined_products_are_near_and_poor_and_no_known_positive(
    store: Store, encoder_dir: Path
) -> None:
    found, counts, relevance = mined(store, encoder_dir)
    assert {n.query_id for n in found} == {"q-sofa", "q-lamp", "q-rug"}, "train queries alone"
    for query_id in ("q-sofa", "q-lamp", "q-rug"):
        own = [n for n in found if n.query_id == query_id]
        kind = query_id.removeprefix("q-")
        assert len(own) == 3 and not any(n.product_id.endswith(kind) for n in own)
        assert [n.rank for n in own] == sorted(n.rank for n in own)
        assert [n.similarity for n in own] == sorted((n.similarity for n in own), reverse=True)
        assert all(n.good == pytest.approx(0.1) for n in own)
        # nothing nearer was left out but what is good or known
        nearer = set(range(1, own[-1].rank)) - {n.rank for n in own}
        assert len(nearer) <= len(MAKERS), "only the four of the asked kind may lie between"
    assert counts["queries"] == 3 and counts["queries_without"] == 0
    assert counts["candidates"] == 3 * (16 - 1) == relevance.num_pairs == relevance.computed
    assert counts["negatives"] == 9
    assert counts["agreed"] == 1.0 or math.isnan(counts["agreed"])


@pytest.mark.parametrize("events", [True, False])
def test_events_are_positives_where_they_count(
    store: Store, encoder_dir: Path, tmp_path: Path, events: bool
) -> None:
    rows = [{"query_id": "q-sofa", "product_id": "zed-lamp", "event": "cart"}]
    interactions = pa.Table.from_pylist(rows, schema=TABLES["interactions"])
    carts = Store(store.products, store.queries, store.judgments, interactions, {})
    found, _, _ = mined(carts, encoder_dir, per_query=16, interactions=events)
    assert (("q-sofa", "zed-lamp") in {(n.query_id, n.product_id) for n in found}) is not events
    config = FAST.model_copy(update={"steps": 1, "interactions": events})
    negatives = {"q-sofa": ["acme-lamp"], "q-lamp": ["acme-sofa"]}
    folders = (tmp_path / "out", tmp_path / "scratch")
    numbers = train_on_hard_negatives(
        str(encoder_dir), carts, negatives, config, *folders, ListSink()
    )
    assert numbers["pairs"] == 2 + events


def test_a_judge_that_calls_all_good_leaves_nothing(store: Store, encoder_dir: Path) -> None:
    with pytest.raises(DataContractError, match=r"max_good.*depth"):
        mined(store, encoder_dir, max_good=0.05)


def test_negatives_survive_their_file(tmp_path: Path) -> None:
    rows = [("q", "b", 1), ("r", "a\u2028c\x85", 1), ("q", "a", 2)]
    write_negatives([HardNegative(q, p, 0.5, rank, 0.1) for q, p, rank in rows], tmp_path)
    assert read_negatives(tmp_path) == {"q": ["b", "a"], "r": ["a\u2028c\x85"]}


def test_losses_as_arithmetic() -> None:
    pos, neg, tau = torch.tensor([0.6]), torch.tensor([[0.5, 0.1]]), 0.5
    total = sum(math.exp(s / tau) for s in (0.6, 0.5, 0.1))
    assert hard_infonce(pos, neg, tau).item() == pytest.approx(-math.log(math.exp(1.2) / total))
    expected = ((0.2 - 0.6 + 0.5) + 0.0) / 2
    assert margin_ranking(pos, neg, 0.2).item() == pytest.approx(expected, abs=1e-6)
    ref_pos, ref_neg, beta = torch.tensor([0.4]), torch.tensor([[0.5, 0.3]]), 0.3
    margins = [(0.6 - 0.4) - (0.5 - 0.5), (0.6 - 0.4) - (0.1 - 0.3)]
    expected = sum(math.log1p(math.exp(-beta / tau * m)) for m in margins) / 2
    got = similarity_dpo(pos, neg, ref_pos, ref_neg, tau, beta)
    assert got.item() == pytest.approx(expected, abs=1e-6)


NEGATIVES = {"q-sofa": ["acme-lamp", "zed-rug"], "q-lamp": ["acme-sofa"], "q-mug": ["acme-rug"]}
FAST = HardNegativeConfig(
    steps=12, batch_size=2, negatives=2, lr=2e-3, bf16=False, save_every=50, seed=3
)


@pytest.mark.parametrize("width", [None, 4])
@pytest.mark.parametrize("kind", ["infonce", "margin", "dpo"])
def test_the_module_is_the_loss_of_its_texts(
    store: Store, encoder_dir: Path, kind: str, width: int | None
) -> None:
    """At the start: DPO is log 2; the others are computed from the cosines of the texts."""
    encoder = load_encoder(str(encoder_dir))
    encoder.truncate_dim = width
    config = FAST.model_copy(update={"loss": kind, "sft_weight": 0.5})
    pairs = [PositivePair("q-sofa", "acme-sofa", 1.0), PositivePair("q-lamp", "acme-lamp", 1 / 3)]
    collator = HardNegativeCollator(encoder, store, pairs, NEGATIVES, config)
    batch = collator([{"row": 0}, {"row": 1}])
    columns = [
        {k.removeprefix(f"{c}_"): v for k, v in batch.items() if k.startswith(f"{c}_")}
        for c in ("query", "positive", "negative")
    ]
    got = HardNegativeLoss(encoder, config)(columns, batch["label"])
    products = [store.product_by_id[p] for p in ("acme-sofa", "acme-lamp")]
    mined_products = [
        store.product_by_id[p] for p in ("acme-lamp", "zed-rug", "acme-sofa", "acme-sofa")
    ]
    queries = [Product("", store.query_by_id[q].text) for q in ("q-sofa", "q-lamp")]
    q, pos, neg = (
        torch.from_numpy(encode_products(encoder, p)) for p in (queries, products, mined_products)
    )
    pos_B, neg_BH = (q * pos).sum(1), torch.einsum("bd,bhd->bh", q, neg.reshape(2, 2, -1))
    expected = {
        "infonce": hard_infonce(pos_B, neg_BH, config.tau),
        "margin": margin_ranking(pos_B, neg_BH, config.margin),
        "dpo": torch.tensor(math.log(2)),
    }[kind]
    weights = torch.tensor([1.0, 1 / 3])
    expected = expected + 0.5 * infonce(q, pos, tau=config.tau, weight_B=weights)
    assert got.item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["infonce", "dpo"])
def test_training_pushes_the_positive_ahead(
    store: Store, encoder_dir: Path, tmp_path: Path, kind: str
) -> None:
    sink = ListSink()
    config = FAST.model_copy(update={"loss": kind, "sft_weight": 0.0, "dim": 16})
    numbers = train_on_hard_negatives(
        str(encoder_dir), store, NEGATIVES, config, tmp_path / "out", tmp_path / "s", sink
    )
    assert numbers["pairs"] == 2 and numbers["steps"] == 12, "the test query's negatives are unused"
    losses = sink.series(f"embedder/{kind}/loss")
    assert losses[-1] < losses[0]

    def margin(folder: Path) -> float:
        encoder = load_encoder(str(folder))
        texts = [
            Product("", "sofa acme"),
            *(store.product_by_id[p] for p in ("acme-sofa", "acme-lamp")),
        ]
        q, good, bad = encode_products(encoder, texts)
        return float(q @ good - q @ bad)

    assert margin(tmp_path / "out") > margin(encoder_dir) + 0.02
    written, start = load_encoder(str(tmp_path / "out")), load_encoder(str(encoder_dir))
    assert written.get_embedding_dimension() == start.get_embedding_dimension() > 16


def test_queries_without_negatives_are_no_training_data(
    store: Store, encoder_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataContractError, match="hard negatives"):
        train_on_hard_negatives(
            str(encoder_dir), store, {}, FAST, tmp_path / "o", tmp_path / "s", ListSink()
        )


def test_a_positive_of_a_lower_grade_is_no_negative_of_its_query(
    store: Store, encoder_dir: Path, tmp_path: Path
) -> None:
    grades = pa.array([2 if g == 1 else g for g in store.judgments["grade"].to_pylist()], pa.int8())
    at = store.judgments.schema.get_field_index("grade")
    grades = grades.cast(store.judgments.schema.field(at).type)
    lower = replace(store, judgments=store.judgments.set_column(at, "grade", grades))
    config = FAST.model_copy(update={"steps": 1, "min_grade": 2})
    # q-sofa's one negative is its grade 2; of q-lamp's two one is
    negatives = {"q-sofa": ["acme-mug"], "q-lamp": ["acme-sofa", "zed-rug"], "q-rug": ["zed-sofa"]}
    folders = (tmp_path / "out", tmp_path / "scratch")
    numbers = train_on_hard_negatives(
        str(encoder_dir), lower, negatives, config, *folders, ListSink()
    )
    assert numbers["pairs"] == 4, "both positives of q-lamp and of q-rug"


def test_positives_of_a_twin_without_negatives_are_masked(store: Store, encoder_dir: Path) -> None:
    twin = {"query_id": "twin", "text": "SOFA acme", "split": "train"}
    more = pa.Table.from_pylist([twin], schema=TABLES["queries"])
    event = {"query_id": "twin", "product_id": "acme-lamp", "event": "purchase"}
    bought = pa.Table.from_pylist([event], schema=TABLES["interactions"])
    both = replace(store, queries=pa.concat_tables([store.queries, more]), interactions=bought)
    pairs = [PositivePair("q-sofa", "acme-sofa", 1.0), PositivePair("q-lamp", "acme-lamp", 1.0)]
    config = FAST.model_copy(update={"interactions": True})
    collator = HardNegativeCollator(load_encoder(str(encoder_dir)), both, pairs, NEGATIVES, config)
    assert collator([{"row": 0}, {"row": 1}])["label"]["masked"][0].tolist() == [False, True]
