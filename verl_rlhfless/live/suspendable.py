"""Whether the trainer may leave its devices in a run at all: the one place that knows what works on them meanwhile."""

from __future__ import annotations

from typing import Any


def why_lease_is_kept(run_config: Any, suspend_trainer: str) -> str:
    """Return why the trainer never leaves its devices in this run; empty when it may.

    Args:
        run_config: verl's configuration.
        suspend_trainer: ``rlhfless.pool.suspend_trainer``.
    """
    reasons = {
        "rlhfless.pool.suspend_trainer=never": suspend_trainer == "never",
        "only FSDP's state is known to leave its device and come back": run_config.actor_rollout_ref.actor.strategy
        not in ("fsdp", "fsdp2"),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
