"""A router with the least of a control loop: what has no place goes to the first open replica. For tests and faults."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from verl_rlhfless.live.router import ACTOR_OPTIONS, Router
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.tickets import SampleKey
from verl_rlhfless.policy.snapshot import HELD, READY, Batch

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers need not find this folder


class ControlledRouter(Router):
    """Places what nobody else places, and obeys calls from outside."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.listeners.append(self._rescue)

    async def announce(self, samples: Sequence[SampleKey], replicas: Sequence[str], max_tokens: int) -> None:
        """Begin a rollout on servers that are up."""
        count: int = len(samples)
        batch = Batch(1, tuple(map(str, samples)), np.arange(count), np.full(count, 8), max_tokens)
        pool: Any = None  # nobody asks for it here
        self.begin(Rollout(batch, tuple(samples), np.arange(count), np.full(count, float(max_tokens)), pool))
        for server in replicas:
            self.book.add_replica(1, server)

    async def start_replica(self) -> int:
        """Add a replica to the rollout that is not up yet; return its number."""
        return self.book.add_replica(1)

    async def lose_replica(self, replica: int) -> None:
        """Note that a replica is dead."""
        self.book.lose_replica(replica)
        self.pump()

    async def send_to(self, samples: Sequence[int], replica: int) -> None:
        """Place samples: cut them, if they run."""
        self.place(np.array(samples, dtype=np.int64), replica)

    async def drain(self, replica: int) -> None:
        """Give a replica no more work."""
        self.book.drain_replica(replica)
        self.pump()

    async def states(self) -> tuple[list[int], bool, int]:
        """Return the state of each sample, whether all are complete, and how many words came late."""
        return self.book.view(0.0).state.tolist(), self.book.is_done, self.book.num_late

    async def num_tokens(self) -> int:
        """Return how many tokens of the rollout are known to be generated."""
        return int(self.book.view(0.0).generated.sum())

    def _rescue(self) -> None:
        if self.book.is_done:
            return
        view = self.book.view(0.0)
        open_replicas = [entry.replica for entry in view.replicas if entry.state == READY]
        held = np.flatnonzero(view.state == HELD)
        if open_replicas and len(held):
            self.place(held, open_replicas[0])


def new_router(servers: dict[str, Any]) -> Any:
    """Return a running router actor."""
    return ray.remote(**ACTOR_OPTIONS)(ControlledRouter).remote(servers, {})
