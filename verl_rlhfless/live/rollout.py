"""One rollout as the control loop (``control.run_rollout``) sees it: its ports, over the router's book of requests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.orders import FleetDesk
from verl_rlhfless.live.router import Router
from verl_rlhfless.policy.snapshot import IntArray, RolloutView

logger = logging.getLogger(__name__)


class LiveRollout:
    """The ports of one rollout over the router's book.

    Args:
        router: Sends the requests.
        desk: What is up, expected and asked for.
        want: Asks the fleet for a replica of so many GPUs; returns whether one may come.
        start_limit_s: How long a replica is waited for of which nothing is heard.
    """

    def __init__(self, router: Router, desk: FleetDesk, want: Callable[[int], bool], start_limit_s: float) -> None:
        self._router, self._book, self._desk, self._want = router, router.book, desk, want
        self._start_limit_s = start_limit_s
        self._limits: list[asyncio.TimerHandle] = []
        self._began_s = time.monotonic()
        self._changed = asyncio.Event()
        self._was_dry = False
        self._num_idle: float = math.inf  # until every sample has its first place
        self.num_released = 0

    # ---- clock

    def now_s(self) -> float:
        """Return the seconds since the rollout was announced."""
        return time.monotonic() - self._began_s

    async def wait(self, until_s: float) -> None:
        """Return at ``until_s``, or when a replica came or went or ran dry, or all samples are complete."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(0.0, until_s - self.now_s()))
        self._changed.clear()

    def look_now(self) -> None:
        """End the wait: a replica came or went."""
        self._changed.set()

    def on_change(self) -> None:
        """Take note of any change of the book; most need no decision."""
        is_dry, num_idle = self._book.has_dry_replica(), self._book.num_idle_replicas()
        if self._book.is_done or (is_dry and not self._was_dry) or num_idle > self._num_idle:
            self._changed.set()
        self._was_dry, self._num_idle = is_dry, num_idle

    # ---- replicas

    def start(self, tps: Sequence[int]) -> None:
        """Add replicas; those whose server is up are ready, the others are expected or asked for.

        What is up and expected may have changed since the rollout was planned.
        """
        for tp in tps:
            server = next((name for name in self._book.spare_servers() if self._desk.tp_of(name) == tp), None)
            if server is not None:
                self._book.add_replica(tp, server)
                continue
            is_on_its_way = self._desk.expected.count(tp) > self._book.num_starting(tp)
            replica = self._book.add_replica(tp)
            if is_on_its_way or self._want(tp):
                give_up = functools.partial(self._give_up_on, replica, tp)
                self._limits.append(self._router.after(self._start_limit_s, give_up))
            else:
                self._book.lose_replica(replica)

    def _give_up_on(self, replica: int, tp: int) -> None:
        """Send samples elsewhere that wait for a replica of which nothing was heard: its order may be lost."""
        if self._book.is_starting(replica):
            logger.error(
                "rlhfless: nothing was heard of the start of replica %d for %g s, so its samples go elsewhere. Look "
                "for the trainer's errors above.",
                replica,
                self._start_limit_s,
            )
            self._desk.arrived(tp)
            self._book.lose_replica(replica)
            self._router.pump()
            self.look_now()

    def close(self) -> None:
        """Wait for no replica any more: the rollout is over."""
        for limit in self._limits:
            limit.cancel()

    def release(self, replicas: Sequence[int]) -> None:
        """Give replicas no more work; an elastic one's lease is given back with its last request."""
        for replica in replicas:
            server = self._book.drain_replica(replica)
            if server is not None:
                self.num_released += 1
                self._desk.end(server)

    # ---- requests

    def place(self, samples: IntArray, replica: int) -> None:
        """Send samples to a replica; running ones are cut and continue there."""
        self._router.place(samples, replica)

    def observe(self) -> RolloutView:
        """Return the rollout as it is now."""
        return self._book.view(self.now_s(), self._desk.free_gpus)

    def is_done(self) -> bool:
        """Return whether every announced sample is complete."""
        return self._book.is_done

    # ---- inference

    def fuse(self, num_gpus: int) -> None:
        """Refuse: policies of live runs ask for none. There the trainer itself begins inference (``fusion_loop``).

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(f"fusing inference on {num_gpus} GPUs is not supported in live runs yet.")
