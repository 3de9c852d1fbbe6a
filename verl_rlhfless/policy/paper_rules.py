"""The papers' own rules of when to cut: RLHFless' local one (tau) and RLHFuse's global one (R_t, m), by name too.

Invariants: only unfinished samples move, none onto a replica that is not up.
"""

from __future__ import annotations

import numpy as np

from verl_rlhfless.policy.dispatch import spread
from verl_rlhfless.policy.snapshot import READY, Move, RolloutView

RULES = ("rlhfless", "rlhfuse")
"""Names of the rules, which move samples and start nothing."""


def cut_by_rule(view: RolloutView, rule: str, tau: float) -> tuple[Move, ...]:
    """Return the moves of a paper's rule by name (one of ``RULES``) at the share ``tau`` of finished samples."""
    if rule == "rlhfless":
        return local_cut(view, tau)
    return global_cut(view, round((1 - tau) * view.batch.num_samples), max(1, len(view.replicas) // 2))


def local_cut(view: RolloutView, tau: float) -> tuple[Move, ...]:
    """Return RLHFless' local rule.

    Once a share ``tau`` of a replica's samples has finished, the rest move to replicas with free slots.

    arXiv 2602.22718, cut-and-migrate. The receivers are replicas that have not reached ``tau``; the one with the
    fewest requests first.
    """
    total = np.bincount(view.replica_of[view.replica_of >= 0], minlength=len(view.replicas))
    alive, left = view.alive, view.num_held
    live = [r for r in view.replicas if r.state == READY and left[r.replica]]
    cut = [r for r in live if 1 - left[r.replica] / max(total[r.replica], 1) >= tau]
    keep = [r for r in live if r not in cut]
    if not keep and cut:  # every actor is past tau: the fullest stays
        keep = [max(cut, key=lambda r: (left[r.replica], -r.replica))]
        cut = [r for r in cut if r is not keep[0]]
    slots = {r.replica: view.pool.perf[r.tp].limits.max_num_seqs - int(left[r.replica]) for r in keep}
    moved = [alive[view.replica_of[alive] == r.replica] for r in cut]
    samples = np.concatenate(moved) if moved else np.array([], dtype=np.int64)
    if not len(samples) or sum(slots.values()) < len(samples):
        return ()
    load = [float(left[r.replica]) for r in keep]
    return spread(samples, [r.replica for r in keep], load, np.ones(view.batch.num_samples))


def global_cut(view: RolloutView, threshold: int, num_targets: int) -> tuple[Move, ...]:
    """Return RLHFuse's global rule.

    With at most ``threshold`` samples left, the survivors move to the ``num_targets`` instances with the most
    remaining work (arXiv 2409.13221, section 4.2).
    """
    alive = view.alive
    if len(alive) > threshold or not len(alive):
        return ()
    left = view.num_held
    order = sorted(range(len(view.replicas)), key=lambda r: (-left[r], r))
    targets = [r for r in order if view.replicas[r].state == READY][:num_targets]
    samples = alive[~np.isin(view.replica_of[alive], targets)]
    if not targets or not len(samples):
        return ()
    return spread(samples, targets, [float(left[t]) for t in targets], np.ones(view.batch.num_samples))
