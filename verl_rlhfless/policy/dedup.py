"""Distinct prefixes of a batch of prompts as a radix tree over token ids: each has to be prefilled only once.

Levels may nest: a system prompt shared by all, a few-shot block shared by some, a prompt shared by the samples of a
group.

Invariants: a prompt is the tokens of its chain of nodes, joined; the tokens of all nodes are those to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.snapshot import Batch, SharedPrefix


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A radix tree.

    Attributes:
        parent: Parent of each node, -1 for a root; parents come before children.
        tokens: Token ids that a node adds to its parent's prefix, int64.
        leaf: Node at which each prompt of the batch ends.
    """

    parent: tuple[int, ...]
    tokens: tuple[NDArray[np.int64], ...]
    leaf: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to compute when each distinct prefix is prefilled once."""
        return sum(len(part) for part in self.tokens)

    def chain(self, prompt: int) -> list[int]:
        """Return the nodes of a prompt from its root down."""
        nodes = [self.leaf[prompt]]
        while self.parent[nodes[-1]] >= 0:
            nodes.append(self.parent[nodes[-1]])
        return nodes[::-1]


@dataclass(frozen=True, slots=True)
class BatchPrefixes:
    """The distinct prefixes of a batch whose token ids are not known, only what is shared.

    Attributes:
        tree: One prompt a group; its "tokens" are spans.
        node_tokens: Tokens of each node.
    """

    tree: PrefixTree
    node_tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to compute when each distinct prefix is prefilled once."""
        return sum(self.node_tokens)

    def chain(self, group: int) -> tuple[tuple[int, int], ...]:
        """Return ``(node, tokens of the prompt up to its end)`` of a group's prompt, root first."""
        nodes = self.tree.chain(group)
        return tuple(zip(nodes, accumulate(self.node_tokens[node] for node in nodes), strict=True))


def batch_prefixes(batch: Batch) -> BatchPrefixes:
    """Return the distinct prefixes of a batch: shared ones by name and length, and each group's own rest.

    Token ids are not known, so a prompt is a list of spans: a shared prefix of 300 tokens, of which another prompt has
    only the first 100, is two spans of 100 and 200. ``dedup`` takes the spans' numbers for tokens.
    """
    shared = [prefix or SharedPrefix("", 0) for prefix in batch.prefixes] or [SharedPrefix("", 0)] * len(
        batch.prompt_ids
    )
    cuts: dict[str, set[int]] = {}
    for prefix in shared:
        cuts.setdefault(prefix.name, set()).add(prefix.tokens)
    weight: list[int] = []
    levels: dict[str, list[tuple[int, int]]] = {}
    for name in sorted(cuts):
        below = 0
        for tokens in sorted(cuts[name] - {0}):
            levels.setdefault(name, []).append((tokens, len(weight)))
            weight.append(tokens - below)
            below = tokens
    prompt_tokens = batch.prompt_tokens[batch.leaders].tolist()
    prompts = []
    for prefix, tokens in zip(shared, prompt_tokens, strict=True):
        spans = [span for upto, span in levels.get(prefix.name, ()) if upto <= prefix.tokens]
        prompts.append([*spans, len(weight)])
        weight.append(tokens - prefix.tokens)
    tree = dedup(prompts)
    return BatchPrefixes(tree, tuple(sum(weight[span] for span in part.tolist()) for part in tree.tokens))


def dedup(prompts: Sequence[Sequence[int]]) -> PrefixTree:
    """Return the radix tree of the prompts (lists of token ids >= 0)."""
    arrays = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    keys = [array.astype(">u4").tobytes() for array in arrays]  # big-endian bytes sort like the token lists
    order = sorted(range(len(keys)), key=keys.__getitem__)
    parent: list[int] = []
    tokens: list[NDArray[np.int64]] = []
    leaf = [0] * len(keys)
    path: list[tuple[int, int]] = []  # (node, depth at its end) from the root to the last leaf
    before: NDArray[np.int64] | None = None
    for index in order:
        array = arrays[index]
        common = 0 if before is None else _common(before, array)
        cut = None
        while path and path[-1][1] > common:
            cut = path.pop()
        depth = path[-1][1] if path else 0
        if cut is not None and common > depth:
            path.append((_split(parent, tokens, cut[0], common - depth), common))
            depth = common
        if len(array) > depth or not path:
            parent.append(path[-1][0] if path else -1)
            tokens.append(array[depth:])
            path.append((len(parent) - 1, len(array)))
        leaf[index] = path[-1][0]
        before = array
    return _parents_first(parent, tokens, leaf)


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Return how many tokens two prompts begin with in common."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size


def _split(parent: list[int], tokens: list[NDArray[np.int64]], node: int, keep: int) -> int:
    """Cut a node after ``keep`` tokens; return the new node above it."""
    parent.append(parent[node])
    tokens.append(tokens[node][:keep])
    parent[node] = len(parent) - 1
    tokens[node] = tokens[node][keep:]
    return len(parent) - 1


def _parents_first(parent: list[int], tokens: list[NDArray[np.int64]], leaf: list[int]) -> PrefixTree:
    """Return the tree with its nodes in depth-first order: splits put parents behind their children."""
    children: dict[int, list[int]] = {}
    for node, up in enumerate(parent):
        children.setdefault(up, []).append(node)
    rank: dict[int, int] = {-1: -1}
    stack = sorted(children.get(-1, ()), reverse=True)
    ordered: list[int] = []
    while stack:
        node = stack.pop()
        rank[node] = len(ordered)
        ordered.append(node)
        stack.extend(sorted(children.get(node, ()), reverse=True))
    return PrefixTree(
        tuple(rank[parent[node]] for node in ordered),
        tuple(tokens[node] for node in ordered),
        tuple(rank[node] for node in leaf),
    )
