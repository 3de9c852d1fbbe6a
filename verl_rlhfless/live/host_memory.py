"""Measures the nodes and describes the run for the account of ``policy/host_memory.py``; refuses what does not fit."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from typing import Any

import ray
from omegaconf import DictConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_rlhfless.config import RlhflessConfig
from verl_rlhfless.errors import HostMemoryError, WeightStoreError
from verl_rlhfless.live.available_memory import available_bytes
from verl_rlhfless.live.budget import gpu_budget
from verl_rlhfless.policy.host_memory import (
    PINNED_COPIES,
    TRAINED_COPIES,
    HostMemory,
    NodeAccount,
    ReplicaMemory,
    RoleMemory,
    RunMemory,
    StoreMemory,
    TrainerMemory,
    account_run,
    store_need,
)

_SHM = "/dev/shm"
_ANSWER_S = 60.0  # the first task on a node waits for a worker process
_DTYPE_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
_VLLM_CPU_KV_GIB = "VLLM_CPU_KVCACHE_SPACE"


def measure_host_memory(num_gpus: int = 0, is_driver: bool = False) -> HostMemory:
    """Return the memory of this node; call it in a process there."""
    node_id = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == node_id]
    stored, shm = int(node["Resources"]["object_store_memory"]), shutil.disk_usage(_SHM)
    # Ray puts its object store elsewhere only where it is larger than that.
    return HostMemory(node_id, stored, available_bytes(), num_gpus, is_driver, shm.free, shm.total >= stored)


def measure_nodes() -> list[HostMemory]:
    """Return the memory of every node with accelerators, and of this process's own."""
    from verl_rlhfless.live.accelerator import Accelerator

    resource, driver = Accelerator.of_platform().resource, ray.get_runtime_context().get_node_id()
    answers = []
    for node in ray.nodes():
        num_gpus, node_id = int(node["Resources"].get(resource, 0)), node["NodeID"]
        if node["Alive"] and (num_gpus or node_id == driver):
            affinity = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            measure = ray.remote(num_cpus=0)(measure_host_memory).options(scheduling_strategy=affinity)
            answers.append(measure.remote(num_gpus, node_id == driver))
    measured: list[HostMemory] = ray.get(answers, timeout=_ANSWER_S)
    return measured


def check_host_memory(run: RunMemory, nodes: Sequence[HostMemory]) -> list[NodeAccount]:
    """Return the account of every node.

    Raises:
        HostMemoryError: A node lacks memory; the message names it, what needs it, the shortage, and what to do.
    """
    accounts = account_run(run, nodes)
    shortages = [account.shortage() for account in accounts if account.short_bytes]
    if shortages:
        raise HostMemoryError(" | ".join(shortages))
    return accounts


def check_store(store: StoreMemory, memory: HostMemory) -> None:
    """Refuse weights that don't fit, as soon as their exact size is known.

    Raises:
        WeightStoreError: The message names what is needed, what there is, the shortage, and what to do.
    """
    if shortage := NodeAccount(memory, (store_need(store),)).shortage():
        raise WeightStoreError(shortage)


def memory_of_run(
    config: DictConfig, settings: RlhflessConfig, params: int, *, is_tied: bool, can_suspend: bool, num_gpus: int
) -> RunMemory:
    """Return what a run of ``verl.trainer.main_ppo`` puts on its nodes.

    Args:
        config: verl's configuration.
        settings: Ours.
        params: Number of the model's parameters.
        is_tied: Whether input and output embeddings of the model are one tensor.
        can_suspend: Whether the trainer may leave its devices for the host.
        num_gpus: Of the cluster.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.device import get_device_name

    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    is_host_device = str(get_device_name()) == "cpu"
    weights = params * _bytes_of(_weight_dtype(actor))
    roles = [RoleMemory("actor", weights, TRAINED_COPIES)]
    if need_reference_policy(config):
        ref = config.actor_rollout_ref.ref
        copies = PINNED_COPIES if ref.strategy == "fsdp" else 1
        roles.append(RoleMemory("reference", params * _bytes_of(_weight_dtype(ref)), copies))
    if need_critic(config):
        roles.append(RoleMemory("critic", weights, TRAINED_COPIES))  # verl starts it from a model of its own size
    tp = rollout.tensor_model_parallel_size
    fleet = _most_replicas(config, settings, num_gpus, can_suspend)
    warm = settings.pool.warm_servers
    ranks_per_node = config.trainer.n_gpus_per_node
    kv_bytes = int(float(os.environ.get(_VLLM_CPU_KV_GIB, "0")) * 2**30) * tp
    return RunMemory(
        trainer=TrainerMemory(
            roles=tuple(roles),
            num_ranks=ranks_per_node * config.trainer.nnodes,
            ranks_per_node=ranks_per_node,
            is_on_host=can_suspend or is_host_device,
            # With tied embeddings every rank of FSDP loads the whole model; Megatron's read one parameter at a time.
            copies_at_load=ranks_per_node if is_tied and actor.strategy != "megatron" else 1,
        ),
        # What few weights stay wider is not counted.
        store=StoreMemory(
            min(weights, params * _bytes_of(rollout.dtype)),
            settings.weights.max_versions,
            settings.weights.bucket_mib << 20,
        ),
        replicas=ReplicaMemory(
            num_replicas=fleet,
            tp=tp,
            state_bytes=params * _bytes_of(rollout.dtype) + kv_bytes if is_host_device else 0,
            num_warm=fleet if warm is None else warm,
        ),
        num_agents=rollout.agent.num_workers,
        num_scorers=config.reward.num_workers,
    )


def _most_replicas(config: DictConfig, settings: RlhflessConfig, num_gpus: int, can_suspend: bool) -> int:
    """Return the size of the largest fleet that may be asked for."""
    planner = settings.planner
    if not settings.plans:
        return max(planner.schedule)
    budget = gpu_budget(config, settings.pool.max_gpus, num_gpus)
    for_replicas = budget if can_suspend else budget - config.trainer.n_gpus_per_node * config.trainer.nnodes
    smallest = min(planner.tensor_parallel_sizes or (config.actor_rollout_ref.rollout.tensor_model_parallel_size,))
    return max(1, min(for_replicas // smallest, planner.max_replicas or for_replicas))


def count_parameters(model: Any) -> int:
    """Return the number of parameters of verl's ``HFModelConfig``, without making the model.

    Attention is eager, which has no parameters of its own and needs no GPU: the driver's node may have none.
    """
    import torch
    from verl.utils.model import get_hf_auto_model_class

    hf_config = copy.deepcopy(model.hf_config)
    auto_class, trust = get_hf_auto_model_class(hf_config), model.trust_remote_code
    with torch.device("meta"):
        made = auto_class.from_config(hf_config, trust_remote_code=trust, attn_implementation="eager")
    return sum(parameter.numel() for parameter in made.parameters())


def has_tied_embeddings(hf_config: Any) -> bool:
    """Return whether input and output embeddings of a model are one tensor; not every configuration says so itself."""
    named_by = hf_config if hasattr(hf_config, "tie_word_embeddings") else hf_config.get_text_config()
    return bool(getattr(named_by, "tie_word_embeddings", False))


def _weight_dtype(role: Any) -> str | None:
    """Return the type in which the engine of a role keeps its weights; FSDP's ``dtype`` is what it computes in."""
    dtype: str | None = role.megatron.dtype if role.strategy == "megatron" else role.fsdp_config.model_dtype
    return dtype


def _bytes_of(dtype: str | None) -> int:
    return _DTYPE_BYTES.get(str(dtype), 4)  # verl's default is fp32
