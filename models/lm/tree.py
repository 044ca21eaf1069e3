"""Prompts as a tree of token segments: every shared token once.

Consumes paths of token ids -> produces the levels that `SharedPrefixLM` reads one after the other.

Tensor legend: N nodes of a level, T tokens, P paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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

    def segments(self) -> list[Segment]:
        """The tokens of each node, unpadded."""
        return unpadded(self.ids_NT, self.mask_NT)


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

    @property
    def width(self) -> int:
        """Columns of the longest text, padding inside it included."""
        return sum(level.ids_NT.shape[1] for level in self.levels)

    def texts(self, roots: Sequence[Segment] = ((),)) -> list[Segment]:
        """The whole text of every leaf, the root it continues before it."""
        rows = list(roots)
        for level in self.levels:
            nodes = zip(level.segments(), level.parent_N.tolist(), strict=True)
            rows = [rows[parent] + segment for segment, parent in nodes]
        return rows


def build_tree(paths: Sequence[Path], pass_tokens: int | None = None) -> PromptTree:
    """Group `paths` by shared leading segments; equal paths share one leaf.

    A level whose sharing saves fewer tokens than a forward pass costs is joined with the one below
    it: the ids of every path stay the same, only the number of passes changes.

    Args:
        pass_tokens: what a pass costs; None: PASS_TOKENS. -1 joins nothing.

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
    joined = dict(zip(tail, _join_unshared(list(tail), pass_tokens), strict=True))
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


def _join_unshared(paths: Sequence[Path], pass_tokens: int | None) -> list[Path]:
    """Distinct paths with segments joined wherever a level shares next to nothing.

    Joining level i with i + 1 repeats node i once per child beyond the first. From the leaves up,
    so that a long shared prefix is never repeated for the sake of a short one. Two different paths
    stay different: a joined leaf keeps its own tail length, and a clash of joined ids with another
    cut is kept apart by not joining.
    """
    out = list(paths)
    worth = PASS_TOKENS if pass_tokens is None else pass_tokens
    for depth in range(len(out[0]) - 2, -1, -1):
        nodes = {path[: depth + 1] for path in out}
        children = {path[: depth + 2] for path in out}
        repeated = sum(len(child[depth]) for child in children)
        once = sum(len(node[depth]) for node in nodes)
        if repeated - once > worth:
            continue
        merged = [(*p[:depth], p[depth] + p[depth + 1], *p[depth + 2 :]) for p in out]
        if len(set(merged)) == len(out):
            out = merged
    return out


def _level(nodes: Sequence[tuple[Segment, int]]) -> Level:
    ids_NT, mask_NT = padded([segment for segment, _ in nodes])
    return Level(ids_NT, mask_NT, torch.tensor([parent for _, parent in nodes]))


def padded(rows: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [N, T], padded on the right."""
    width = max(len(row) for row in rows)
    ids_NT = torch.zeros(len(rows), width, dtype=torch.long)
    mask_NT = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = torch.tensor(row)
        mask_NT[i, : len(row)] = 1
    return ids_NT, mask_NT


def unpadded(ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> list[Segment]:
    """Inverse of `padded`, wherever in a row the padding stands."""
    rows = zip(ids_NT.tolist(), mask_NT.tolist(), strict=True)
    return [tuple(i for i, kept in zip(ids, mask, strict=True) if kept) for ids, mask in rows]
