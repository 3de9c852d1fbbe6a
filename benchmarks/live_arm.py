"""The elastic arm of a live run as the simulator runs it: the same planner, dispatcher and migration, same settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from verl_rlhfless.config import parse_config
from verl_rlhfless.live.announcement import Announcement
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.routing_settings import Nodes, RoutingSettings
from verl_rlhfless.policy.arm import Outcome, Policy
from verl_rlhfless.policy.invest import plan_parked_fleet
from verl_rlhfless.policy.learnt import CostModel, Standby, apply
from verl_rlhfless.policy.predict import LengthModel, learn
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.snapshot import Batch, PoolSnapshot, Reaction, RolloutPlan, RolloutView

_ANY_MODEL = dict.fromkeys(
    ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"), 1
)
"""A declared device asks nothing of the model but which sizes it can be split into; of those, 1 is declared."""


def settings_of(folder: Path, pace: PaceModel) -> RoutingSettings:
    """Return what the router of the elastic arm in ``folder`` was told, from verl's own record of its configuration.

    Args:
        folder: Folder of the arm.
        pace: The declared device.

    Raises:
        ConfigError: A value of the plugin's configuration breaks a rule.
        FileNotFoundError: The arm left no configuration.
    """
    run = _configuration(folder)
    config = parse_config(OmegaConf.to_container(run.rlhfless, resolve=True))
    nodes = Nodes((run.trainer.n_gpus_per_node,) * run.trainer.nnodes, ())
    return replace(RoutingSettings.of_run(run, config, _ANY_MODEL, nodes), pace=pace)


def trace_of(folder: Path) -> Path | None:
    """Return the trace that the arm in ``folder`` replayed; ``None`` = lengths were the model's own."""
    path = OmegaConf.select(_configuration(folder), "rlhfless.replay.trace")
    return Path(path) if path else None


def _configuration(folder: Path) -> Any:
    return OmegaConf.load(folder / "hydra" / ".hydra" / "config.yaml")


class Memory(NamedTuple):
    """What goes from step to step: the length history, and the first fleet."""

    lengths: LengthModel
    first: tuple[int, ...]


@dataclass(frozen=True)
class LiveArm:
    """Plans, places and resizes as a live router does.

    Attributes:
        settings: Of the run.
        costs: What the planner counts with from the first step on.
    """

    settings: RoutingSettings
    costs: CostModel
    name: str = "elastic"

    @cached_property
    def pool(self) -> PoolSnapshot:
        """What the planner believes of the pool; nothing is parked."""
        return replace(apply(self.costs, self.settings.planning_pool(), Standby({1: 1})), warm={})

    def begin(self, pool: PoolSnapshot, first: Batch) -> Memory:
        """Return an empty history, and the fleet planned from it."""
        empty = Memory(LengthModel(), ())
        warm = replace(pool, warm=dict.fromkeys(pool.perf, pool.num_gpus))
        return empty._replace(first=self.plan(empty, warm, first).fleet)

    def layout(self, memory: Memory, pool: PoolSnapshot) -> Mapping[int, int]:
        """Return the engines of the first fleet."""
        return {tp: memory.first.count(tp) for tp in set(memory.first)}

    def plan(self, memory: Memory, pool: PoolSnapshot, batch: Batch) -> RolloutPlan:
        """Return the planned fleet with a replica for every sample."""
        routing = self._routing(batch, ())
        prediction = routing.predict(memory.lengths, batch)
        believed = replace(self.pool, warm=pool.warm)
        planned = plan_parked_fleet(believed, batch, prediction, self.settings.goal())
        return self._routing(batch, planned.fleet).plan_leased(planned, memory.lengths, self.pool, batch)

    def policy(self, memory: Memory, batch: Batch) -> Policy:
        """Return the decisions during the rollout of a step."""
        return _Deciding(self, memory.lengths)

    def learn(self, memory: Memory, outcome: Outcome) -> Memory:
        """Return the memory with the step's lengths."""
        return memory._replace(lengths=learn(memory.lengths, outcome.batch, outcome.lengths))

    def _routing(self, batch: Batch, fleet: tuple[int, ...]) -> Routing:
        return self.settings.arm(Announcement(batch.step, (), batch.max_response_tokens), fleet)


@dataclass(frozen=True)
class _Deciding:
    arm: LiveArm
    lengths: LengthModel

    def react(self, view: RolloutView, plan: RolloutPlan) -> Reaction:
        """Return what the live policy decides; it sees the pool that the planner believes in."""
        routing = self.arm._routing(view.batch, plan.fleet)
        resizing = self.arm.settings.resizing(routing.policy(self.lengths, view.batch))
        return resizing.react(replace(view, pool=self.arm.pool), plan)
