"""The shared-prefix engine: a batch of prompts as a tree, every shared token computed once.

All prompts start with the same rules, all candidates of a query share the query, all rollouts of a
group share the prompt. A *path* is a tuple of token segments (rules, query, item[, response]);
paths with equal leading segments share those nodes. Each level is one forward pass over its own
tokens against the key/value cache of its parents, expanded row by row; gradients flow through the
caches, so losses and gradients equal those of the plain forward over the joined tokens.

Consumes: a causal LM of transformers (plain or with peft adapters) and paths of token ids.
Produces: label log-probabilities, response log-probabilities, leaf caches for decoding.

Tensor legend: N nodes of a level, T tokens, P paths, D hidden size, V vocabulary, L labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from models.lm.decoding import Siblings
from models.lm.precision import autocast

PASS_TOKENS = 48
"""What one more forward pass costs, in tokens: below it a level is not worth its own pass."""

Segment = tuple[int, ...]
Path = tuple[Segment, ...]


@dataclass(frozen=True)
class Level:
    """The nodes of one depth: right-padded tokens and the row of each node's parent."""

    ids_NT: torch.Tensor
    mask_NT: torch.Tensor
    parent_N: torch.Tensor

    @property
    def lengths_N(self) -> torch.Tensor:
        """Real tokens a node."""
        return self.mask_NT.sum(1)


@dataclass(frozen=True)
class PromptTree:
    """Levels from the root down and, per path, the row of its leaf."""

    levels: tuple[Level, ...]
    leaf_P: torch.Tensor
    tail_N: torch.Tensor
    """Tokens of the paths' own last segment at the end of each leaf (the response, in training)."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, each shared one once."""
        return int(sum(level.mask_NT.sum() for level in self.levels))

    def to(self, device: torch.device | str) -> PromptTree:
        """The same tree on another device."""
        levels = tuple(
            Level(x.ids_NT.to(device), x.mask_NT.to(device), x.parent_N.to(device))
            for x in self.levels
        )
        return PromptTree(levels, self.leaf_P.to(device), self.tail_N.to(device))


def build_tree(paths: Sequence[Path]) -> PromptTree:
    """Group `paths` by shared leading segments; equal paths share one leaf.

    A level whose sharing saves fewer tokens than a forward pass costs is joined with the one below
    it: the ids of every path stay the same, only the number of passes changes.

    Raises:
        ValueError: no paths, an empty segment, or paths of different depth.

    >>> tree = build_tree([((1, 2), (3,)), ((1, 2), (4, 5))])
    >>> tree.num_tokens, tree.leaf_P.tolist(), tree.tail_N.tolist()
    (7, [0, 1], [1, 2])
    """
    depths = {len(path) for path in paths}
    if len(depths) != 1 or any(not segment for path in paths for segment in path):
        raise ValueError(f"got depths {sorted(depths)} or an empty segment; expected equal depth")
    tail = {path: len(path[-1]) for path in paths}
    joined = dict(zip(tail, _join_unshared(list(tail)), strict=True))
    levels: list[Level] = []
    parent_row: dict[Path, int] = {(): 0}
    for depth in range(len(next(iter(joined.values())))):
        rows: dict[Path, int] = {}
        for path in joined.values():
            rows.setdefault(path[: depth + 1], len(rows))
        levels.append(_level([(node[-1], parent_row[node[:-1]]) for node in rows]))
        parent_row = rows
    tail_of_leaf = {joined[path]: length for path, length in tail.items()}
    return PromptTree(
        tuple(levels),
        torch.tensor([parent_row[joined[path]] for path in paths]),
        torch.tensor([tail_of_leaf[leaf] for leaf in parent_row]),
    )


def _join_unshared(paths: Sequence[Path]) -> list[Path]:
    """Distinct paths with segments joined wherever a level shares next to nothing.

    Joining level i with i + 1 repeats node i once per child beyond the first. From the leaves up,
    so that a long shared prefix is never repeated for the sake of a short one. Two different paths
    stay different: a joined leaf keeps its own tail length, and a clash of joined ids with another
    cut is kept apart by not joining.
    """
    out = list(paths)
    for depth in range(len(out[0]) - 2, -1, -1):
        nodes = {path[: depth + 1] for path in out}
        children = {path[: depth + 2] for path in out}
        repeated = sum(len(child[depth]) for child in children)
        once = sum(len(node[depth]) for node in nodes)
        if repeated - once > PASS_TOKENS:
            continue
        merged = [(*p[:depth], p[depth] + p[depth + 1], *p[depth + 2 :]) for p in out]
        if len(set(merged)) == len(out):
            out = merged
    return out


def _level(nodes: Sequence[tuple[Segment, int]]) -> Level:
    width = max(len(segment) for segment, _ in nodes)
    ids_NT = torch.zeros(len(nodes), width, dtype=torch.long)
    mask_NT = torch.zeros(len(nodes), width, dtype=torch.long)
    for row, (segment, _) in enumerate(nodes):
        ids_NT[row, : len(segment)] = torch.tensor(segment)
        mask_NT[row, : len(segment)] = 1
    return Level(ids_NT, mask_NT, torch.tensor([parent for _, parent in nodes]))


@dataclass
class Frontier:
    """What the next level attends to: the cache of one level's nodes and its padding."""

    cache: DynamicCache
    mask_NS: torch.Tensor
    lengths_N: torch.Tensor

    def siblings(self, group_size: int, max_new_tokens: int) -> Siblings:
        """G continuations a row, ready to decode."""
        caches = [(layer.keys, layer.values) for layer in self.cache.layers]
        return Siblings(caches, self.mask_NS, group_size, max_new_tokens)

    def select(self, rows_M: torch.Tensor) -> Frontier:
        """The frontier with row i taken from `rows_M[i]`; gradients flow through."""
        identity = torch.arange(self.mask_NS.shape[0], device=rows_M.device)
        same = rows_M.shape == identity.shape and bool((rows_M == identity).all())
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            keys, values = layer.keys, layer.values
            if not same:
                keys, values = keys.index_select(0, rows_M), values.index_select(0, rows_M)
            cache.update(keys, values, index)
        return Frontier(cache, self.mask_NS[rows_M], self.lengths_N[rows_M])


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
        hiddens = self._hidden_states(tree)
        leaf = tree.levels[-1]
        start_N1 = (leaf.lengths_N - tree.tail_N)[:, None]
        column_NT = torch.arange(leaf.ids_NT.shape[1], device=start_N1.device)[None]
        mask_NT = leaf.mask_NT.bool() & (column_NT >= start_N1)
        if len(hiddens) > 1:
            before_ND = _last_token(hiddens[-2], tree.levels[-2])[leaf.parent_N]
        else:
            before_ND = torch.zeros_like(hiddens[-1][:, 0])
        states_NTD = torch.cat([before_ND[:, None], hiddens[-1][:, :-1]], dim=1)
        logits_MV = self._logits(states_NTD[mask_NT]) / temperature
        logp_MV = torch.log_softmax(logits_MV, dim=-1)
        logp_M = logp_MV.gather(1, leaf.ids_NT[mask_NT][:, None])[:, 0]
        tail_NR = column_NT[:, : int(tree.tail_N.max())] < tree.tail_N[:, None]
        logp_NR = torch.zeros(tail_NR.shape, device=logp_M.device).masked_scatter(tail_NR, logp_M)
        entropy_PT = None
        if with_entropy:
            with torch.no_grad():
                entropy_M = -(logp_MV.exp() * logp_MV).sum(-1)
            zeros_NR = torch.zeros(tail_NR.shape, device=logp_M.device)
            entropy_PT = zeros_NR.masked_scatter(tail_NR, entropy_M)[tree.leaf_P]
        return ResponseLogps(logp_NR[tree.leaf_P], tail_NR[tree.leaf_P], entropy_PT)

    def label_logprobs(
        self, tree: PromptTree, label_ids: Sequence[int], root: Frontier | None = None
    ) -> torch.Tensor:
        """log P over the label tokens alone at the position after each path [TaoSR1 s1.score].

        softmax(z[label_ids]): only those rows of the output layer are computed. With `root`, the
        tree's paths continue the prefix that `root` holds.

        Returns:
            [P, L] float32, each row normalised over the labels.
        """
        weight_LD = self._head().weight[list(label_ids)]
        logits_PL = self.last_states(tree, root).float() @ weight_LD.float().T
        return torch.log_softmax(logits_PL, dim=-1)

    def last_states(self, tree: PromptTree, root: Frontier | None = None) -> torch.Tensor:
        """[P, D]: what the output layer reads after each path; with `root` as above."""
        hidden_NTD = self._hidden_states(tree, root)[-1]
        return _last_token(hidden_NTD, tree.levels[-1])[tree.leaf_P]

    def states(
        self, tree: PromptTree, root: Frontier | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`last_states`, and [M, D]: those of all leaf tokens but the last one of each leaf."""
        hidden_NTD, leaf = self._hidden_states(tree, root)[-1], tree.levels[-1]
        before_NT = leaf.mask_NT.bool().clone()
        before_NT[torch.arange(len(before_NT), device=before_NT.device), leaf.lengths_N - 1] = False
        return _last_token(hidden_NTD, leaf)[tree.leaf_P], hidden_NTD[before_NT]

    def prefill(
        self, tree: PromptTree, root: Frontier | None = None
    ) -> tuple[Frontier, torch.Tensor]:
        """Leaf caches, one row a path, and the next-token logits [P, V] after each path."""
        hidden_NTD, frontier = torch.empty(0), root
        with self._precision():
            for level in tree.levels:
                hidden_NTD, frontier = self._extend(frontier, level)
        assert frontier is not None
        logits_NV = self._logits(_last_token(hidden_NTD, tree.levels[-1]))
        return frontier.select(tree.leaf_P), logits_NV[tree.leaf_P]

    def step(self, siblings: Siblings, ids_R: torch.Tensor) -> torch.Tensor:
        """Feed one token a row of `siblings`; next-token logits [R, V]."""
        return self._logits(siblings.step(self._backbone(), ids_R, self.bf16))

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
            parents = Frontier(
                DynamicCache(),
                level.mask_NT[:, :0],
                torch.zeros(len(level.ids_NT), dtype=torch.long, device=level.ids_NT.device),
            )
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
        lengths_N = parents.lengths_N + level.lengths_N
        return out.last_hidden_state, Frontier(out.past_key_values, mask_NS, lengths_N)

    def _logits(self, states_MD: torch.Tensor) -> torch.Tensor:
        with self._precision():
            return self._head()(states_MD).float()

    def _causal_lm(self) -> Any:
        get_base = getattr(self.lm, "get_base_model", None)
        return get_base() if get_base is not None else self.lm

    def _backbone(self) -> torch.nn.Module:
        causal_lm = self._causal_lm()
        return getattr(causal_lm, causal_lm.base_model_prefix)

    def _head(self) -> torch.nn.Module:
        return self._causal_lm().get_output_embeddings()

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return autocast(self.device.type, self.bf16)


def _last_token(hidden_NTD: torch.Tensor, level: Level) -> torch.Tensor:
    rows_N = torch.arange(len(hidden_NTD), device=hidden_NTD.device)
    return hidden_NTD[rows_N, level.lengths_N - 1]
