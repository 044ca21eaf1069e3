"""The linear probe: what it fits, where it writes it, and that a reloaded model still has it."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from models.errors import ConfigError, DivergenceError
from models.judge.config import DrawConfig, ProbeConfig, PromptConfig, PromptDraw
from models.judge.cot_sft import draw_examples, draw_prompts, fresh_first
from models.judge.probe import (
    answer_states,
    fit_grade_rows,
    fit_probe,
    response_gram,
    smoothed_targets,
    train_probe,
    untie_head,
)
from models.judge.prompt import PromptEncoder
from models.judge.scoring import ScoringJudge
from models.judge.spec import JudgeSpec
from models.judge.trainer import save_whole
from models.lm.shared_prefix import Segment, SharedPrefixLM
from models.lm.weights import load_lm
from models.teacher.template import write
from models.types import Pair
from tests.builders import WORDS, make_pair, make_pairs, make_tiny_judge

SPEC = JudgeSpec(PromptConfig())


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return make_pairs(40)


@pytest.fixture(scope="module")
def base(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_judge(tmp_path_factory.mktemp("base"), pairs)


def opened(base: str) -> tuple[SharedPrefixLM, PromptEncoder]:
    lm, tokenizer = load_lm(base)
    return SharedPrefixLM(lm), PromptEncoder(tokenizer, SPEC)


def test_the_moved_rows_classify_what_the_probe_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(200) % 4
    centres_LD = 3 * torch.randn(4, 16, generator=generator)
    noise_ND = torch.randn(200, 16, generator=generator)
    states_ND = centres_LD[labels_N] + noise_ND + 5.0
    rows_LD = torch.randn(4, 16, generator=generator)
    config, targets_NL = ProbeConfig(l2=1e-4, quiet=0), torch.eye(4)[labels_N]
    delta_LD, metrics = fit_probe(states_ND, torch.eye(16), targets_NL, rows_LD, config)
    logits_NL = states_ND @ (rows_LD + delta_LD).T
    assert (logits_NL.argmax(1) == labels_N).float().mean() > 0.95
    assert metrics["probe/nll_after"] < 0.2 * metrics["probe/nll_before"]
    assert cross_entropy(logits_NL, labels_N).item() == pytest.approx(
        metrics["probe/nll_after"], abs=1e-4
    )
    assert delta_LD.mean(0).abs().max() < 1e-5


def test_the_moved_rows_keep_quiet_elsewhere() -> None:
    """Grades along axis 0; elsewhere axis 0 is loud and axis 1, as telling, is silent."""
    labels_N = torch.arange(200) % 4
    signal_N = labels_N.float() - 1.5
    states_ND = torch.stack([signal_N, signal_N, torch.ones(200)], dim=1)
    gram_DD = torch.diag(torch.tensor([100.0, 0.0, 0.0]))
    rows_LD = torch.zeros(4, 3)
    targets_NL = torch.eye(4)[labels_N]
    free, _ = fit_probe(states_ND, gram_DD, targets_NL, rows_LD, ProbeConfig(quiet=0))
    held, metrics = fit_probe(states_ND, gram_DD, targets_NL, rows_LD, ProbeConfig(quiet=1))
    assert free[:, 0].abs().max().item() == pytest.approx(free[:, 1].abs().max().item(), rel=0.05)
    assert held[:, 0].abs().max() < 0.01 * held[:, 1].abs().max()
    assert metrics["probe/nll_after"] < 1.0 < metrics["probe/nll_before"]


def test_states_are_in_pair_order_and_those_of_the_plain_forward(
    base: str, pairs: list[Pair]
) -> None:
    model, encoder = opened(base)
    got_ND = answer_states(model, encoder, pairs[:7])
    for row, pair in zip(got_ND, pairs[:7], strict=True):
        want_TD = plain_states(model, sum(encoder.prompt(pair.query, pair.product), ()))
        assert torch.allclose(row, want_TD[-1], atol=1e-4)


def test_elsewhere_is_in_the_response_after_its_grade(base: str, pairs: list[Pair]) -> None:
    """What writes the second token of the teacher's response to its last, and nothing before."""
    model, encoder = opened(base)
    model.train()
    wanted = []
    for pair in pairs[:3]:
        response = encoder.response_segment(write(pair, encoder.config.order))
        path = (*encoder.prompt(pair.query, pair.product), response)
        wanted.append(plain_states(model, sum(path, ()))[-len(response) : -1])
    want_MD = torch.cat(wanted)
    gram_DD = response_gram(model, encoder, pairs[:3])
    assert torch.allclose(gram_DD, want_MD.T @ want_MD / len(want_MD), atol=1e-4)
    assert model.training, "left as it was"


@torch.no_grad()
def plain_states(model: SharedPrefixLM, ids: Segment) -> torch.Tensor:
    """[T, D]: what the output layer reads at every token of one text."""
    return model.lm.model(torch.tensor([ids])).last_hidden_state[0]


def test_only_the_grade_rows_move_and_a_reloaded_model_has_them(
    base: str, pairs: list[Pair], tmp_path: Path
) -> None:
    model, encoder = opened(base)
    before = model.lm.get_input_embeddings().weight.detach().clone()
    fit_grade_rows(model, encoder, pairs, ProbeConfig())
    head = model.lm.get_output_embeddings().weight.detach()
    assert torch.equal(model.lm.get_input_embeddings().weight, before)
    moved = (head != before).any(1).nonzero()[:, 0].tolist()
    assert moved == sorted(encoder.label_ids)
    save_whole(model.lm, encoder.tokenizer, tmp_path / "out")
    SPEC.write(tmp_path / "out")
    asked = [(p.query, p.product) for p in pairs[:5]]
    kept = ScoringJudge.open(str(tmp_path / "out"), SPEC, bf16=False).score(asked)
    assert kept == pytest.approx(ScoringJudge(model, encoder).score(asked), abs=1e-5)


def test_tokens_counted_in_parts_are_those_of_one_call(base: str, pairs: list[Pair]) -> None:
    judge = ScoringJudge(*opened(base))
    asked = [(p.query, p.product) for p in pairs[:9]]
    first = {q.query_id for q, _ in asked[:4]}
    assert judge.num_tokens([]) == judge.num_tokens([], first) == 0
    parts = judge.num_tokens(asked[:4]) + judge.num_tokens(asked[4:], first)
    assert parts == judge.num_tokens(asked)


def test_the_probed_judge_knows_its_pairs_better_than_the_base(
    base: str, pairs: list[Pair]
) -> None:
    def nll(model: SharedPrefixLM, encoder: PromptEncoder) -> float:
        p_NL = torch.tensor(
            ScoringJudge(model, encoder).score([(p.query, p.product) for p in pairs])
        )
        return -p_NL[torch.arange(40), [p.grade - 1 for p in pairs]].log().mean().item()

    model, encoder = opened(base)
    start = nll(model, encoder)
    fit_grade_rows(model, encoder, pairs, ProbeConfig(l2=1e-4, quiet=0))
    assert nll(model, encoder) < 0.8 * start


def test_a_probed_folder_is_a_judge_read_by_its_own_spec(
    base: str, pairs: list[Pair], tmp_path: Path
) -> None:
    """SFT took 24 of 40 pairs: the probe's 32 are the 16 new ones and as few others as must be."""
    drawn = DrawConfig(max_pairs=24, epochs=1, balance=1.0, cot_share=1.0, seed=3)
    config = ProbeConfig(max_pairs=32)
    counts = train_probe(base, SPEC, pairs, drawn, config, tmp_path / "out")
    assert counts["probe/pairs"] == 32 and counts["probe/fresh"] == 16
    assert counts["probe/nll_after"] < counts["probe/nll_before"]
    asked = [(p.query, p.product) for p in pairs]
    p_NL = ScoringJudge.load(tmp_path / "out").score(asked)
    assert abs(p_NL - ScoringJudge(*opened(base)).score(asked)).max() > 0.01
    train_probe(base, SPEC, pairs, drawn, config, tmp_path / "again")
    assert (ScoringJudge.load(tmp_path / "again").score(asked) == p_NL).all()


def test_a_judge_that_thinks_first_has_no_probe(
    base: str, pairs: list[Pair], tmp_path: Path
) -> None:
    spec = JudgeSpec(PromptConfig(order="think_then_respond"))
    drawn = DrawConfig(max_pairs=24, epochs=1, balance=1.0, cot_share=1.0, seed=3)
    with pytest.raises(ConfigError, match=r"set judge\.probe=null"):
        train_probe(base, spec, pairs, drawn, ProbeConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_probe_reads_pairs_that_sft_did_not_train_on_first(pairs: list[Pair]) -> None:
    trained, fresh = pairs[:32], {p.key for p in pairs[32:]}
    few = fresh_first(pairs, trained, 8, 1.0, random.Random(0))
    assert {p.key for p in few} == fresh
    many = fresh_first(pairs, trained, 20, 1.0, random.Random(0))
    assert fresh < {p.key for p in many} and len({p.key for p in many}) == 20


def test_a_grade_that_sft_used_up_is_still_probed(pairs: list[Pair]) -> None:
    """Grades in turn; SFT has taken every pair of grade 2."""
    trained = [p for p in pairs if p.grade == 2]
    probed = fresh_first(pairs, trained, 16, 1.0, random.Random(0))
    assert Counter(p.grade for p in probed) == {1: 4, 2: 4, 3: 4, 4: 4}


def test_what_is_sampled_for_rl_is_new_to_sft_and_differs_by_purpose(pairs: list[Pair]) -> None:
    """All stages have the same seed and draw from the same list."""
    drawn = DrawConfig(max_pairs=20, epochs=1, balance=1.0, cot_share=1.0, seed=0)
    trained = {p.key for p in draw_examples(pairs, drawn, random.Random(0))[0]}
    prompts = PromptDraw(count=8, balance=1.0, seed=0)
    groups = [
        [p.key for p in draw_prompts(pairs, drawn, prompts, purpose)]
        for purpose in ("pass@N", "RL pool")
    ]
    for keys in groups:
        assert len(set(keys)) == 8 and not trained & set(keys)
    assert set(groups[0]) != set(groups[1])
    assert groups[0] == [p.key for p in draw_prompts(pairs, drawn, prompts, "pass@N")]


def test_features_that_are_not_finite_stop_the_run() -> None:
    states_ND = torch.full((8, 3), float("nan"))
    targets_NL = torch.eye(4)[torch.arange(8) % 4]
    with pytest.raises(DivergenceError, match="not finite"):
        fit_probe(states_ND, torch.eye(3), targets_NL, torch.eye(4, 3), ProbeConfig())


def test_targets_are_labels_smoothed_towards_what_words_say() -> None:
    """The more words found, the higher the grade, but for noise: what words say ranks as the
    estimate does, its mean over pairs is the labels', and half of it moves a target halfway."""
    noisy = []
    for i in range(400):
        asked = random.Random(i % 50).sample(WORDS, 3)
        found, noise = i % 4, i % 7 == 0
        noisy.append(
            make_pair(
                " ".join(asked),
                f"{' '.join(asked[:found])} item {i}",
                grade=1 + (found + noise) % 4,
            )
        )
    spec = JudgeSpec.fit(PromptConfig(), noisy, [p.product for p in noisy])
    labels_NL = smoothed_targets(noisy, spec, 0.0)
    says_NL = smoothed_targets(noisy, spec, 1.0)
    assert labels_NL.argmax(1).tolist() == [p.grade - 1 for p in noisy]
    assert labels_NL.max(1).values.min() == 1.0
    assert torch.allclose(says_NL.mean(0), labels_NL.mean(0), atol=1e-3)
    assert torch.allclose(says_NL.sum(1), torch.ones(400).double())
    half_NL = smoothed_targets(noisy, spec, 0.5)
    assert torch.allclose(half_NL, (labels_NL + says_NL) / 2)
    estimates = [spec.evidence(p.query, p.product)[1] for p in noisy]
    low, high = estimates.index(min(estimates)), estimates.index(max(estimates))
    assert says_NL[low, 0] > says_NL[high, 0] and says_NL[low, 3] < says_NL[high, 3]


def test_without_an_estimate_targets_are_the_labels(pairs: list[Pair]) -> None:
    targets_NL = smoothed_targets(pairs, SPEC, 1.0)
    assert targets_NL.argmax(1).tolist() == [p.grade - 1 for p in pairs]
    assert targets_NL.max(1).values.min() == 1.0


def test_untying_twice_changes_nothing(base: str) -> None:
    model, _ = opened(base)
    untie_head(model.lm)
    head = model.lm.get_output_embeddings().weight
    untie_head(model.lm)
    assert model.lm.get_output_embeddings().weight is head
    assert not model.lm.config.tie_word_embeddings
