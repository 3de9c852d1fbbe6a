"""What every rank of the trainer holds before it leaves and after it came back, recorded from outside the product.

Loaded through ``VERL_USE_EXTERNAL_MODULES``; writes an event ``fingerprints`` at each move.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt


def fingerprint(worker: Any) -> dict[str, Any]:
    """Return digests of parameters, optimizer state and random state of one rank; runs inside it."""
    import hashlib
    import os

    import torch

    engines = [role.actor.engine for role in worker.worker_dict.values()]
    parameters, optimizer = hashlib.sha256(), hashlib.sha256()
    num_states = 0
    for engine in engines:
        for parameter in engine.module.parameters():
            state = engine.optimizer.state.get(parameter, {})
            num_states += len(state)
            parameters.update(_bytes(parameter))
            for key in sorted(state):
                optimizer.update(_bytes(state[key]))
    return {
        "pid": os.getpid(),
        "parameters": parameters.hexdigest(),
        "optimizer": optimizer.hexdigest(),
        "num_states": num_states,
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }


def _bytes(tensor: Any) -> bytes:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bytes(local.detach().contiguous().cpu().numpy().tobytes())


def _inject(module: ModuleType) -> None:
    lease = module.TrainerLease
    suspend, resume = lease._suspend, lease._resume

    def record(self: Any, when: str) -> None:
        root = self._group._parent
        self._events.write("fingerprints", when=when, ranks=root._on_every_rank(fingerprint, "answer", 60.0))

    def suspend_recorded(self: Any) -> None:
        record(self, "before")
        suspend(self)

    def resume_recorded(self: Any) -> None:
        resume(self)
        record(self, "after")

    lease._suspend, lease._resume = suspend_recorded, resume_recorded


wrapt.register_post_import_hook(_inject, "verl_rlhfless.live.trainer_lease")
