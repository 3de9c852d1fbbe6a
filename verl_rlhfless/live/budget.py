"""How many GPUs trainer and replicas may hold together. Light: the launching process asks before Ray starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.live.suspendable import why_lease_is_kept


@dataclass(frozen=True, slots=True)
class Demand:
    """The fewest GPUs with which a run can work: the trainer's, those of the fleet that it needs, and other pools'.

    Attributes:
        trainer: The trainer's.
        fleet: GPUs of each replica: of the largest scheduled fleet, or of the smallest that may be planned.
        is_planned: Whether fleets are planned.
        kept: Why the trainer never leaves its GPUs; empty if it may.
        others: What verl's other pools hold, by their section.
    """

    trainer: int
    fleet: tuple[int, ...]
    is_planned: bool
    kept: str
    others: Mapping[str, int]

    @classmethod
    def of_run(cls, config: DictConfig, settings: RlhflessConfig, others: Mapping[str, int]) -> Demand:
        """Return what a run with verl's configuration needs beside other pools."""
        planner = settings.planner
        if settings.plans:
            fleet = (min(planner.tensor_parallel_sizes or (1,)),) * planner.min_replicas
        else:
            fleet = (config.actor_rollout_ref.rollout.tensor_model_parallel_size,) * max(planner.schedule)
        trainer = config.trainer.n_gpus_per_node * config.trainer.nnodes
        kept = why_lease_is_kept(config, settings.pool.suspend_trainer)
        return cls(trainer, fleet, settings.plans, kept, others)

    @property
    def total(self) -> int:
        """GPUs that must be there at the same time."""
        return self._leased + sum(self.others.values())

    @property
    def _leased(self) -> int:
        return self.trainer + sum(self.fleet) if self.kept else max(self.trainer, sum(self.fleet))

    @property
    def lowered_by(self) -> str:
        """The keys that ask for less."""
        return f"trainer.n_gpus_per_node or rlhfless.planner.{'min_replicas' if self.is_planned else 'schedule'}"

    def __str__(self) -> str:
        which = "smallest planned" if self.is_planned else "largest scheduled"
        why = f" ({self.kept})" if self.kept else ""
        beside = "".join(f", and {section} holds {count}" for section, count in self.others.items())
        replicas = f"{len(self.fleet)} replicas of {self.fleet[0]} GPUs"
        return f"the trainer's {self.trainer} GPUs and the {which} fleet, {replicas}, need {self._leased}{why}{beside}"


def check_gpus(config: DictConfig, settings: RlhflessConfig, num_gpus: int) -> None:
    """Refuse a run that can't fit into the cluster, before its trainer is built; the cluster may grow by ``max_gpus``.

    One that lacks GPUs even for the trainer grows, too, or the trainer's lease says so.

    Args:
        config: verl's configuration.
        settings: Ours.
        num_gpus: Of all nodes of the cluster now.

    Raises:
        ConfigError: Trainer, the fleet that is needed and verl's other pools are more than that.
    """
    demand = Demand.of_run(config, settings, other_pools(config))
    if settings.pool.max_gpus is None and demand.trainer <= num_gpus < demand.total:
        raise ConfigError(
            "trainer.n_gpus_per_node",
            config.trainer.n_gpus_per_node,
            f"{demand}, and the cluster has {num_gpus} GPUs",
            f"Lower {demand.lowered_by}, use +rlhfless=resident, or for a cluster that grows set "
            "rlhfless.pool.max_gpus to what trainer and replicas may lease.",
        )


def other_pools(config: DictConfig) -> dict[str, int]:
    """Return the GPUs that verl's pools of reward and teacher models hold for the whole run, by their section.

    Args:
        config: verl's configuration.
    """
    reward = config.reward.reward_model
    has_pool = {
        "reward.reward_model": reward.enable and reward.enable_resource_pool,
        "distillation": OmegaConf.select(config, "distillation.enabled"),
    }
    sections = {key: OmegaConf.select(config, key) for key, is_there in has_pool.items() if is_there}
    return {key: section.n_gpus_per_node * section.nnodes for key, section in sections.items()}


def gpu_budget(config: DictConfig, max_gpus: int | None, num_gpus: int) -> int:
    """Return the most GPUs that trainer and replicas may lease together.

    Args:
        config: verl's configuration.
        max_gpus: ``rlhfless.pool.max_gpus``; ``None`` = what verl's other pools leave of the cluster.
        num_gpus: Of the cluster.
    """
    return max(0, num_gpus - sum(other_pools(config).values())) if max_gpus is None else max_gpus
