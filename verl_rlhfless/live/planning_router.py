"""A router that plans the fleet of each step, and learns from every rollout what its plans count with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.orders import FleetDesk
from verl_rlhfless.live.planner import LivePlanner
from verl_rlhfless.live.router import Router
from verl_rlhfless.live.routing_settings import RoutingSettings
from verl_rlhfless.live.tickets import Delta, RouterSettings
from verl_rlhfless.policy.learnt import CostModel, Standby, StepTimes
from verl_rlhfless.policy.predict import LengthModel, learn
from verl_rlhfless.policy.snapshot import FINISHED, Batch, IntArray
from verl_rlhfless.types import FleetDecision


class PlanningRouter(Router):
    """A router with the run's settings, its planner and its memory; what it knows goes into checkpoints.

    Attributes:
        desk: What is leased, on its way and asked for.
    """

    def __init__(self, servers: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> None:
        super().__init__(servers, options)
        self._routing: RoutingSettings | None = None
        self._lengths = LengthModel()
        self.desk = FleetDesk(1, 0)
        self._planner: LivePlanner | None = None
        self._restored_costs = CostModel()  # a checkpoint is loaded before the run's settings come
        self._last: tuple[Batch, IntArray] | None = None  # the last step as first announced: it trains on as many

    async def configure_rollouts(self, settings: RouterSettings, routing: RoutingSettings) -> None:
        """Take the settings of a run, before its first rollout."""
        self._routing = routing
        self.desk = FleetDesk(routing.tp, routing.replica_gpus)
        self._planner = LivePlanner(routing, self._restored_costs)
        await self.configure(settings)

    async def reroute(self, routing: RoutingSettings) -> None:
        """Take other settings in mid-run, between two rollouts."""
        assert self._planner is not None, "a router is configured before its first rollout"
        self._routing = self._planner.routing = routing
        self.desk = FleetDesk(routing.tp, routing.replica_gpus)

    async def plan(self, announced: Announcement, standby: Standby) -> FleetDecision:
        """Return the fleet for a step, before any of it is leased; ``announce`` follows when it begins to start.

        Args:
            announced: The step.
            standby: What waits for a replica.

        Raises:
            ConfigError: No fleet meets the deadline or the budget.
        """
        assert self._planner is not None, "a router is configured before its first rollout"
        return self._planner.plan(announced, self._lengths, standby)

    async def progress(self, server: str, delta: Delta) -> None:
        """Take a server's report, and how fast its engine is."""
        await super().progress(server, delta)
        load = self.book.servers.loads.get(server)
        if load is not None and self._planner is not None:
            self._planner.speed.note(server, self.desk.tp_of(server), delta, load.context_tokens)

    async def learn_costs(self, times: StepTimes) -> None:
        """Take what a planned step took; the next plan counts with it."""
        if self._planner is not None and self._last is not None:
            await self._planner.learn(self._last, times)

    async def costs(self) -> str:
        """Return what was measured as JSON text, for the checkpoint."""
        assert self._planner is not None
        return self._planner.costs.to_json()

    async def restore_costs(self, text: str) -> None:
        """Take measured costs from a checkpoint, before ``configure_rollouts``.

        Raises:
            DataError: The text holds none.
        """
        self._restored_costs = CostModel.from_json(text)

    async def lengths(self) -> str:
        """Return the length history as JSON text, for the checkpoint."""
        return self._lengths.to_json()

    async def restore_lengths(self, text: str) -> None:
        """Take a length history from a checkpoint.

        Raises:
            DataError: The text is no such history.
        """
        self._lengths = LengthModel.from_json(text)

    def _learn(self, batch: Batch, *, is_refill: bool) -> None:
        assert self._routing is not None
        view = self.book.view(0.0)
        if (view.generated > 0).all() and (view.state == FINISHED).all():
            if self._routing.remembers:
                self._lengths = learn(self._lengths, batch, view.generated)
            if not is_refill:  # refills replace what is not trained on: they add to no phase
                self._last = batch, view.generated
