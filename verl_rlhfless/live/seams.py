"""The names of verl that the live system subclasses, overrides or calls, probed before a run.

A verl of the supported range may still be a fork or a snapshot: all missing names and parameters are reported at once,
instead of one after the other from inside a run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from functools import reduce
from typing import Any

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.versions import installed_version


@dataclass(frozen=True, slots=True)
class Seam:
    """A name of verl or its transfer queue: ``module`` + attribute ``path``, and a callable's parameters we rely on."""

    module: str
    path: str
    parameters: tuple[str, ...] = ()


_TRAINER = "verl.trainer.ppo.v1.trainer_base"
_TRAINER_HOOKS = (
    "init",
    "_setup",
    "_init_resource_pool_mgr",
    "_get_n_gpus_for_throughput",
    "_balance_batch",
    "fit",
    "prepare_step",
    "_save_checkpoint",
    "on_init_end",
    "on_step_end",
    "on_sample_begin",
    "on_sample_end",
    "on_validate_begin",
    "on_validate_end",
)
SEAMS = (
    Seam(_TRAINER, "register_trainer", ("name",)),
    Seam(_TRAINER, "get_trainer_cls", ("name",)),
    *(Seam(_TRAINER, f"PPOTrainer.{hook}", ("self",)) for hook in _TRAINER_HOOKS),
    *(
        Seam(_TRAINER, f"PPOTrainer._compute_{phase}", ("batch", "metrics"))
        for phase in ("old_log_prob", "ref_log_prob", "values")
    ),
    Seam("verl.plugin.platform", "PlatformRegistry.register"),
    Seam("verl.single_controller.ray.base", "RayWorkerGroup._init_with_resource_pool", ("resource_pool",)),
    Seam("verl.workers.rollout.router", "GlobalRequestLoadBalancer.add_servers", ("servers",)),
    Seam("verl.workers.rollout.router", "GlobalRequestLoadBalancer.remove_servers", ("server_ids",)),
    Seam("verl.workers.rollout.router", "get_router_handle", ("servers", "router_config_path")),
    Seam("verl.workers.rollout.llm_server", "LLMServerManager.get_client", ("client_cls", "kwargs")),
    Seam("verl.trainer.ppo.v1.agent_loop_tq", "AgentLoopManagerTQ.generate_sequences", ("prompts",)),
    Seam("verl.experimental.agent_loop.agent_loop", "AgentLoopWorker._run_agent_loop", ("trajectory", "agent_name")),
    Seam("verl.checkpoint_engine.base", "CheckpointEngineRegistry.register", ("backend",)),
    Seam("transfer_queue.interface", "_TQ_CONTROLLER"),
)


def check_seams(seams: tuple[Seam, ...] = SEAMS) -> None:
    """Check that the installed verl has every name that we build on.

    Raises:
        UnsupportedError: Some are missing; the message names them and the version.
    """
    problems = [problem for seam in seams if (problem := _problem_of(seam))]
    if problems:
        raise UnsupportedError(
            f"verl={installed_version('verl')}: lacks what the elastic trainer builds on: {'; '.join(problems)}. "
            "Install an unmodified verl of the supported range: pip install --force-reinstall --no-deps verl==0.9.1"
        )


_ESTIMATOR_NEEDS = {
    "remax": "reward_baselines",
    "gdpo": "gdpo",
    "optimal_token_baseline": "sum_pi_squared",
    "tir_optimal_token_baseline": "sum_pi_squared",
}
"""What verl's trainer has to hand to an advantage estimator beyond rewards, masks and groups."""


def check_estimator(name: str) -> None:
    """Check that verl's v1 trainer gives an advantage estimator what it needs; else the first step ends in an error.

    Raises:
        UnsupportedError: It doesn't.
    """
    needed = _ESTIMATOR_NEEDS.get(name)
    if needed is not None and needed not in inspect.getsource(importlib.import_module(_TRAINER)):
        raise UnsupportedError(
            f"algorithm.adv_estimator={name!r}: verl={installed_version('verl')} has this estimator, but its v1 "
            "trainer never gives it what it needs, with or without this plugin. Choose another one, or verl's v0 "
            "trainer (+rlhfless=off trainer.use_v1=False)."
        )


def check_prefix_grouper() -> None:
    """Check that verl's engines share the prefix of a group in the forward pass, as its prefix grouper does.

    Raises:
        UnsupportedError: They don't; the message says what is missing.
    """
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    if "prefix_grouper" not in inspect.getsource(engine):
        raise UnsupportedError(
            f"rlhfless.prefix_dedup.training='prefix_grouper': verl={installed_version('verl')} has a prefix grouper "
            "that the engines of its v1 trainer never call. Set rlhfless.prefix_dedup.training=off: the rollout still "
            "computes each prefix once."
        )
    if importlib.util.find_spec("prefix_grouper") is None:
        raise UnsupportedError(
            "rlhfless.prefix_dedup.training='prefix_grouper': the package prefix_grouper is not installed. Install it, "
            "or set rlhfless.prefix_dedup.training=off."
        )


def _problem_of(seam: Seam) -> str | None:
    name = f"{seam.module}.{seam.path}"
    try:
        target: Any = reduce(getattr, seam.path.split("."), importlib.import_module(seam.module))
    except (ImportError, AttributeError) as error:
        return f"{name} ({error})"
    found = inspect.signature(target).parameters if seam.parameters else {}
    missing = [parameter for parameter in seam.parameters if parameter not in found]
    return f"{name} has no parameter {', '.join(missing)}" if missing else None
