"""Whether the replicas of a fleet fit on nodes: each stays inside one.

A budget is taken to be whole nodes and one with the GPUs that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def most_replicas(tp: int, num_gpus: int, gpus_per_node: int) -> int:
    """Return how many replicas of one size fit on a budget of GPUs."""
    nodes, rest = divmod(num_gpus, gpus_per_node)
    return nodes * (gpus_per_node // tp) + rest // tp


def packs(fleet: Sequence[int], num_gpus: int, gpus_per_node: int) -> bool:
    """Return whether replicas fit on a budget of GPUs together, the widest placed first, each where it first fits.

    Sizes of which each divides the next, and the largest a node, fit whenever the budget has room for them.
    """
    if sum(fleet) > num_gpus:
        return False
    if not any(wide % narrow for narrow, wide in pairwise((*sorted(set(fleet)), gpus_per_node))):
        return True
    nodes, rest = divmod(num_gpus, gpus_per_node)
    free = [gpus_per_node] * nodes + [rest]
    for tp in sorted(fleet, reverse=True):
        node = next((node for node, gpus in enumerate(free) if gpus >= tp), None)
        if node is None:
            return False
        free[node] -= tp
    return True
