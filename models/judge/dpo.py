"""DPO on the judge's own mistakes [TaoSR1 s3.2].

Consumes preference pairs and the SFT judge (policy and frozen reference) -> produces a judge.

The reference log-probs are computed once, before the first step, from the stage's own input: no
second copy of the model, and the loss at step 0 is log 2 exactly. Chosen and rejected are leaves of
one prompt, so the prompt is computed once for both.

Departure: with preference pairs from the model itself the chosen response's probability may fall
while the margin grows; `sft_weight` adds its negative log-likelihood (as in RPO), 0 is the paper.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from models.errors import DataContractError, explain
from models.judge.config import DpoConfig
from models.judge.preferences import Preference
from models.judge.prompt import PromptEncoder
from models.judge.spec import JudgeSpec
from models.judge.trainer import JudgeTrainer, make_trainable, save_whole
from models.lm.shared_prefix import Path as TokenPath
from models.lm.shared_prefix import SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.objectives.dpo import dpo_loss
from models.types import MetricSink, Product, Query

log = logging.getLogger(__name__)


Example = tuple[list[TokenPath], torch.Tensor]
"""2B paths (chosen then rejected) and their summed reference log-probs."""


def train_dpo(
    base: str,
    spec: JudgeSpec,
    preferences: Sequence[Preference],
    query_by_id: dict[str, Query],
    product_by_id: dict[str, Product],
    config: DpoConfig,
    out: Path,
    scratch: Path,
    sink: MetricSink,
    device: str = "cpu",
) -> dict[str, float]:
    """Train `base` on preferences; writes a transformers folder to `out`.

    Raises:
        DataContractError: no preference pair at all.
        DivergenceError: the loss stopped being finite.
    """
    if not preferences:
        got = "no preference pairs: no prompt had a wrong response"
        raise DataContractError(explain(got, "at least one", "raise pass_at_n.prompts or samples"))
    rng = random.Random(config.optimiser.seed)
    lm, tokenizer = load_lm(base, device=device)
    encoder = PromptEncoder(tokenizer, spec)
    model = SharedPrefixLM(lm, bf16=config.optimiser.bf16)
    paths = [_paths(encoder, p, query_by_id, product_by_id) for p in preferences]
    batches: list[list[TokenPath]] = []
    for _ in range(config.epochs):
        rows = rng.sample(paths, len(paths))
        for start in range(0, len(rows), config.micro_batch):
            part = rows[start : start + config.micro_batch]
            batches.append([c for c, _ in part] + [r for _, r in part])
    examples = _with_reference(model, batches)
    model = SharedPrefixLM(make_trainable(lm, config.optimiser), bf16=config.optimiser.bf16)

    def stage_loss(
        net: SharedPrefixLM, batch: Example
    ) -> Iterator[tuple[torch.Tensor, dict[str, float]]]:
        rows, reference = batch
        logps = net(build_tree(rows).to(model.device))
        total = logps.logp_PT.sum(1)
        half, tokens_B = len(rows) // 2, logps.mask_PT.sum(1)
        ref = reference.to(model.device)
        loss, metrics = dpo_loss(
            total[:half],
            total[half:],
            ref[:half],
            ref[half:],
            config.beta,
            config.kind,
            config.label_smoothing,
            (tokens_B[:half], tokens_B[half:]),
        )
        if config.sft_weight:
            chosen = logps.logp_PT[:half][logps.mask_PT[:half]].mean()
            metrics["nll_chosen"] = -chosen.item()
            loss = loss - config.sft_weight * chosen
        yield loss, metrics

    trainer = JudgeTrainer(
        model,
        examples,
        stage_loss,
        stage="dpo",
        config=config.optimiser,
        accumulate=config.accumulate,
        scratch=scratch,
        sink=sink,
    )
    trainer.run()
    save_whole(model.lm, tokenizer, out)
    spec.write(out)
    return {"pairs": len(preferences), "batches": len(batches)}


def _paths(
    encoder: PromptEncoder,
    preference: Preference,
    query_by_id: dict[str, Query],
    product_by_id: dict[str, Product],
) -> tuple[TokenPath, TokenPath]:
    query, product = query_by_id[preference.query_id], product_by_id[preference.product_id]
    head = encoder.prompt(query, product)
    chosen = encoder.response_segment(preference.chosen)
    rejected = encoder.response_segment(preference.rejected)
    if not preference.rejected_ended:
        rejected = rejected[:-1]
    return (*head, chosen), (*head, rejected)


@torch.no_grad()
def _with_reference(model: SharedPrefixLM, batches: Sequence[list[TokenPath]]) -> list[Example]:
    model.eval()
    out = []
    for rows in tqdm(batches, desc="dpo reference", leave=False):
        logps = model(build_tree(rows).to(model.device))
        out.append((rows, logps.logp_PT.sum(1).cpu()))
    model.train()
    return out
