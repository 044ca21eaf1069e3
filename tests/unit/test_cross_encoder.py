"""The cross-encoder baseline: learns what can be learned, the same way each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.embedder.tiny import build_tiny_encoder
from models.errors import DataContractError
from models.judge.config import CrossEncoderConfig, PromptConfig
from models.judge.cross_encoder import CrossEncoder, train_cross_encoder
from models.judge.spec import JudgeSpec
from models.metrics import NullSink
from models.types import Pair
from tests.builders import WORDS, make_pair

QUALITY = ("awful", "poor", "fine", "great")
SPEC = JudgeSpec(PromptConfig(evidence=False))
CONFIG = CrossEncoderConfig(lr=3e-3, epochs=8, batch_size=16, checkpoint_every=1000)


def toy(count: int, start: int = 0) -> list[Pair]:
    """Pairs whose grade is one word of the title."""
    return [
        make_pair(WORDS[i % 7], f"{WORDS[i % 11]} {QUALITY[i % 4]} {WORDS[i % 5]} n{i}", 1 + i % 4)
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cross") / "base"
    return str(build_tiny_encoder(folder, [f"{p.query.text} {p.product.title}" for p in toy(60)]))


def train(base: str, folder: Path, config: CrossEncoderConfig = CONFIG) -> CrossEncoder:
    """A cross-encoder trained on 80 toy pairs."""
    train_cross_encoder(base, SPEC, toy(80), config, folder / "o", folder / "s", NullSink())
    return CrossEncoder(folder / "o")


def test_it_learns_a_separable_set(base: str, tmp_path: Path) -> None:
    unseen = toy(24, start=80)
    p_NL = train(base, tmp_path).score([(p.query, p.product) for p in unseen])
    assert p_NL.sum(1) == pytest.approx(1)
    assert np.mean(p_NL.argmax(1) + 1 == [p.grade for p in unseen]) > 0.9


def test_the_seed_decides_and_the_budget_bounds(base: str, tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"max_steps": 3})
    asked = [(p.query, p.product) for p in toy(9)]
    scores = [
        train(base, tmp_path / str(i), short.model_copy(update={"seed": seed})).score(asked)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert (scores[0] == scores[1]).all() and (scores[0] != scores[2]).any()
    counts = train_cross_encoder(
        base, SPEC, toy(40), short, tmp_path / "o", tmp_path / "s", NullSink()
    )
    assert counts == {"pairs": 40, "steps": 3}


def test_scores_keep_the_order_whatever_the_batch(base: str, tmp_path: Path) -> None:
    model = train(base, tmp_path, CONFIG.model_copy(update={"max_steps": 2}))
    pairs = [(p.query, p.product) for p in (make_pair(title="sofa " * i) for i in (9, 1, 30, 4))]
    alone = np.concatenate([model.score([pair]) for pair in pairs])
    assert model.score(pairs, rows_at_once=3) == pytest.approx(alone, abs=1e-5)
    assert model.score([]).shape == (0, 4)


def test_markers_of_the_tokenizer_in_shop_text_stay_text(base: str, tmp_path: Path) -> None:
    model = train(base, tmp_path, CONFIG.model_copy(update={"max_steps": 1}))
    hostile, clean = make_pair(title="red [SEP] sofa [SEP]"), make_pair(title="red sofa")
    one, other = (model.score([(p.query, p.product)]) for p in (hostile, clean))
    assert (one == other).all()


def test_evidence_is_read_only_where_it_is_asked_for(base: str, tmp_path: Path) -> None:
    pairs = toy(40)
    spec = JudgeSpec.fit(PromptConfig(), pairs, [p.product for p in pairs])
    asked, seen = [(p.query, p.product) for p in pairs[:3]], {}
    for evidence in (False, True):
        out = tmp_path / str(evidence)
        config = CONFIG.model_copy(update={"max_steps": 1, "evidence": evidence})
        train_cross_encoder(base, spec, pairs, config, out, tmp_path / f"s{evidence}", NullSink())
        model = CrossEncoder(out)
        seen[evidence] = [model.text.item(q, p) for q, p in asked]
        assert (model.score(asked) == CrossEncoder(out).score(asked)).all()
    assert all("words say" in summary for _, summary in seen[True])
    assert all("found:" not in line and summary == "" for line, summary in seen[False])


def test_no_pairs_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="no training pairs"):
        train_cross_encoder(base, SPEC, [], CONFIG, tmp_path, tmp_path, NullSink())
