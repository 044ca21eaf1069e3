"""The encoder and contrastive SFT, on a tiny random encoder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from models.embedder.config import ContrastiveConfig, EncoderConfig
from models.embedder.contrastive import (
    ContrastiveLoss,
    PairCollator,
    contrastive_loss,
    train_contrastive,
)
from models.embedder.encoder import encode, load_encoder, prepare_encoder
from models.embedder.pairs import (
    Copies,
    PositivePair,
    known_positives,
    masked_columns,
    positive_pairs,
)
from models.embedder.tiny import build_tiny_encoder
from models.errors import ConfigError, DataContractError, DivergenceError, WeightsError
from models.lm.tiny import build_tiny_lm
from models.metrics import ListSink
from models.objectives.infonce import infonce
from models.schemas import TABLES
from models.store import Store
from models.types import Product

WORDS = {"sofa": "couch", "lamp": "light", "rug": "carpet", "mug": "cup", "hat": "cap"}
COLOURS = ("red", "blue", "green", "grey")


@pytest.fixture(scope="module")
def store() -> Store:
    """Queries use one word, products its synonym: nothing is shared but the colour."""
    products = [
        {"product_id": f"{c}-{w}", "title": f"{c} {s} item"}
        for w, s in WORDS.items()
        for c in COLOURS
    ]
    queries = [
        {"query_id": f"q-{c}-{w}", "text": f"{c} {w}", "split": "test" if c == "grey" else "train"}
        for w in WORDS
        for c in COLOURS
    ]
    judgments = [
        {"query_id": q["query_id"], "product_id": p["product_id"], "grade": grade(q, p)}
        for q in queries
        for p in products
    ]
    events = [("q-red-sofa", "red-lamp", "cart"), ("q-red-sofa", "blue-sofa", "click")]
    interactions = [{"query_id": q, "product_id": p, "event": e} for q, p, e in events]
    tables = {"products": products, "queries": queries, "judgments": judgments}
    tables["interactions"] = interactions
    return Store(
        **{n: pa.Table.from_pylist(rows, schema=TABLES[n]) for n, rows in tables.items()}, notes={}
    )


def grade(query: dict[str, Any], product: dict[str, Any]) -> int:
    colour, word = query["query_id"].removeprefix("q-").split("-")
    same_word = product["product_id"].endswith(word)
    return 1 + 2 * same_word + (same_word and product["product_id"].startswith(colour))


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = [f"{c} {w} {s} item" for w, s in WORDS.items() for c in COLOURS]
    return build_tiny_encoder(tmp_path_factory.mktemp("encoder"), corpus, seed=1)


def test_the_tiny_encoder_is_reproducible(encoder_dir: Path, tmp_path: Path) -> None:
    corpus = [f"{c} {w} {s} item" for w, s in WORDS.items() for c in COLOURS]
    twin = build_tiny_encoder(tmp_path / "twin", corpus, seed=1)
    other = build_tiny_encoder(tmp_path / "other", corpus, seed=2)
    texts = ["red sofa", "a"]
    vectors = [encode(load_encoder(str(d)), texts) for d in (encoder_dir, twin, other)]
    assert (vectors[0] == vectors[1]).all()
    assert not np.allclose(vectors[0], vectors[2])


def test_encode_keeps_order_and_unit_length(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    texts = ["red sofa", "x", "a much longer text about a green carpet item", "mug"]
    vectors = encode(encoder, texts, batch_size=2)
    alone = np.concatenate([encode(encoder, [t]) for t in texts])
    assert np.allclose(vectors, alone, atol=1e-5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert encode(encoder, []).shape == (0, 32)


def test_bf16_stays_close(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    full, half = (encode(encoder, ["red sofa", "blue cup"], bf16=b) for b in (False, True))
    assert (full * half).sum(1).min() > 0.999


def test_prompts_of_the_model_are_used(encoder_dir: Path) -> None:
    encoder = load_encoder(str(encoder_dir))
    plain = encode(encoder, ["red sofa"], prompt="query")
    encoder.prompts["query"] = "blue cup: "
    assert not np.allclose(plain, encode(encoder, ["red sofa"], prompt="query"), atol=1e-3)
    assert np.allclose(plain, encode(encoder, ["red sofa"], prompt="document"), atol=1e-6)


def test_missing_and_pickled_weights_are_refused(encoder_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="do this"):
        load_encoder(str(tmp_path / "nothing"))
    pickled = tmp_path / "pickled"
    shutil.copytree(encoder_dir, pickled)
    weights = load_encoder(str(encoder_dir))[0].auto_model.state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(WeightsError):
        load_encoder(str(pickled))


def test_positives_come_from_the_train_split_only(store: Store) -> None:
    pairs = positive_pairs(store, ContrastiveConfig(min_grade=4))
    assert len(pairs) == 5 * 3, "one excellent product a query, three train colours"
    assert not any("grey" in p.query_id for p in pairs)
    assert {p.weight for p in pairs} == {1.0}


def test_grades_weigh_and_judged_pairs_overrule_events(store: Store) -> None:
    pairs = {
        (p.query_id, p.product_id): p.weight
        for p in positive_pairs(store, ContrastiveConfig(min_grade=3))
    }
    assert pairs["q-red-sofa", "red-sofa"] == pytest.approx(1.0)
    assert pairs["q-red-sofa", "blue-sofa"] == pytest.approx(2 / 3)
    assert ("q-red-sofa", "red-lamp") not in pairs, "judged grade 1: a cart does not overrule it"


def test_unjudged_carts_are_positives(store: Store) -> None:
    keep = [row for row in store.judgments.to_pylist() if row["product_id"] != "red-lamp"]
    bare = Store(
        store.products,
        store.queries,
        pa.Table.from_pylist(keep, schema=TABLES["judgments"]),
        store.interactions,
        {},
    )
    found = {(p.query_id, p.product_id) for p in positive_pairs(bare, ContrastiveConfig())}
    assert ("q-red-sofa", "red-lamp") in found
    without = positive_pairs(bare, ContrastiveConfig(interactions=False))
    assert ("q-red-sofa", "red-lamp") not in {(p.query_id, p.product_id) for p in without}


def test_events_weigh_as_told_and_the_heaviest_of_a_pair_counts(store: Store) -> None:
    events = [("red-lamp", "purchase"), ("red-lamp", "click"), ("blue-lamp", "click")]
    events += [("blue-lamp", "cart"), ("green-lamp", "click"), ("red-sofa", "click")]
    log = [{"query_id": "q-red-sofa", "product_id": p, "event": e} for p, e in events * 2]
    lamps = {f"{colour}-lamp" for colour in COLOURS}
    keep = [row for row in store.judgments.to_pylist() if row["product_id"] not in lamps]
    bare = Store(
        store.products,
        store.queries,
        pa.Table.from_pylist(keep, schema=TABLES["judgments"]),
        pa.Table.from_pylist(log, schema=TABLES["interactions"]),
        {},
    )

    def lamp_weights(interactions: Any) -> dict[str, float]:
        config = ContrastiveConfig(interactions=interactions)
        found = {p.product_id: p.weight for p in positive_pairs(bare, config)}
        assert found["red-sofa"] == 1.0, "judged: a click does not lower it"
        return {p: w for p, w in found.items() if p in lamps}

    assert lamp_weights(True) == {"red-lamp": 1.0, "blue-lamp": 1.0}
    graded = {"click": 0.2, "cart": 0.6, "purchase": 1.0}
    assert lamp_weights(graded) == {"red-lamp": 1.0, "blue-lamp": 0.6, "green-lamp": 0.2}
    assert lamp_weights({"purchase": 2.0}) == {"red-lamp": 2.0}
    assert lamp_weights({}) == lamp_weights(False) == {}


def test_no_positives_is_one_clear_error(store: Store) -> None:
    with pytest.raises(DataContractError, match="min_grade"):
        positive_pairs(store, ContrastiveConfig(), split="validation")


def test_collator_draws_and_masks(store: Store, encoder_dir: Path) -> None:
    config = ContrastiveConfig(global_negatives=20, seed=3)
    pairs = positive_pairs(store, config)
    collator = PairCollator(load_encoder(str(encoder_dir)), store, pairs, config)
    rows = [{"row": 0}, {"row": 1}, {"row": 7}]
    batch = collator(rows)
    assert batch["negative_input_ids"].shape[0] == 20
    masked = batch["label"]["masked"]
    assert masked.shape == (3, 3 + 20)
    assert masked[:, 3:].sum(1).tolist() == [4, 4, 4], "the whole catalogue: 4 of grade >= 3 each"
    assert not masked.diagonal().any()
    again = collator(rows)
    assert (again["negative_input_ids"] == batch["negative_input_ids"]).all()
    config = config.model_copy(update={"mask_false_negatives": False})
    assert not PairCollator(collator.encoder, store, pairs, config)(rows)["label"]["masked"].any()
    other = PairCollator(collator.encoder, store, pairs, config.model_copy(update={"seed": 4}))
    assert other._draw([0, 1, 7]) != collator._draw([0, 1, 7])


def bought(store: Store, query_id: str, *products: str) -> Store:
    """The store without judgments of a query, and with purchases instead."""
    rows = [{"query_id": query_id, "product_id": p, "event": "purchase"} for p in products]
    kept = store.judgments.filter(pc.not_equal(store.judgments["query_id"], query_id))
    events = pa.Table.from_pylist(rows, schema=TABLES["interactions"])
    return replace(store, judgments=kept, interactions=events)


def test_a_positive_that_is_not_trained_on_is_no_negative(store: Store, encoder_dir: Path) -> None:
    store = bought(store, "q-red-hat", "red-hat", "blue-hat", "green-mug")
    config = ContrastiveConfig(global_negatives=20, max_pairs=2, seed=3)
    pairs = [PositivePair("q-red-hat", "red-hat", 1.0), PositivePair("q-red-mug", "red-mug", 1.0)]
    collator = PairCollator(load_encoder(str(encoder_dir)), store, pairs, config)
    masked = collator([{"row": 0}, {"row": 1}])["label"]["masked"]
    assert masked[:, 2:].sum(1).tolist() == [3, 4], "all its purchases; the other's four grades"


def test_queries_of_one_text_share_their_positives(store: Store) -> None:
    twin = store.queries.slice(0, 1).to_pylist()[0] | {"query_id": "twin"}
    twin["text"] = f" {twin['text'].upper()}"
    more = pa.Table.from_pylist([twin], schema=TABLES["queries"])
    both = replace(store, queries=pa.concat_tables([store.queries, more]))
    both = bought(both, "twin", "blue-rug")
    first = both.queries["query_id"][0].as_py()
    known = known_positives(both, positive_pairs(both, ContrastiveConfig()))
    assert known[first] == known["twin"] > {"blue-rug"} and len(known["twin"]) == 5


def gradients(
    encoder_dir: Path, store: Store, chunk: int | None, train: bool
) -> list[torch.Tensor]:
    encoder = load_encoder(str(encoder_dir)).train(train)
    config = ContrastiveConfig(global_negatives=8)
    columns, labels = batch_columns(encoder, store, config)
    torch.manual_seed(0)
    ContrastiveLoss(encoder, 0.05, chunk)(columns, labels).backward()
    return [p.grad for p in encoder.parameters() if p.grad is not None]


def test_cached_gradients_equal_the_full_batch(encoder_dir: Path, store: Store) -> None:
    """Trap: cached contrastive losses once had silently wrong gradients."""
    full = gradients(encoder_dir, store, None, train=False)
    cached = gradients(encoder_dir, store, 2, train=False)
    assert len(full) == len(cached) > 0
    for a, b in zip(full, cached, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_cached_gradients_replay_dropout(encoder_dir: Path, store: Store) -> None:
    one_chunk = gradients(encoder_dir, store, 100, train=True)
    full = gradients(encoder_dir, store, None, train=True)
    for a, b in zip(full, one_chunk, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_products_of_one_text_are_one_product() -> None:
    """A listing twice in the catalogue is no negative of itself, nor of what its twin answers."""
    titles = {"a": "red sofa", "twin": "red sofa", "b": "blue lamp", "c": "rug", "c2": "rug"}
    copies = Copies({i: Product(i, title) for i, title in titles.items()})
    pairs = [PositivePair("q", "a", 1.0), PositivePair("r", "b", 1.0), PositivePair("s", "twin", 1)]
    masked = masked_columns(pairs, {"q": {"a", "c"}, "r": {"b"}}, copies, ["twin", "c2", "b"])
    assert masked.int().tolist() == [
        [0, 0, 1, 1, 1, 0],  # its twins, and the copy of c
        [0, 0, 0, 0, 0, 1],
        [1, 0, 0, 1, 0, 0],
    ]


def batch_columns(
    encoder: Any, store: Store, config: ContrastiveConfig
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Features by column and labels of one batch of six pairs."""
    batch = PairCollator(encoder, store, positive_pairs(store, config), config)(
        [{"row": i} for i in range(6)]
    )
    columns = [
        {k.removeprefix(f"{c}_"): v for k, v in batch.items() if k.startswith(f"{c}_")}
        for c in ("query", "positive", "negative")
    ]
    return columns, batch["label"]


@pytest.mark.parametrize("chunk", [None, 2])
def test_matryoshka_is_the_mean_over_widths(
    encoder_dir: Path, store: Store, chunk: int | None
) -> None:
    encoder = load_encoder(str(encoder_dir))
    config = ContrastiveConfig(global_negatives=8, matryoshka_dims=(32, 8), chunk=chunk)
    columns, labels = batch_columns(encoder, store, config)
    got = contrastive_loss(encoder, config)([dict(c) for c in columns], labels)
    got.backward()
    gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad(set_to_none=True)
    q, pos, neg = (encoder(dict(c))["sentence_embedding"] for c in columns)
    widths = [
        infonce(q[:, :d], pos[:, :d], neg[:, :d], config.tau, labels["masked"], labels["weight"])
        for d in (32, 8)
    ]
    expected = (widths[0] + widths[1]) / 2
    expected.backward()
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    wanted = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert len(gradients) == len(wanted) > 0
    for a, b in zip(gradients, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_width_beyond_the_encoder_is_refused(encoder_dir: Path) -> None:
    with pytest.raises(ConfigError, match="matryoshka_dims"):
        contrastive_loss(load_encoder(str(encoder_dir)), ContrastiveConfig(matryoshka_dims=(64,)))


def test_weights_kept_in_bf16_are_trained_in_float32(encoder_dir: Path, tmp_path: Path) -> None:
    """A step of AdamW is smaller than what bf16 can tell from nothing."""
    load_encoder(str(encoder_dir)).to(torch.bfloat16).save_pretrained(str(tmp_path))
    kept = {v.dtype for v in load_file(next(tmp_path.rglob("model.safetensors"))).values()}
    assert kept == {torch.bfloat16}
    loaded = load_encoder(str(tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    body = tmp_path / "body"
    loaded[0].auto_model.to(torch.bfloat16).save_pretrained(body)
    loaded.tokenizer.save_pretrained(body)
    prepare_encoder(str(body), EncoderConfig(), tmp_path / "prepared")
    made = load_file(next((tmp_path / "prepared").rglob("model.safetensors")))
    assert {v.dtype for v in made.values()} == {torch.float32}


@pytest.mark.parametrize("end", ["<|im_end|>", None])
def test_a_decoder_without_a_padding_token_pads_with_its_end_token(
    tmp_path: Path, end: str | None
) -> None:
    build_tiny_lm(tmp_path / "lm", ["red sofa", "a lamp"], seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    tokenizer.pad_token, tokenizer.eos_token = None, end
    tokenizer.save_pretrained(tmp_path / "lm")
    made = EncoderConfig(pooling="lasttoken")
    if end is None:
        with pytest.raises(WeightsError, match="no padding and no end token"):
            prepare_encoder(str(tmp_path / "lm"), made, tmp_path / "encoder")
        return
    prepare_encoder(str(tmp_path / "lm"), made, tmp_path / "encoder")
    encoder = load_encoder(str(tmp_path / "encoder"))
    texts = ["red sofa", "a red lamp a lamp a lamp"]
    alone = np.concatenate([encode(encoder, [text]) for text in texts])
    assert np.allclose(encode(encoder, texts), alone, atol=1e-5)


def test_a_decoder_with_last_token_pooling_and_instruction_learns(
    store: Store, tmp_path: Path
) -> None:
    """A plain causal language model becomes an encoder: its last token, and a query prompt."""
    corpus = [f"{c} {w} {s} item" for w, s in WORDS.items() for c in COLOURS]
    build_tiny_lm(tmp_path / "lm", corpus, seed=1)
    made = EncoderConfig(pooling="lasttoken", query_prompt="Find products: ")
    prepare_encoder(str(tmp_path / "lm"), made, tmp_path / "encoder")
    encoder = load_encoder(str(tmp_path / "encoder"))
    texts = ["red sofa", "a much longer text about a green carpet item"]
    with torch.no_grad():
        alone = encoder[0].auto_model(**encoder.tokenizer(texts[0], return_tensors="pt"))
    last = torch.nn.functional.normalize(alone.last_hidden_state[0, -1], dim=0).numpy()
    assert np.allclose(encode(encoder, texts)[0], last, atol=1e-5), "padding must not matter"
    asked = encode(encoder, texts[:1], prompt="query")
    assert np.allclose(asked, encode(encoder, ["Find products: red sofa"]), atol=1e-5)
    assert not np.allclose(asked[0], last, atol=1e-3)
    sink = ListSink()
    train_contrastive(
        str(tmp_path / "encoder"), store, FAST, tmp_path / "out", tmp_path / "scratch", sink
    )
    losses = sink.series("embedder/contrastive/loss")
    assert losses[-1] < 0.8 * losses[0]
    assert load_encoder(str(tmp_path / "out")).prompts["query"] == "Find products: "


def test_equal_to_the_loss_of_sentence_transformers(encoder_dir: Path) -> None:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    encoder = load_encoder(str(encoder_dir))
    columns = [encoder.preprocess(t) for t in (["red sofa", "mug"], ["red couch", "grey cup"])]
    theirs = MultipleNegativesRankingLoss(encoder, scale=20.0)([dict(c) for c in columns], None)
    ours = ContrastiveLoss(encoder, tau=0.05)([dict(c) for c in columns], None)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


FAST = ContrastiveConfig(
    steps=24, batch_size=8, global_negatives=4, lr=3e-3, bf16=False, save_every=8, seed=5
)


def test_training_learns_synonyms_of_unseen_queries(
    store: Store, encoder_dir: Path, tmp_path: Path
) -> None:
    sink = ListSink()
    config = FAST.model_copy(update={"steps": 60})
    numbers = train_contrastive(
        str(encoder_dir), store, config, tmp_path / "out", tmp_path / "scratch", sink
    )
    assert numbers["steps"] == 60 and numbers["pairs"] == 15
    losses = sink.series("embedder/contrastive/loss")
    assert losses[-1] < 0.5 * losses[0]
    assert top1(tmp_path / "out", store) >= top1(encoder_dir, store) + 0.4
    assert not list((tmp_path / "out").glob("**/*.bin"))


@pytest.mark.parametrize(("steps", "steps_taken"), [(None, 2 * (15 // 8) + 3), (4, 7)])
def test_extra_steps_come_on_top_of_epochs_or_steps(
    store: Store, encoder_dir: Path, tmp_path: Path, steps: int | None, steps_taken: int
) -> None:
    config = FAST.model_copy(update={"steps": steps, "epochs": 2, "extra_steps": 3})
    numbers = train_contrastive(
        str(encoder_dir), store, config, tmp_path / "out", tmp_path / "s", ListSink()
    )
    assert numbers["steps"] == steps_taken


def top1(folder: Path, store: Store) -> float:
    """Share of test queries ("grey ...") whose first product is of the asked kind."""
    encoder = load_encoder(str(folder))
    ids, titles = (store.products[c].to_pylist() for c in ("product_id", "title"))
    queries = store.query_ids("test")
    texts = [store.query_by_id[q].text for q in queries]
    best = (encode(encoder, texts, prompt="query") @ encode(encoder, titles).T).argmax(1)
    return float(
        np.mean(
            [ids[b].split("-")[1] == q.split("-")[2] for b, q in zip(best, queries, strict=True)]
        )
    )


@pytest.mark.parametrize("where", ["loss", "weights"])
def test_a_run_that_diverges_saves_no_encoder(
    store: Store,
    encoder_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """A loss that is not finite is seen; so are weights that went after the last logged step."""
    config = FAST.model_copy(update={"steps": 4})
    original = ContrastiveLoss.forward
    calls = 0

    def lost(self: ContrastiveLoss, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(self, *args)
        if where == "loss" and calls == 2:
            return loss * float("nan")
        if where == "weights" and calls == 4:
            next(self.model.parameters()).data[:] = float("inf")
        return loss

    monkeypatch.setattr(ContrastiveLoss, "forward", lost)
    out, scratch = tmp_path / "out", tmp_path / "s"
    with pytest.raises(DivergenceError, match=f"{where}.*not finite|{where} nan at step 2"):
        train_contrastive(str(encoder_dir), store, config, out, scratch, ListSink())
    assert not out.exists()


def test_resumed_equals_straight(
    store: Store, encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, scratch: str) -> None:
        train_contrastive(
            str(encoder_dir), store, FAST, tmp_path / name, tmp_path / scratch, ListSink()
        )

    train("straight", "a")
    calls = 0
    original = ContrastiveLoss.forward

    def dies_at_step_20(self: ContrastiveLoss, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(ContrastiveLoss, "forward", dies_at_step_20)
    with pytest.raises(KeyboardInterrupt):
        train("resumed", "b")
    assert not (tmp_path / "resumed").exists()
    monkeypatch.setattr(ContrastiveLoss, "forward", original)
    train("resumed", "b")
    texts = ["red sofa", "blue cup"]
    straight, resumed = (
        encode(load_encoder(str(tmp_path / n)), texts) for n in ("straight", "resumed")
    )
    assert np.allclose(straight, resumed, atol=1e-6)
    assert not np.allclose(straight, encode(load_encoder(str(encoder_dir)), texts), atol=1e-2)


@pytest.mark.parametrize("state", [None, ""])
def test_a_half_written_checkpoint_is_passed_over(
    store: Store, encoder_dir: Path, tmp_path: Path, state: str | None
) -> None:
    """A kill or a full disk while checkpoint 24 was being written; 8 and 16 are whole."""
    config, scratch = FAST.model_copy(update={"steps": 20}), tmp_path / "scratch"

    def train(name: str, where: Path) -> np.ndarray:
        train_contrastive(str(encoder_dir), store, config, tmp_path / name, where, ListSink())
        return encode(load_encoder(str(tmp_path / name)), ["red sofa", "blue cup"])

    straight = train("straight", scratch)
    half = scratch / "checkpoint-24"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"cut")
    if state is not None:
        (half / "trainer_state.json").write_text(state)
    assert np.allclose(straight, train("resumed", scratch), atol=1e-6)
