"""pass@N sampling and preference pairs [TaoSR1 s3.2].

Consumes a judge and labelled pairs -> produces N sampled responses a prompt, and from them
preference pairs: where some sample is right, the model's own right and wrong responses
(self-correction); where none is, the teacher's against the model's own wrong one (oracle guidance).

Departures (the paper is silent): a response is right when its grade equals gold and its verdicts do
not contradict it; duplicates are dropped; at most `pairs_per_prompt` pairs a prompt, chosen so that
the rejected ones carry different wrong grades.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from models.evaluation.pass_at_k import pass_at_k
from models.judge.config import DrawConfig, PassAtNConfig, PromptDraw
from models.judge.cot_sft import draw_prompts
from models.judge.scoring import ScoringJudge
from models.lm.rollout import sample
from models.teacher.response import ParseOutcome, parse_response
from models.teacher.template import write
from models.types import Pair


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled response of one pair.

    correct: well formed, of the gold grade, and not in contradiction with itself. malformed: it
    ended, and not in the format. contradicting: None where it does not state grade and verdicts.
    """

    query_id: str
    product_id: str
    gold: int
    text: str
    grade: int | None
    finished: bool
    correct: bool
    contradicting: bool | None
    malformed: bool = False


@dataclass(frozen=True, slots=True)
class Preference:
    """chosen and rejected are response texts; source: self_correction or oracle_guidance.

    rejected_ended: False when the rejected response was cut off: its end token was never sampled.
    """

    query_id: str
    product_id: str
    chosen: str
    rejected: str
    source: str
    rejected_ended: bool = True


def sample_responses(
    judge: ScoringJudge, pairs: Sequence[Pair], config: PassAtNConfig, desc: str = "pass@N"
) -> list[list[Sampled]]:
    """N responses for each pair, in pair order."""
    encoder = judge.encoder
    generator = torch.Generator(device=judge.model.device).manual_seed(config.seed)
    groups = sample(
        judge.model,
        [encoder.prompt(p.query, p.product) for p in pairs],
        group_size=config.samples,
        max_new_tokens=config.max_new_tokens,
        end_id=encoder.end_id,
        generator=generator,
        temperature=config.temperature,
        top_k=config.top_k,
        desc=desc,
    )
    out: list[list[Sampled]] = []
    for pair, group in zip(pairs, groups, strict=True):
        row = []
        for rollout in group:
            text = encoder.decode(rollout.ids)
            response = parse_response(text, encoder.config.order, rollout.finished)
            whole = response.outcome is ParseOutcome.OK
            row.append(
                Sampled(
                    pair.query.query_id,
                    pair.product.product_id,
                    pair.grade,
                    text,
                    response.grade,
                    rollout.finished,
                    response.sound and response.grade == pair.grade,
                    response.contradicting if response.states_both else None,
                    rollout.finished and not whole,
                )
            )
        out.append(row)
    return out


def pass_at(groups: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """pass@1..N: `pass_at_k` of the right responses, averaged over prompts."""
    size = len(groups[0]) if groups else 0
    right = [sum(s.correct for s in g) for g in groups]
    return {
        f"pass@{n}": sum(pass_at_k(size, c, n) for c in right) / len(right)
        for n in range(1, size + 1)
    }


def build_preferences(
    pairs: Sequence[Pair],
    groups: Sequence[Sequence[Sampled]],
    config: PassAtNConfig,
    order: str,
    responses: Mapping[tuple[str, str], str] | None = None,
) -> list[Preference]:
    """Self-correction and oracle-guidance pairs, duplicates dropped.

    responses: the teacher's, by `Pair.key`; the template's stand in where there is none.
    """
    written = responses or {}
    out: list[Preference] = []
    for pair, group in zip(pairs, groups, strict=True):
        right = list(dict.fromkeys(s.text for s in group if s.correct))
        wrong: dict[int | None, Sampled] = {}
        for s in group:
            # a right grade that was cut off is no mistake to unlearn
            if not s.correct and s.text and (s.finished or s.grade != s.gold):
                wrong.setdefault(s.grade, s)
        source = "self_correction" if right else "oracle_guidance"
        chosen = right or [written.get(pair.key) or write(pair, order)]  # type: ignore[arg-type]
        for i, rejected in enumerate(list(wrong.values())[: config.pairs_per_prompt]):
            best = chosen[i % len(chosen)]
            if best != rejected.text:
                out.append(Preference(*pair.key, best, rejected.text, source, rejected.finished))
    return out


def pass_at_n_prompts(
    pairs: Sequence[Pair], trained_on: DrawConfig, draw: PromptDraw
) -> list[Pair]:
    """The training pairs that pass@N samples from; the teacher's stage draws the same."""
    return draw_prompts(pairs, trained_on, draw, "pass@N")


def make_preferences(
    judge: ScoringJudge,
    pairs: Sequence[Pair],
    trained_on: DrawConfig,
    config: PassAtNConfig,
    out: Path,
    responses: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, float]:
    """Draw prompts, sample, pair up; writes samples.jsonl and preferences.jsonl to `out`.

    Args:
        pairs: training pairs. trained_on: what SFT drew of them.
        responses: the teacher's for `pass_at_n_prompts`, by `Pair.key`.
    """
    chosen = pass_at_n_prompts(pairs, trained_on, config.draw)
    groups = sample_responses(judge, chosen, config)
    order = judge.encoder.config.order
    preferences = build_preferences(chosen, groups, config, order, responses)
    flat = [s for g in groups for s in g]
    stated = [s.contradicting for s in flat if s.contradicting is not None]
    _write_jsonl(out / "samples.jsonl", [asdict(s) for s in flat])
    _write_jsonl(out / "preferences.jsonl", [asdict(p) for p in preferences])
    own = sum(p.source == "self_correction" for p in preferences)
    rate = {"contradiction_rate": sum(stated) / len(stated)} if stated else {}
    return {
        **pass_at(groups),
        **rate,
        "preferences": len(preferences),
        "self_correction": own,
        "oracle_guidance": len(preferences) - own,
        "malformed_share": sum(s.malformed for s in flat) / len(flat),
        "truncated_share": sum(not s.finished for s in flat) / len(flat),
    }


def read_preferences(folder: Path) -> list[Preference]:
    """What `make_preferences` wrote."""
    lines = (folder / "preferences.jsonl").read_text(encoding="utf-8").split("\n")
    return [Preference(**json.loads(line)) for line in lines if line]


def _write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + ("\n" if lines else ""), encoding="utf-8")
