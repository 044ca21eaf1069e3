"""A linear probe on the finished features: what a small judge needs after SFT.

Consumes a fine-tuned judge and labelled pairs, first those it was not trained on -> produces the
judge with an output layer of its own, in which the four grade rows are moved by what was learned.

Ours. Gradient steps that teach a small model to reason move the features under the grade rows
faster than they move the rows, and grades suffer; one forward pass over fresh pairs and a convex
fit put the rows where the features now are (infra/LOG.md). The rows move against each other only
(their mean stays) and are held still for what the layer reads in a response after the grade. Their
targets are labels smoothed towards what the words' estimate, which knows every labelled pair, says
of the grade: a few hundred noisy labels alone teach 576 features mostly noise.

Tensor legend: N pairs, D hidden size, L grades.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from models.errors import ConfigError, DivergenceError, explain
from models.judge.config import DrawConfig, ProbeConfig
from models.judge.cot_sft import draw_examples, fresh_first
from models.judge.prompt import PromptEncoder
from models.judge.scoring import chunks
from models.judge.spec import JudgeSpec
from models.judge.trainer import save_whole
from models.lm.precision import weights_cast
from models.lm.shared_prefix import Frontier, SharedPrefixLM, build_tree
from models.lm.weights import load_lm
from models.teacher.template import write
from models.types import GRADES, Pair

RESPONSES = 96
"""Pairs whose responses are read to keep the rows quiet in them."""
MAX_ITERATIONS = 200
"""A bound only: the problems are convex and LBFGS stops by itself."""
POSTERIOR_L2 = 1e-4
"""Keeps the reading of the estimate finite where it tells grades apart without fail."""


def train_probe(
    base: str,
    spec: JudgeSpec,
    pairs: Sequence[Pair],
    trained_on: DrawConfig,
    config: ProbeConfig,
    out: Path,
    device: str = "cpu",
) -> dict[str, float]:
    """Fit the grade rows of the judge in `base`; writes a transformers folder to `out`.

    Args:
        pairs: training pairs, any order.
        trained_on: what SFT drew of them.

    Raises:
        ConfigError: a judge that thinks first: its grade comes after the steps.
        DivergenceError: features that are not finite.
    """
    if spec.prompt.order == "think_then_respond":
        got = "a probe for think_then_respond"
        raise ConfigError(explain(got, "a grade that comes first", "set judge.probe=null"))
    rng = random.Random(trained_on.seed)
    trained, _ = draw_examples(pairs, trained_on, rng)
    probed = fresh_first(pairs, trained, config.max_pairs, 1.0, rng)
    lm, tokenizer = load_lm(base, device=device)
    counts = fit_grade_rows(
        SharedPrefixLM(lm, bf16=config.bf16), PromptEncoder(tokenizer, spec), probed, config
    )
    save_whole(lm, tokenizer, out)
    spec.write(out)
    seen = {p.key for p in trained}
    return counts | {"probe/fresh": sum(p.key not in seen for p in probed)}


def fit_grade_rows(
    model: SharedPrefixLM, encoder: PromptEncoder, pairs: Sequence[Pair], config: ProbeConfig
) -> dict[str, float]:
    """Untie the output layer of `model.lm` and add the probe's rows to it, in place.

    [TaoSR1 s3.1.probe, ours]
    """
    states_ND = answer_states(model, encoder, pairs)
    gram_DD = response_gram(model, encoder, pairs[:RESPONSES])
    targets_NL = smoothed_targets(pairs, encoder.spec, config.smoothing)
    rows_LD = _head(model.lm).weight[encoder.label_ids].detach().float()
    delta_LD, metrics = fit_probe(states_ND, gram_DD, targets_NL, rows_LD, config)
    untie_head(model.lm)
    with torch.no_grad():
        _head(model.lm).weight[encoder.label_ids] += delta_LD
    return {"probe/pairs": len(pairs), **metrics}


def smoothed_targets(pairs: Sequence[Pair], spec: JudgeSpec, smoothing: float) -> torch.Tensor:
    """[N, L] float64: (1 - smoothing) label + smoothing P(grade | estimate).

    P is a softmax in the estimate and its square, fitted to these labels; the estimate leaves a
    training pair's own query out. Without an estimate, the labels.
    """
    labels_NL = torch.eye(len(GRADES)).double()[[p.grade - 1 for p in pairs]]
    estimates = [spec.evidence(p.query, p.product)[1] for p in pairs]
    known = [e for e in estimates if e is not None]
    if len(known) < len(pairs):
        return labels_NL
    value_N = torch.tensor(known).double() - sum(GRADES) / len(GRADES)
    powers_N3 = torch.stack([torch.ones_like(value_N), value_N, value_N.square()], dim=1)
    weight_3L = torch.zeros(3, len(GRADES)).double().requires_grad_()

    def loss() -> torch.Tensor:
        nll = torch.nn.functional.cross_entropy(powers_N3 @ weight_3L, labels_NL)
        return nll + POSTERIOR_L2 * weight_3L.square().sum()

    minimise(loss, weight_3L)
    says_NL = (powers_N3 @ weight_3L.detach()).softmax(1)
    return (1 - smoothing) * labels_NL + smoothing * says_NL


@torch.no_grad()
def answer_states(
    model: SharedPrefixLM, encoder: PromptEncoder, pairs: Sequence[Pair]
) -> torch.Tensor:
    """[N, D] float32 in pair order: what the output layer reads where the grade is due."""
    tails = [encoder.prompt(p.query, p.product)[1:] for p in pairs]
    order: list[int] = []
    parts = []
    with _rules_read(model, encoder) as root:
        for rows, tree in chunks(tails, desc="probe"):
            order += rows
            parts.append(model.states(tree.to(model.device), root)[0].float())
    sorted_ND = torch.cat(parts)
    states_ND = torch.empty_like(sorted_ND)
    states_ND[order] = sorted_ND
    return states_ND


@torch.no_grad()
def response_gram(
    model: SharedPrefixLM, encoder: PromptEncoder, pairs: Sequence[Pair]
) -> torch.Tensor:
    """[D, D]: mean h h^T over what the output layer reads in the template's responses after the
    grade: where the judge writes, and no grade is due."""
    order = encoder.config.order
    paths = [
        (*encoder.prompt(p.query, p.product)[1:], encoder.response_segment(write(p, order)))
        for p in pairs
    ]
    gram_DD, count = torch.zeros((), device=model.device), 0
    with _rules_read(model, encoder) as root:
        for _, tree in chunks(paths, desc="probe: responses", pass_tokens=-1):
            own_MD = model.states(tree.to(model.device), root)[1].float()
            gram_DD = gram_DD + own_MD.T @ own_MD
            count += len(own_MD)
    return gram_DD / max(count, 1)


@contextlib.contextmanager
def _rules_read(model: SharedPrefixLM, encoder: PromptEncoder) -> Iterator[Frontier]:
    """The rules' frontier; the model does not train inside and reads as scoring does, in bf16."""
    was_training = model.training
    model.eval()
    try:
        with weights_cast(model.modules(), model.bf16):
            yield model.prefill(build_tree([(encoder.root,)]).to(model.device))[0]
    finally:
        model.train(was_training)


def fit_probe(
    states_ND: torch.Tensor,
    gram_DD: torch.Tensor,
    targets_NL: torch.Tensor,
    rows_LD: torch.Tensor,
    config: ProbeConfig,
) -> tuple[torch.Tensor, dict[str, float]]:
    """delta_LD that minimises CE(softmax(h (rows + delta)^T), target) and stays quiet elsewhere.

        mean CE + l2 |s delta|^2 + quiet E_elsewhere |delta h|^2

    s: root mean squares of the features, so that l2 does not depend on their scale. gram_DD:
    E h h^T elsewhere; without the last term the grade tokens would outbid all others in the middle
    of a sentence. The mean of delta over the grades is zero.

    Returns:
        delta; the probe's nll, nats, before and after; the mean logit it adds elsewhere.

    Raises:
        DivergenceError: features that are not finite.
    """
    # LBFGS wants double precision: elsewhere is a hundred times louder than here
    device = rows_LD.device
    states_ND, gram_DD, targets_NL, rows_LD = (
        x.cpu().double() for x in (states_ND, gram_DD, targets_NL, rows_LD)
    )
    scale_D = states_ND.square().mean(0).sqrt().clamp_min(1e-9)
    inputs_ND, gram_DD = states_ND / scale_D, gram_DD / scale_D / scale_D[:, None]
    base_NL = states_ND @ rows_LD.T
    weight_LD = torch.zeros_like(rows_LD, requires_grad=True)

    def nll() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(base_NL + inputs_ND @ weight_LD.T, targets_NL)

    def loss() -> torch.Tensor:
        elsewhere = ((weight_LD @ gram_DD) * weight_LD).sum()
        return nll() + config.l2 * weight_LD.square().sum() + config.quiet * elsewhere

    before = nll().item()
    minimise(loss, weight_LD)
    with torch.no_grad():
        delta_LD = weight_LD / scale_D
        after, loud = nll().item(), ((weight_LD @ gram_DD) * weight_LD).sum(1).mean().sqrt().item()
        metrics = {"probe/nll_before": before, "probe/nll_after": after, "probe/elsewhere": loud}
    delta_LD = delta_LD - delta_LD.mean(0)
    if not (math.isfinite(after) and bool(torch.isfinite(delta_LD).all())):
        got = f"a probe that is not finite, {metrics}"
        do = "lower SFT's learning rate, or set judge.probe=null"
        raise DivergenceError(explain(got, "finite rows", do))
    return delta_LD.float().to(device), metrics


def minimise(loss: Callable[[], torch.Tensor], weight: torch.Tensor) -> None:
    """Move `weight` to where `loss`, convex in it, is least."""
    optimiser = torch.optim.LBFGS([weight], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)


def untie_head(lm: Any) -> None:
    """Give `lm` an output layer of its own where it shares the input embeddings'."""
    head, embeddings = _head(lm), lm.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(
            embeddings.weight.detach().clone(), requires_grad=embeddings.weight.requires_grad
        )
    lm.config.tie_word_embeddings = False


def _head(lm: Any) -> Any:
    return lm.get_output_embeddings()
