"""The two sides of each comparison of bench_judge.py: ours, and the plain forward or TRL's trainer.

Both sides of a comparison run the same model object on the same token ids. Steps end with the
gradients; the optimiser's step is the same on both sides and left out. A rollout has no end token:
every response has all its tokens on both sides, which is also the worst case for ours, since
finished rows never leave its batch.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset

from models.judge.config import GrpoConfig, PromptConfig
from models.judge.cot_sft import sft_loss
from models.judge.groups import Member
from models.judge.grpo import _update
from models.judge.prompt import PromptEncoder
from models.judge.scoring import ScoringJudge
from models.judge.spec import JudgeSpec
from models.lm.rollout import sample
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.objectives.advantages import group_advantages
from models.objectives.dpo import dpo_loss
from models.rules.base import Rule, RuleBase
from models.types import Pair
from tests.builders import WORDS, make_pair

BETA = 0.1
Step = Callable[[], float]
"""Runs one side once, gradients included, and returns its loss."""


@dataclass(frozen=True)
class Shape:
    """How much is compared. prefix: rule tokens, about; response: new tokens a response."""

    queries: int = 2
    products: int = 16
    prefix: int = 300
    group: int = 8
    response: int = 32
    batch: int = 16


class Bench:
    """One model and prompts of one prefix length."""

    def __init__(self, weights: str, shape: Shape, scratch: Path, seed: int = 0) -> None:
        self.lm, self.tokenizer = load_lm(weights)
        self.shape, self.scratch = shape, scratch
        self.encoder = PromptEncoder(self.tokenizer, _spec(self.tokenizer, shape.prefix))
        rng = random.Random(seed)
        self.pairs = [pair for _ in range(shape.queries) for pair in _candidates(shape, rng)]
        self.prompts = [self.encoder.prompt(p.query, p.product) for p in self.pairs]
        self.shared = SharedPrefixLM(self.lm)
        ids = [
            i for i in range(100, len(self.tokenizer)) if i not in self.tokenizer.all_special_ids
        ]
        self.responses = [
            [tuple(rng.choices(ids, k=shape.response)) for _ in range(2)] for _ in self.prompts
        ]

    @property
    def prompt_tokens(self) -> float:
        """Mean length of a prompt, in tokens."""
        return sum(len(s) for p in self.prompts for s in p) / len(self.prompts)

    def token_ratio(self, responses: int) -> float:
        """Tokens of all texts by those of their tree, `responses` of different text a prompt.

        What sharing saves whatever the machine: a bound on a speedup, but for the other side's
        padding. 0 responses: the prompts alone.
        """
        paths = self.prompts
        if responses:
            drawn = [(100 + i,) * self.shape.response for i in range(responses)]
            paths = [(*prompt, ids) for prompt in self.prompts for ids in drawn]
        plain = sum(len(segment) for path in paths for segment in path)
        return plain / build_tree(paths).num_tokens

    # scoring

    def score_ours(self) -> torch.Tensor:
        """P(grade) of every pair, [P, 4]; the rules are read anew each time."""
        judge = ScoringJudge(self.shared, self.encoder)
        return torch.from_numpy(judge.score([(p.query, p.product) for p in self.pairs]))

    @torch.no_grad()
    def score_plain(self) -> torch.Tensor:
        """The same by batches padded on the left, logits of the last token alone."""
        texts = [sum(self.encoder.prompt(p.query, p.product), ()) for p in self.pairs]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.zeros(len(texts), 4)
        for start in range(0, len(order), self.shape.batch):
            rows = order[start : start + self.shape.batch]
            ids_NT, mask_NT = _left_padded([texts[i] for i in rows])
            logits = self.lm(
                input_ids=ids_NT,
                attention_mask=mask_NT,
                position_ids=(mask_NT.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
            out[rows] = logits[:, self.encoder.label_ids].softmax(-1)
        return out

    # SFT and DPO

    def sft_ours(self) -> float:
        """Mean NLL of the responses, and its gradient."""
        paths = [(*p, r[0]) for p, r in zip(self.prompts, self.responses, strict=True)]
        logps = self.shared.train()(build_tree(paths))
        at_P, none_PT = torch.zeros(len(paths), dtype=torch.long), torch.zeros_like(logps.mask_PT)
        return _backward(sft_loss(logps, at_P, none_PT, None, 0.0)[0])

    def sft_trl(self) -> Step:
        """TRL's SFTTrainer on the same ids, prompt tokens out of the loss."""
        from trl import SFTConfig, SFTTrainer

        rows = [
            {"input_ids": _ids(p) + list(r[0]), "labels": [-100] * len(_ids(p)) + list(r[0])}
            for p, r in zip(self.prompts, self.responses, strict=True)
        ]
        trainer = self._trainer(SFTTrainer, SFTConfig, rows[:1], {"max_length": None})
        return lambda: trainer.training_step(self.lm, trainer.data_collator(rows), None).item()

    def dpo_ours(self) -> float:
        """DPO against fixed reference log-probs, and its gradient."""
        total_P = self.shared.train()(build_tree(self._preferences())).logp_PT.sum(1)
        half = len(total_P) // 2
        chosen_B, rejected_B = self._reference().chunk(2)
        loss, _ = dpo_loss(total_P[:half], total_P[half:], chosen_B, rejected_B, BETA)
        return _backward(loss)

    def dpo_trl(self) -> Step:
        """TRL's DPOTrainer on the same ids and reference log-probs."""
        from trl import DPOConfig, DPOTrainer

        text = {"prompt": "a", "chosen": "b", "rejected": "c"}
        settings = {"max_length": None, "precompute_ref_log_probs": True, "beta": BETA}
        trainer = self._trainer(DPOTrainer, DPOConfig, [text], settings)
        chosen_B, rejected_B = self._reference().chunk(2)
        rows = [
            {
                "prompt_ids": _ids(p),
                "chosen_ids": list(r[0]),
                "rejected_ids": list(r[1]),
                "ref_chosen_logps": chosen,
                "ref_rejected_logps": rejected,
            }
            for p, r, chosen, rejected in zip(
                self.prompts, self.responses, chosen_B.tolist(), rejected_B.tolist(), strict=True
            )
        ]
        return lambda: trainer.training_step(self.lm, trainer.data_collator(rows), None).item()

    def _preferences(self) -> list[TokenPath]:
        pairs = list(zip(self.prompts, self.responses, strict=True))
        return [(*p, r[which]) for which in (0, 1) for p, r in pairs]

    def _reference(self) -> torch.Tensor:
        """Made-up reference log-probs, [2B]: what they are does not matter, that both read them."""
        rng = torch.Generator().manual_seed(3)
        count = 2 * len(self.prompts)
        return -10.0 * self.shape.response + torch.randn(count, generator=rng)

    # GRPO

    def grpo_ours(self, seed: int = 0) -> float:
        """Rollout, reward, update: a whole step but for the optimiser's."""
        generator = torch.Generator().manual_seed(seed)
        shape, members = self.shape, []
        groups = sample(
            self.shared,
            self.prompts,
            group_size=shape.group,
            max_new_tokens=shape.response,
            end_id=-1,
            generator=generator,
        )
        texts = [[self.encoder.decode(r.ids) for r in group] for group in groups]
        rewards_BG = torch.tensor([reward(group) for group in texts])
        advantages_BG, _ = group_advantages(rewards_BG)
        for index, group in enumerate(groups):
            advantages = advantages_BG[index].tolist()
            members += [
                Member(index, r.ids, r.logps, a, True)
                for r, a in zip(group, advantages, strict=True)
            ]
        self.shared.train()
        return self.update_ours(members)

    def update_ours(self, members: Sequence[Member]) -> float:
        """The loss of one update over all members, and its gradient."""
        sampler: Any = SimpleNamespace(prompts=self.prompts, members=members)
        parts = _update(self.shared, None, sampler, self._grpo_config(len(members)))
        return sum(_backward(loss) for loss, _ in parts)

    def grpo_trl(self) -> tuple[Step, Any]:
        """TRL's GRPOTrainer with `generate`: the same work; and the trainer."""
        from trl import GRPOConfig, GRPOTrainer

        shape, names = self.shape, [str(i) for i in range(len(self.prompts))]
        settings = {
            "per_device_train_batch_size": len(names) * shape.group,
            "num_generations": shape.group,
            "max_completion_length": shape.response,
            "beta": 0.0,
            "loss_type": "grpo",
            "temperature": 1.0,
            "top_k": 0,
            "epsilon": 0.2,
        }
        prompts = [{"prompt": name} for name in names]
        trainer = self._trainer(GRPOTrainer, GRPOConfig, prompts, settings, reward_funcs=trl_reward)
        trainer.generation_config.eos_token_id = None
        trainer.eos_token_ids = [-1]
        trainer._tokenize_prompts = lambda given: (
            [_ids(self.prompts[int(name)]) for name in given], None, {},
        )  # fmt: skip
        batch = [prompt for prompt in prompts for _ in range(shape.group)]
        return lambda: trainer.training_step(self.lm, list(batch), None).item(), trainer

    def grpo_gaps(self, trainer: Any) -> tuple[float, float]:
        """Our loss and gradient on TRL's last batch, off policy by noise, against TRL's own.

        Returns:
            |ours - TRL's| of the loss, and that of the gradient relative to its norm.
        """
        batch = dict(trainer._buffered_inputs[0])
        mask_BT, ids_BT = batch["completion_mask"].bool(), batch["completion_ids"]
        rows = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
        index_of = {tuple(_ids(p)): i for i, p in enumerate(self.prompts)}
        index_B = [index_of[tuple(ids[mask].tolist())] for ids, mask in rows]
        paths = [
            (*self.prompts[i], tuple(ids[mask].tolist()))
            for i, ids, mask in zip(index_B, ids_BT, mask_BT, strict=True)
        ]
        with torch.no_grad():
            now_BT = self.shared(build_tree(paths)).logp_PT
        rng = torch.Generator().manual_seed(4)
        old_BT = (now_BT + 0.2 * torch.randn(now_BT.shape, generator=rng)) * mask_BT
        members = [
            Member(i, path[-1], tuple(old[: len(path[-1])].tolist()), a, True)
            for i, path, old, a in zip(
                index_B, paths, old_BT, batch["advantages"].tolist(), strict=True
            )
        ]
        self.lm.train()
        batch["old_per_token_logps"] = old_BT
        return self.gap(
            lambda: self.update_ours(members),
            lambda: _backward(trainer._compute_loss(self.lm, batch)),
        )

    def gap(self, ours: Step, theirs: Step) -> tuple[float, float]:
        """|difference| of the two losses, and that of the gradients relative to their norm."""
        self.lm.zero_grad()
        one = ours()
        kept = [None if p.grad is None else p.grad.clone() for p in self.lm.parameters()]
        self.lm.zero_grad()
        two = theirs()
        total = apart = 0.0
        for mine, parameter in zip(kept, self.lm.parameters(), strict=True):
            if mine is not None and parameter.grad is not None:
                apart += (mine - parameter.grad).square().sum().item()
                total += parameter.grad.square().sum().item()
        self.lm.zero_grad()
        return abs(one - two), (apart / total) ** 0.5

    def _grpo_config(self, responses: int) -> GrpoConfig:
        return GrpoConfig(
            beta=0.0,
            loss="grpo",
            temperature=1.0,
            max_new_tokens=self.shape.response,
            responses_at_once=responses,
        )

    def _trainer(
        self, kind: Any, config: Any, rows: list[Any], settings: dict[str, Any], **more: Any
    ) -> Any:
        """A trainer of TRL around the same model; no checkpointing, which would only slow it."""
        arguments = {
            "output_dir": str(self.scratch),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = kind(
                model=self.lm,
                args=config(**(arguments | settings)),
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
                **more,
            )
        trainer.current_gradient_accumulation_steps = 1  # what its own loop would set
        return trainer


def reward(texts: Sequence[str]) -> list[float]:
    """A reward that any text has and that differs between texts: nothing of it is the point."""
    return [sum(map(ord, text)) % 17 / 16 for text in texts]


def trl_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """`reward`, as TRL calls it."""
    return reward(completions)


def _backward(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def _ids(path: TokenPath) -> list[int]:
    return [i for segment in path for i in segment]


def _left_padded(texts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids_NT = torch.tensor([(0,) * (width - len(t)) + t for t in texts])
    mask_NT = torch.tensor([(0,) * (width - len(t)) + (1,) * len(t) for t in texts])
    return ids_NT, mask_NT


def _spec(tokenizer: Any, prefix: int) -> JudgeSpec:
    """A judge with as many rules as make the shared prefix `prefix` tokens long, or just over."""
    rules: tuple[Rule, ...] = ()
    while True:
        number = len(rules) + 1
        text = f"Rule {number}: an item of another {WORDS[number % len(WORDS)]} is a mismatch."
        rules = (*rules, Rule(f"r{number}", text, "always"))
        spec = JudgeSpec(PromptConfig(), rules=RuleBase("bench", rules))
        if len(PromptEncoder(tokenizer, spec).root) >= prefix:
            return spec


def _candidates(shape: Shape, rng: random.Random) -> list[Pair]:
    """Products for one query, with titles of five to nine words."""
    query = " ".join(rng.sample(WORDS, 3))
    titles = [" ".join(rng.sample(WORDS, rng.randint(5, 9))) for _ in range(shape.products)]
    return [make_pair(query, f"{title} {i}") for i, title in enumerate(titles)]
