"""CoT SFT: the teacher's grade and five steps, as next-token prediction [TaoSR1 s3.1].

Consumes labelled pairs and a base LM -> produces a judge that answers `<grade, CoT>`.

Departures from the paper:
1. The grade token, the verdict words and the other step tokens are averaged apart and mixed by
   `grade_share` and `verdict_share`: in a response of 40 tokens a plain mean gives the one token
   that is served 1/40 of the gradient. `grade_share=None` is the plain mean.
2. `cot_share` of the pairs carry the steps, the others the grade alone: more labels in the same
   seconds on a small machine. 1.0 is the paper.
3. Pairs are drawn class-balanced up to `balance`, and batched by query so that prefixes are shared.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from models.errors import ConfigError, explain
from models.judge.config import DrawConfig, PromptDraw, SftConfig
from models.judge.prompt import PromptEncoder
from models.judge.spec import JudgeSpec
from models.judge.trainer import JudgeTrainer, make_trainable, save_whole
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import ResponseLogps, SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.teacher.template import write
from models.types import GRADES, MetricSink, Pair

log = logging.getLogger(__name__)


def draw_pairs(pairs: Sequence[Pair], count: int, balance: float, rng: random.Random) -> list[Pair]:
    """Up to `count` pairs without replacement, grades weighted by frequency ** (1 - balance).

    A grade that runs out leaves its places to the others.
    """
    by_grade = {g: [p for p in pairs if p.grade == g] for g in GRADES}
    for group in by_grade.values():
        rng.shuffle(group)
    weights = {g: len(v) ** (1 - balance) for g, v in by_grade.items() if v}
    chosen: list[Pair] = []
    left = min(count, len(pairs))
    while left > 0:
        open_grades = [g for g in weights if by_grade[g]]
        total = sum(weights[g] for g in open_grades)
        for g in open_grades:
            take = min(max(1, round(left * weights[g] / total)), len(by_grade[g]))
            take = min(take, count - len(chosen))
            chosen += by_grade[g][:take]
            del by_grade[g][:take]
        left = min(count, len(pairs)) - len(chosen)
    rng.shuffle(chosen)
    return chosen


def draw_examples(
    pairs: Sequence[Pair], draw: DrawConfig, rng: random.Random
) -> tuple[list[Pair], list[Set[int]]]:
    """The pairs to train on, and for each epoch the places of those that carry their steps.

    The teacher's stage and SFT call it with `draw.seed`, so that they draw the same ones.
    """
    chosen = draw_pairs(pairs, draw.max_pairs, draw.balance, rng)
    places, count = range(len(chosen)), round(draw.cot_share * len(chosen))
    return chosen, [frozenset(rng.sample(places, count)) for _ in range(draw.epochs)]


def fresh_first(
    pairs: Sequence[Pair],
    trained: Sequence[Pair],
    count: int,
    balance: float,
    rng: random.Random,
) -> list[Pair]:
    """As many pairs of each grade as `draw_pairs` draws, those that are not in `trained` first.

    What the judge says of pairs that it was fitted to is no sample of its mistakes.
    """
    seen = {p.key for p in trained}
    quota = Counter(p.grade for p in draw_pairs(pairs, count, balance, rng))
    shuffled = sorted(rng.sample(pairs, len(pairs)), key=lambda p: p.key in seen)
    chosen = []
    for pair in shuffled:
        if quota[pair.grade] > 0:
            quota[pair.grade] -= 1
            chosen.append(pair)
    return chosen


def draw_prompts(
    pairs: Sequence[Pair], trained_on: DrawConfig, draw: PromptDraw, purpose: str
) -> list[Pair]:
    """Pairs to sample responses to, those that SFT did not train on first [TaoSR1 s3.2, ours].

    Args:
        pairs: training pairs, in the order that SFT drew from.
        purpose: another one draws others with the same seed.
    """
    trained, _ = draw_examples(pairs, trained_on, random.Random(trained_on.seed))
    rng = random.Random(f"{purpose} {draw.seed}")
    return fresh_first(pairs, trained, draw.count, draw.balance, rng)


def reasoned_pairs(pairs: Sequence[Pair], draw: DrawConfig) -> list[Pair]:
    """The pairs whose steps SFT will learn in some epoch, each once: the teacher's work."""
    chosen, reasoned = draw_examples(pairs, draw, random.Random(draw.seed))
    return [chosen[i] for i in sorted(set().union(*reasoned))]


def batch_by_query(pairs: Sequence[Pair], size: int, rng: random.Random) -> list[list[Pair]]:
    """Micro-batches of `size` in which pairs of one query stay together; order is random."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.query.query_id, []).append(pair)
    order = list(groups.values())
    rng.shuffle(order)
    flat = [pair for group in order for pair in group]
    batches = [flat[i : i + size] for i in range(0, len(flat), size)]
    rng.shuffle(batches)
    return batches


@dataclass(frozen=True)
class SftBatch:
    """One micro-batch: paths, where each grade token is, and which response tokens are verdicts."""

    paths: list[TokenPath]
    grade_at: list[int]
    verdicts: list[tuple[bool, ...]]


def sft_loss(
    logps: ResponseLogps,
    grade_at_P: torch.Tensor,
    verdict_PT: torch.Tensor,
    grade_share: float | None,
    verdict_share: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """-(w_g mean log p(grade) + w_v mean log p(verdict) + (1 - w_g - w_v) mean log p(rest)).

    Args:
        logps: of P responses.
        grade_at_P: position of the grade token in each response.
        verdict_PT: bool, the tokens that state a verdict.
        grade_share: w_g; None: one plain mean over all tokens. verdict_share: w_v.

    A kind of token that no response has is left out, and the other weights are scaled up to 1.
    """
    if grade_share is None:
        mean = logps.logp_PT[logps.mask_PT].mean()
        return -mean, {"nll": -mean.item()}
    grade_PT = torch.zeros_like(logps.mask_PT)
    grade_PT[torch.arange(len(grade_at_P), device=grade_at_P.device), grade_at_P] = True
    kinds = {
        "grade": (grade_share, grade_PT),
        "verdicts": (verdict_share, verdict_PT & ~grade_PT),
        "rest": (1 - grade_share - verdict_share, logps.mask_PT & ~grade_PT & ~verdict_PT),
    }
    present = {k: (w, m) for k, (w, m) in kinds.items() if bool(m.any())}
    total = sum(w for w, _ in present.values())
    means = {k: logps.logp_PT[m].mean() for k, (_, m) in present.items()}
    metrics = {f"nll_{k}": -mean.item() for k, mean in means.items()}
    loss = -sum((w * means[k] for k, (w, _) in present.items()), logps.logp_PT.new_zeros(()))
    return loss / max(total, 1e-9), metrics


def train_cot_sft(
    base: str,
    spec: JudgeSpec,
    pairs: Sequence[Pair],
    config: SftConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
    responses: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, float]:
    """Fine-tune `base` on the teacher's responses; writes a transformers folder to `out`.

    Args:
        base: a local model folder or hub id.
        spec: prompt format and lexicon.
        pairs: training pairs, any order.
        responses: the teacher's by `Pair.key`, for all `reasoned_pairs`; None: the template's.

    Returns:
        counts: pairs used, tokens computed, share of tokens saved by the shared prefix.

    Raises:
        ConfigError: grade-only pairs for a judge that thinks first.
        DivergenceError: the loss stopped being finite.
    """
    if spec.prompt.order == "think_then_respond" and config.cot_share < 1:
        got = f"think_then_respond and cot_share={config.cot_share}"
        raise ConfigError(explain(got, "cot_share=1: its grade comes after the steps", "set it"))
    rng = random.Random(config.optimiser.seed)
    lm, tokenizer = load_lm(base, device=device)
    encoder = PromptEncoder(tokenizer, spec)
    chosen, epochs = draw_examples(pairs, config.draw, rng)
    prepared: list[SftBatch] = []
    for reasoned in epochs:
        prepared += _epoch(encoder, chosen, reasoned, responses, config, rng)
    _show_first(encoder, prepared[0])
    model = SharedPrefixLM(make_trainable(lm, config.optimiser), bf16=config.optimiser.bf16)
    tokens = sum(build_tree(batch.paths).num_tokens for batch in prepared)
    plain = sum(len(segment) for batch in prepared for path in batch.paths for segment in path)

    def stage_loss(
        net: SharedPrefixLM, batch: SftBatch
    ) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        logps = net(build_tree(batch.paths).to(model.device))
        at_P = torch.tensor(batch.grade_at, device=model.device)
        verdict_PT = torch.zeros_like(logps.mask_PT)
        for row, inside in enumerate(batch.verdicts):
            verdict_PT[row, : len(inside)] = torch.tensor(inside, device=model.device)
        yield sft_loss(logps, at_P, verdict_PT, config.grade_share, config.verdict_share)

    trainer = JudgeTrainer(
        model,
        prepared,
        stage_loss,
        stage="cot_sft",
        config=config.optimiser,
        accumulate=config.accumulate,
        scratch=scratch,
        sink=sink,
    )
    trainer.run()
    save_whole(model.lm, tokenizer, out)
    spec.write(out)
    return {"pairs": len(chosen), "tokens": tokens, "shared_token_share": 1 - tokens / plain}


def _epoch(
    encoder: PromptEncoder,
    pairs: Sequence[Pair],
    reasoned: Set[int],
    responses: Mapping[tuple[str, str], str] | None,
    config: SftConfig,
    rng: random.Random,
) -> list[SftBatch]:
    """Micro-batches of one pass, in random order: with steps and without apart, to pad little."""
    out = []
    for with_steps in (True, False):
        part = [p for i, p in enumerate(pairs) if (i in reasoned) == with_steps]
        for batch in batch_by_query(part, config.micro_batch, rng):
            out.append(_prepare(encoder, batch, with_steps, responses))
    rng.shuffle(out)
    return out


def _prepare(
    encoder: PromptEncoder,
    batch: Sequence[Pair],
    with_steps: bool,
    responses: Mapping[tuple[str, str], str] | None = None,
) -> SftBatch:
    order = encoder.config.order
    out = SftBatch([], [], [])
    for pair in batch:
        if with_steps:
            text = write(pair, order) if responses is None else responses[pair.key]
            response, verdicts = encoder.response_segment(text), encoder.verdict_mask(text)
        else:  # no end token: a grade alone is a cut response, not one that ends there
            response, verdicts = (encoder.label_ids[pair.grade - 1],), (False,)
        out.paths.append((*encoder.prompt(pair.query, pair.product), response))
        out.grade_at.append(len(response) - 2 if order == "think_then_respond" else 0)
        out.verdicts.append(verdicts)
    return out


def _show_first(encoder: PromptEncoder, batch: SftBatch) -> None:
    """Log the first example once, prompt and trained part apart: what the model really sees."""
    *prompt, response = batch.paths[0]
    text = "".join(encoder.tokenizer.decode(s) for s in prompt)
    log.info("first example, not trained:\n%s", text)
    log.info("first example, trained:\n%s", encoder.tokenizer.decode(response))
