"""The host memory that a run needs on each node: weights in the store, engines, servers, and a trainer on the host.

One account for all that share a node. Pure arithmetic on what is known before anything starts; the bytes of processes
are constants, measured by ``benchmarks/host_memory.py`` on CPU.

Invariants: what one holder needs is one ``Need``; a node is short if its needs are more than its free memory, those
inside Ray's object store more than what the store keeps before it spills, or those in ``/dev/shm`` more than is free
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SPILL_THRESHOLD = 0.8
"""Share of its object store that Ray fills before it writes objects to disk (Ray's ``object_spilling_threshold``)."""

IN_FLIGHT = 2
"""Buckets that the publisher has given to Ray and the store has not copied yet."""

TRAINED_COPIES = 4
"""A trained model in units of its weights: weights, gradients, and Adam's two moments."""

PINNED_COPIES = 2
"""A model that FSDP1 offloads in units of its weights: it pins room for gradients too, also where none are computed."""

_MIB, _GIB = 2**20, 2**30
DRIVER_BYTES = 2950 * _MIB
"""The launching process, the trainer's own, router, data queue, weight store, and Ray with its waiting workers."""
AGENT_BYTES = 550 * _MIB
"""One agent-loop worker."""
SCORER_BYTES = 330 * _MIB
"""One reward worker."""
RANK_BYTES = 450 * _MIB
"""One rank of the trainer, without its share of the models."""
SERVER_BYTES = 740 * _MIB
"""One server actor after its imports, with its fork server."""
ENGINE_BYTES = 300 * _MIB
"""The core process of one engine."""
ENGINE_WORKER_BYTES = 220 * _MIB
"""One worker process of an engine, without weights, keys and values."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """One model of the trainer.

    Attributes:
        name: Actor, reference or critic.
        model_bytes: One copy of its weights, as the trainer keeps them.
        num_copies: All of its state, in units of its weights.
    """

    name: str
    model_bytes: int
    num_copies: int

    @property
    def num_bytes(self) -> int:
        """All of its state, over all ranks."""
        return self.model_bytes * self.num_copies


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """The trainer's ranks.

    Attributes:
        roles: The models that every rank holds a share of.
        num_ranks: Over all nodes.
        ranks_per_node: On each of the trainer's nodes.
        is_on_host: Whether the state is ever on the host: the trainer is suspended, or its device is the host.
        copies_at_load: Whole copies that the ranks of a node hold at once while a model is loaded.
    """

    roles: tuple[RoleMemory, ...]
    num_ranks: int
    ranks_per_node: int
    is_on_host: bool
    copies_at_load: int

    @property
    def num_nodes(self) -> int:
        """Nodes of the trainer."""
        return self.num_ranks // self.ranks_per_node


@dataclass(frozen=True, slots=True)
class StoreMemory:
    """The weight store.

    Attributes:
        model_bytes: One version.
        max_versions: Held at once.
        bucket_bytes: What is copied at a time.
    """

    model_bytes: int
    max_versions: int
    bucket_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """The rollout replicas.

    Attributes:
        num_replicas: Most at one time.
        tp: GPUs of each.
        state_bytes: What the workers of one replica keep on the host: weights, keys and values, on a device that is the
            host.
        num_warm: Server actors that wait for a replica.
    """

    num_replicas: int
    tp: int
    state_bytes: int
    num_warm: int


@dataclass(frozen=True, slots=True)
class RunMemory:
    """All that a run puts on its nodes.

    Attributes:
        trainer: Its ranks.
        store: Its weights.
        replicas: Its engines.
        num_agents: Agent-loop workers, on the driver's node.
        num_scorers: Reward workers, on the driver's node.
    """

    trainer: TrainerMemory
    store: StoreMemory
    replicas: ReplicaMemory
    num_agents: int
    num_scorers: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of a node before the run takes any.

    Attributes:
        node_id: Ray's name of the node.
        object_store_bytes: Capacity of Ray's object store on the node.
        available_bytes: Memory that processes can still get without swapping. The object store's own pages count
            as available until something is stored in them.
        num_gpus: Accelerators of the node.
        is_driver: Whether the trainer's own process runs there.
        shm_bytes: Free in ``/dev/shm``, of which a container has little; ``None`` = not measured.
        is_store_in_shm: Whether Ray's object store takes its memory there, too.
    """

    node_id: str
    object_store_bytes: int
    available_bytes: int
    num_gpus: int = 0
    is_driver: bool = False
    shm_bytes: int | None = None
    is_store_in_shm: bool = False


@dataclass(frozen=True, slots=True)
class Need:
    """What one holder needs on a node.

    Attributes:
        what: The holder, in the user's words.
        num_bytes: Its memory.
        is_stored: Whether it is inside Ray's object store.
        is_in_shm: Whether it is in ``/dev/shm`` wherever the object store is.
    """

    what: str
    num_bytes: int
    is_stored: bool = False
    is_in_shm: bool = False


@dataclass(frozen=True, slots=True)
class NodeAccount:
    """A node and all that the run needs on it at the same time."""

    node: HostMemory
    needs: tuple[Need, ...]

    @property
    def num_bytes(self) -> int:
        """All needs together."""
        return sum(need.num_bytes for need in self.needs)

    @property
    def short_bytes(self) -> int:
        """Bytes that the node lacks; 0 when it has room."""
        stored = self._stored_bytes - self._store_room_bytes
        return max(0, self.num_bytes - self.node.available_bytes, stored, self._shm_short_bytes)

    @property
    def _stored_bytes(self) -> int:
        return sum(need.num_bytes for need in self.needs if need.is_stored)

    @property
    def _store_room_bytes(self) -> int:
        return int(self.node.object_store_bytes * SPILL_THRESHOLD)

    @property
    def _in_shm(self) -> list[Need]:
        return [need for need in self.needs if need.is_in_shm or (need.is_stored and self.node.is_store_in_shm)]

    @property
    def _buffer_bytes(self) -> int:
        return sum(need.num_bytes for need in self.needs if need.is_in_shm)

    @property
    def _shm_short_bytes(self) -> int:
        if self.node.shm_bytes is None:
            return 0
        return max(0, sum(need.num_bytes for need in self._in_shm) - self.node.shm_bytes)

    def shortage(self) -> str:
        """Return what is needed, what there is, and what to do; empty when the node has room."""
        if self._stored_bytes > self._store_room_bytes:
            return self._store_shortage()
        if self._shm_short_bytes:
            return self._shm_shortage()
        if self.num_bytes > self.node.available_bytes:
            return (
                f"{_listed(self.needs)}, but only {_gib(self.node.available_bytes)} is free on node "
                f"{self.node.node_id[:8]}: {_gib(self.num_bytes - self.node.available_bytes)} short. Free memory "
                "there, raise the limit of its container if it has one, or lower rlhfless.weights.max_versions, "
                "rlhfless.pool.warm_servers or the number of replicas; rlhfless.pool.suspend_trainer=never keeps the "
                "state of a trainer on GPUs off the host."
            )
        return ""

    def _store_shortage(self) -> str:
        stored = [need for need in self.needs if need.is_stored]
        enough = int(self._stored_bytes / SPILL_THRESHOLD) + 1
        in_shm = enough + self._buffer_bytes
        return (
            f"{_listed(stored)}, but Ray's object store on node {self.node.node_id[:8]} keeps "
            f"{_gib(self._store_room_bytes)} in memory (80 % of {_gib(self.node.object_store_bytes)}): "
            f"{_gib(self._stored_bytes - self._store_room_bytes)} short. Start Ray with an object store of at "
            f"least {enough} bytes (--object-store-memory), for which /dev/shm needs {_gib(in_shm)}, or lower "
            "rlhfless.weights.max_versions."
        )

    def _shm_shortage(self) -> str:
        helps = ["rlhfless.weights.bucket_mib"] if self._shm_short_bytes < self._buffer_bytes else []
        helps += ["rlhfless.weights.max_versions"] if self.node.is_store_in_shm else []
        return (
            f"{_listed(self._in_shm, 'shared memory')}, but only {_gib(self.node.shm_bytes or 0)} is free in /dev/shm "
            f"on node {self.node.node_id[:8]}: {_gib(self._shm_short_bytes)} short. Enlarge it by that (docker run "
            "--shm-size; in Kubernetes a larger volume of medium Memory), or remove what stopped runs left there"
            f"{', or lower ' + ' or '.join(helps) if helps else ''}."
        )


def store_need(store: StoreMemory) -> Need:
    """Return what the store needs on the publisher's node: every version it may hold, and what is on its way into it.

    That is the publisher's staging buffer, and the buckets in flight.
    """
    num_bytes = store.max_versions * store.model_bytes + (1 + IN_FLIGHT) * store.bucket_bytes
    what = (
        f"the weight store (rlhfless.weights.max_versions={store.max_versions} versions of {_gib(store.model_bytes)} "
        f"and {1 + IN_FLIGHT} buckets of {_gib(store.bucket_bytes)} on their way)"
    )
    return Need(what, num_bytes, is_stored=True)


def account_run(run: RunMemory, nodes: Sequence[HostMemory]) -> list[NodeAccount]:
    """Return the account of every node.

    Ray chooses the trainer's nodes: taken are those that lack least with it, among those with enough GPUs.
    """
    capable = [node for node in nodes if node.num_gpus >= run.trainer.ranks_per_node]
    ranked = sorted(capable, key=lambda node: (account_node(run, node, has_trainer=True).short_bytes, node.node_id))
    trainers = {node.node_id for node in ranked[: run.trainer.num_nodes]}
    return [account_node(run, node, has_trainer=node.node_id in trainers) for node in nodes]


def account_node(run: RunMemory, node: HostMemory, *, has_trainer: bool) -> NodeAccount:
    """Return the account of one node: while models are loaded, or while it trains.

    The one that lacks more, or needs more where neither lacks anything.
    """
    needs = [need for need in (*_driver_needs(run, node), *_replica_needs(run, node)) if need.num_bytes]
    if not has_trainer:
        copies = run.store.max_versions * run.store.model_bytes
        pulled = [Need("weights that its replicas pulled", copies, is_stored=True)] if _replica_needs(run, node) else []
        return NodeAccount(node, (*needs, *pulled))
    ranks = Need(f"{run.trainer.ranks_per_node} trainer ranks", run.trainer.ranks_per_node * RANK_BYTES)
    state, load = _trainer_state(run.trainer), _trainer_load(run.trainer)
    later = (*needs, ranks, store_need(run.store), *([state] if state.num_bytes else []))
    driver = [need for need in _driver_needs(run, node) if need.num_bytes]
    accounts = (NodeAccount(node, later), NodeAccount(node, (*driver, ranks, load)))
    return max(accounts, key=lambda account: (account.short_bytes, account.num_bytes))


def _driver_needs(run: RunMemory, node: HostMemory) -> list[Need]:
    if not node.is_driver:
        return []
    return [
        Need("driver, router, data queue and Ray", DRIVER_BYTES),
        Need(f"{run.num_agents} agent-loop workers", run.num_agents * AGENT_BYTES),
        Need(f"{run.num_scorers} reward workers", run.num_scorers * SCORER_BYTES),
    ]


def _replica_needs(run: RunMemory, node: HostMemory) -> list[Need]:
    """Return the needs of the replicas that fit on the node."""
    replicas, here = run.replicas, min(run.replicas.num_replicas, node.num_gpus // run.replicas.tp)
    if not here:
        return []
    servers = max(here, min(replicas.num_warm, replicas.num_replicas))
    processes = ENGINE_BYTES + replicas.tp * ENGINE_WORKER_BYTES
    buffers = f"{here * replicas.tp} engine workers that load weights, a bucket each"
    return [
        Need(f"{servers} servers of replicas", servers * SERVER_BYTES),
        Need(f"{here} engines of TP{replicas.tp}", here * (processes + replicas.state_bytes)),
        Need(buffers, here * replicas.tp * run.store.bucket_bytes, is_in_shm=True),
    ]


def _trainer_state(trainer: TrainerMemory) -> Need:
    total = sum(role.num_bytes for role in trainer.roles) if trainer.is_on_host else 0
    names = ", ".join(role.name for role in trainer.roles)
    return Need(f"the trainer's state on the host ({names})", total * trainer.ranks_per_node // trainer.num_ranks)


def _trainer_load(trainer: TrainerMemory) -> Need:
    largest = max(role.model_bytes for role in trainer.roles)
    what = f"loading a model of {_gib(largest)} {trainer.copies_at_load} times at once"
    return Need(what, trainer.copies_at_load * largest)


def _listed(needs: Sequence[Need], memory: str = "host memory") -> str:
    total = sum(need.num_bytes for need in needs)
    parts = "; ".join(f"{_gib(need.num_bytes)} for {need.what}" for need in needs)
    return f"{_gib(total)} of {memory} needed ({parts})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
