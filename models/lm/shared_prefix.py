"""The shared-prefix engine: a batch of prompts as a tree, every shared token computed once.

All prompts start with the same rules, all candidates of a query share the query, all rollouts of a
group share the prompt. A *path* is a tuple of token segments (rules, query, item[, response]);
paths with equal leading segments share those nodes. Each level is one forward pass over its own
tokens against the key/value cache of its parents, expanded row by row; gradients flow through the
caches, so losses and gradients equal those of the plain forward over the joined tokens. A model for
which that does not hold is found out on first use (self_check.py) and read by its plain forward.

Consumes: a causal LM of transformers (plain or with peft adapters) and paths of token ids.
Produces: label log-probabilities, response log-probabilities, leaf caches for decoding.

Tensor legend: N nodes of a level, T tokens, P paths, D hidden size, V vocabulary, L labels.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from models.lm.decoding import Siblings
from models.lm.plain import PlainSiblings, plain_logits, plain_states
from models.lm.precision import autocast
from models.lm.self_check import agrees, decodes, exact_tokens
from models.lm.tree import Level, Path, PromptTree, Segment, build_tree, padded, unpadded

__all__ = [
    "Frontier",
    "Path",
    "PromptTree",
    "ResponseLogps",
    "Segment",
    "SharedPrefixLM",
    "build_tree",
]

log = logging.getLogger(__name__)


@dataclass
class Frontier:
    """What the next level attends to: one level's texts and their cache (None: read plainly)."""

    cache: DynamicCache | None
    ids_NS: torch.Tensor
    mask_NS: torch.Tensor

    @property
    def lengths_N(self) -> torch.Tensor:
        """Real tokens a row."""
        return self.mask_NS.sum(1)

    def texts(self) -> list[Segment]:
        """The tokens of each row, unpadded."""
        return unpadded(self.ids_NS, self.mask_NS)

    def siblings(self, group_size: int, max_new_tokens: int) -> Siblings | PlainSiblings:
        """G continuations a row, ready to decode."""
        if self.cache is None:
            return PlainSiblings(self.texts(), group_size)
        caches = [(layer.keys, layer.values) for layer in self.cache.layers]
        return Siblings(caches, self.mask_NS, group_size, max_new_tokens)

    def select(self, rows_M: torch.Tensor) -> Frontier:
        """The frontier with row i taken from `rows_M[i]`; gradients flow through."""
        assert self.cache is not None
        identity = torch.arange(self.mask_NS.shape[0], device=rows_M.device)
        same = rows_M.shape == identity.shape and bool((rows_M == identity).all())
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = layer.keys, layer.values
            if not same:
                keys, values = keys.index_select(0, rows_M), values.index_select(0, rows_M)
            cache.update(keys, values, index)
        return Frontier(cache, self.ids_NS[rows_M], self.mask_NS[rows_M])


@dataclass(frozen=True)
class ResponseLogps:
    """Per path: log-probabilities of its response tokens, padded to one width.

    logp_PT: natural log, 0 where masked. mask_PT: bool. entropy_PT: nats, detached, or None.
    """

    logp_PT: torch.Tensor
    mask_PT: torch.Tensor
    entropy_PT: torch.Tensor | None = None


class SharedPrefixLM(torch.nn.Module):
    """A causal LM that reads trees. Parameters are those of `lm`, nothing is added.

    Args:
        lm: a transformers causal LM, or a peft model around one.
        bf16: run the backbone under bf16 autocast where the device has it; log-softmax always
            runs in float32.
    """

    def __init__(self, lm: torch.nn.Module, bf16: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.bf16 = bf16

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.lm.parameters()).device

    def forward(
        self, tree: PromptTree, temperature: float = 1.0, with_entropy: bool = False
    ) -> ResponseLogps:
        """Log-probabilities of each path's last segment given the segments before it.

        The trainer's entry point, so that a distributed wrapper sees one forward a loss.
        """
        plain = self._reads_plainly(tree)
        logits_MV = self._plain_logits(tree) if plain else self.shared_logits(tree)
        logp_MV = torch.log_softmax(logits_MV / temperature, dim=-1)
        leaf = tree.levels[-1]
        logp_M = logp_MV.gather(1, leaf.ids_NT[_tail_mask(tree)][:, None])[:, 0]
        column_NR = torch.arange(int(tree.tail_N.max()), device=logp_M.device)[None]
        tail_NR = column_NR < tree.tail_N[:, None]
        logp_NR = torch.zeros(tail_NR.shape, device=logp_M.device).masked_scatter(tail_NR, logp_M)
        entropy_PT = None
        if with_entropy:
            with torch.no_grad():
                entropy_M = -(logp_MV.exp() * logp_MV).sum(-1)
            zeros_NR = torch.zeros(tail_NR.shape, device=logp_M.device)
            entropy_PT = zeros_NR.masked_scatter(tail_NR, entropy_M)[tree.leaf_P]
        return ResponseLogps(logp_NR[tree.leaf_P], tail_NR[tree.leaf_P], entropy_PT)

    def shared_logits(self, tree: PromptTree) -> torch.Tensor:
        """[M, V] float32: what predicts each leaf's own last tokens, by levels and unchecked."""
        hiddens, leaf = self._hidden_states(tree), tree.levels[-1]
        if len(hiddens) > 1:
            before_ND = _last_token(hiddens[-2], tree.levels[-2])[leaf.parent_N]
        else:
            before_ND = torch.zeros_like(hiddens[-1][:, 0])
        states_NTD = torch.cat([before_ND[:, None], hiddens[-1][:, :-1]], dim=1)
        return self._logits(states_NTD[_tail_mask(tree)])

    def label_logprobs(
        self, tree: PromptTree, label_ids: Sequence[int], root: Frontier | None = None
    ) -> torch.Tensor:
        """log P over the label tokens alone at the position after each path [TaoSR1 s1.score].

        softmax(z[label_ids]): only those rows of the output layer are computed. With `root`, the
        tree's paths continue the prefix that `root` holds.

        Returns:
            [P, L] float32, each row normalised over the labels.
        """
        labels = list(label_ids)
        if self._reads_plainly(tree, root):
            logits_PL = self._next_logits(_texts(tree, root))[:, labels][tree.leaf_P]
        else:
            states_PD = _last_token(self._hidden_states(tree, root)[-1], tree.levels[-1])
            logits_PL = self._label_logits(states_PD, labels)[tree.leaf_P]
        return torch.log_softmax(logits_PL, dim=-1)

    def states(
        self, tree: PromptTree, root: Frontier | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[P, D] and [M, D]: what the output layer reads after each path, and what it reads at all
        leaf tokens but the last one of each leaf; with `root` as above.
        """
        leaf = tree.levels[-1]
        before_NT = leaf.mask_NT.bool().clone()
        before_NT[torch.arange(len(before_NT), device=before_NT.device), leaf.lengths_N - 1] = False
        if self._reads_plainly(tree, root):
            hidden_NTD = self._plain_states(tree, root)
        else:
            hidden_NTD = self._hidden_states(tree, root)[-1]
        return _last_token(hidden_NTD, leaf)[tree.leaf_P], hidden_NTD[before_NT]

    def prefill(
        self, tree: PromptTree, root: Frontier | None = None, reserve: int = 0
    ) -> tuple[Frontier, torch.Tensor]:
        """Leaf caches, one row a path, and the next-token logits [P, V] after each path.

        Args:
            reserve: tokens that will be decoded after each path.
        """
        if self._reads_plainly(tree, root, reserve):
            leaves = _texts(tree, root)
            texts = [leaves[row] for row in tree.leaf_P.tolist()]
            ids_PS, mask_PS = (x.to(self.device) for x in padded(texts))
            return Frontier(None, ids_PS, mask_PS), self._next_logits(texts)
        hidden_NTD, frontier = torch.empty(0), root
        with self._precision():
            for level in tree.levels:
                hidden_NTD, frontier = self._extend(frontier, level)
        assert frontier is not None
        logits_NV = self._logits(_last_token(hidden_NTD, tree.levels[-1]))
        return frontier.select(tree.leaf_P), logits_NV[tree.leaf_P]

    def step(self, siblings: Siblings | PlainSiblings, ids_R: torch.Tensor) -> torch.Tensor:
        """Feed one token a row of `siblings`; next-token logits [R, V]."""
        if isinstance(siblings, PlainSiblings):
            with self._precision():
                return siblings.step(self.lm, ids_R)
        return self._logits(siblings.step(self._backbone(), ids_R, self.bf16))

    def _reads_plainly(
        self, tree: PromptTree, root: Frontier | None = None, reserve: int = 0
    ) -> bool:
        """Whether levels would not equal the plain forward, so that it is to be used."""
        if root is not None and root.cache is None:
            return True
        causal_lm = self.causal_lm
        if causal_lm.training and getattr(causal_lm, "is_activation_checkpointing", False):
            _note_checkpointing()
            return True
        width = tree.width + reserve + (0 if root is None else root.ids_NS.shape[1])
        if width > exact_tokens(causal_lm.config) or not agrees(self):
            return True
        return reserve > 0 and not decodes(self)

    def _plain_logits(self, tree: PromptTree) -> torch.Tensor:
        texts = tree.texts()
        tails = zip(texts, tree.tail_N.tolist(), strict=True)
        with self._precision():
            return plain_logits(self.lm, texts, [range(len(t) - n, len(t)) for t, n in tails])

    def _next_logits(self, texts: Sequence[Segment]) -> torch.Tensor:
        with self._precision():
            return plain_logits(self.lm, texts, [range(len(t), len(t) + 1) for t in texts])

    def _plain_states(self, tree: PromptTree, root: Frontier | None) -> torch.Tensor:
        """[N, T, D] of the leaf level, as `_hidden_states` gives it."""
        texts, leaf = _texts(tree, root), tree.levels[-1]
        own = zip(texts, leaf.lengths_N.tolist(), strict=True)
        with self._precision():
            ranges = [range(len(t) - n, len(t)) for t, n in own]
            states_MD = plain_states(self._backbone(), texts, ranges)
        out_NTD = states_MD.new_zeros(*leaf.mask_NT.shape, states_MD.shape[-1])
        return out_NTD.masked_scatter(leaf.mask_NT.bool()[..., None], states_MD)

    def _hidden_states(self, tree: PromptTree, root: Frontier | None = None) -> list[torch.Tensor]:
        hiddens: list[torch.Tensor] = []
        frontier = root
        with self._precision():
            for level in tree.levels:
                hidden_NTD, frontier = self._extend(frontier, level)
                hiddens.append(hidden_NTD)
        return hiddens

    def _extend(self, frontier: Frontier | None, level: Level) -> tuple[torch.Tensor, Frontier]:
        """One forward of `level` on top of its parents."""
        position_NT = torch.cumsum(level.mask_NT, 1) - 1
        if frontier is None:
            parents = Frontier(DynamicCache(), level.ids_NT[:, :0], level.mask_NT[:, :0])
        else:
            parents = frontier.select(level.parent_N)
        position_NT = (position_NT + parents.lengths_N[:, None]).clamp(min=0)
        mask_NS = torch.cat([parents.mask_NS, level.mask_NT], dim=1)
        out = self._backbone()(
            input_ids=level.ids_NT,
            attention_mask=mask_NS,
            position_ids=position_NT,
            past_key_values=parents.cache,
            use_cache=True,
        )
        ids_NS = torch.cat([parents.ids_NS, level.ids_NT], dim=1)
        return out.last_hidden_state, Frontier(out.past_key_values, ids_NS, mask_NS)

    def _logits(self, states_MD: torch.Tensor) -> torch.Tensor:
        with self._precision():
            return self.head(states_MD).float()

    def _label_logits(self, states_PD: torch.Tensor, labels: list[int]) -> torch.Tensor:
        """[P, L] float32; an output layer that is more than a matrix is computed whole."""
        head = self.head
        if type(head) is not torch.nn.Linear or head.bias is not None:
            return self._logits(states_PD)[:, labels]
        return states_PD.float() @ head.weight[labels].float().T

    @property
    def causal_lm(self) -> Any:
        """The transformers model, without the wrapper of its adapters."""
        get_base = getattr(self.lm, "get_base_model", None)
        return get_base() if get_base is not None else self.lm

    @property
    def head(self) -> Any:
        """The output layer."""
        return self.causal_lm.get_output_embeddings()

    def _backbone(self) -> torch.nn.Module:
        causal_lm = self.causal_lm
        return getattr(causal_lm, causal_lm.base_model_prefix)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return autocast(self.device.type, self.bf16)


@functools.cache
def _note_checkpointing() -> None:
    log.warning("gradient checkpointing drops caches: training reads each text whole, and slower")


def _texts(tree: PromptTree, root: Frontier | None) -> list[Segment]:
    return tree.texts() if root is None else tree.texts(root.texts())


def _tail_mask(tree: PromptTree) -> torch.Tensor:
    """[N, T] bool: the tokens of the paths' own last segment, at the end of each leaf."""
    leaf = tree.levels[-1]
    column_NT = torch.arange(leaf.ids_NT.shape[1], device=leaf.ids_NT.device)[None]
    return leaf.mask_NT.bool() & (column_NT >= (leaf.lengths_N - tree.tail_N)[:, None])


def _last_token(hidden_NTD: torch.Tensor, level: Level) -> torch.Tensor:
    rows_N = torch.arange(len(hidden_NTD), device=hidden_NTD.device)
    return hidden_NTD[rows_N, level.lengths_N - 1]
