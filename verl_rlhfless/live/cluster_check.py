"""What a run needs of the cluster's nodes, refused before anything is started on them."""

from __future__ import annotations

import ray
from omegaconf import DictConfig
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.live.budget import check_gpus
from verl_rlhfless.live.devices import warn_of_several_types
from verl_rlhfless.live.host_memory import (
    check_host_memory,
    count_parameters,
    has_tied_embeddings,
    measure_nodes,
    memory_of_run,
)
from verl_rlhfless.live.suspendable import why_lease_is_kept
from verl_rlhfless.policy.host_memory import NodeAccount


def check_cluster(config: DictConfig, settings: RlhflessConfig) -> list[NodeAccount]:
    """Return the account of each node's host memory.

    Raises:
        ConfigError: The run needs more GPUs than the nodes have.
        HostMemoryError: The message names node, holders and shortage.
    """
    nodes = measure_nodes()
    num_gpus = sum(node.num_gpus for node in nodes)
    check_gpus(config, settings, num_gpus)
    warn_of_several_types(ray.cluster_resources())
    model: HFModelConfig = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    kept = why_lease_is_kept(config, settings.pool.suspend_trainer)
    params, is_tied = count_parameters(model), has_tied_embeddings(model.hf_config)
    memory = memory_of_run(config, settings, params, is_tied=is_tied, can_suspend=not kept, num_gpus=num_gpus)
    return check_host_memory(memory, nodes)
