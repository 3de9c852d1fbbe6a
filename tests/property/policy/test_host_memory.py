"""Properties of the host-memory account over any run and node."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.policy.host_memory import (
    HostMemory,
    NodeAccount,
    ReplicaMemory,
    RoleMemory,
    RunMemory,
    StoreMemory,
    TrainerMemory,
    account_node,
    account_run,
)

BYTES = st.integers(0, 10**12)
COUNTS = st.integers(1, 64)


@st.composite
def runs(draw: st.DrawFn) -> RunMemory:
    per_node = draw(COUNTS)
    roles = draw(st.lists(st.builds(RoleMemory, st.just("role"), BYTES, st.integers(1, 4)), min_size=1, max_size=3))
    return RunMemory(
        TrainerMemory(tuple(roles), per_node * draw(st.integers(1, 4)), per_node, draw(st.booleans()), draw(COUNTS)),
        StoreMemory(draw(BYTES), draw(st.integers(1, 2)), draw(BYTES)),
        ReplicaMemory(draw(COUNTS), draw(COUNTS), draw(BYTES), draw(COUNTS)),
        draw(COUNTS),
        draw(COUNTS),
    )


NODES = st.builds(
    HostMemory, st.uuids().map(str), BYTES, BYTES, st.integers(0, 64), st.booleans(), BYTES, st.booleans()
)


@given(runs(), NODES, st.booleans())
def test_a_node_is_refused_exactly_when_it_is_short(run: RunMemory, node: HostMemory, has_trainer: bool) -> None:
    account = account_node(run, node, has_trainer=has_trainer)
    assert bool(account.shortage()) == (account.short_bytes > 0)
    assert account.num_bytes == sum(need.num_bytes for need in account.needs)


@given(runs(), NODES, st.booleans(), BYTES)
def test_more_memory_never_refuses_what_fitted(run: RunMemory, node: HostMemory, has_trainer: bool, more: int) -> None:
    account = account_node(run, node, has_trainer=has_trainer)
    bigger = replace(
        node,
        available_bytes=node.available_bytes + more,
        object_store_bytes=node.object_store_bytes + more,
        shm_bytes=(node.shm_bytes or 0) + more,
    )
    assert NodeAccount(bigger, account.needs).short_bytes <= account.short_bytes


@given(runs(), NODES, st.booleans(), BYTES)
def test_a_larger_model_never_lacks_or_needs_less(
    run: RunMemory, node: HostMemory, has_trainer: bool, more: int
) -> None:
    larger = replace(run, store=replace(run.store, model_bytes=run.store.model_bytes + more))
    before, after = (account_node(each, node, has_trainer=has_trainer) for each in (run, larger))
    assert (after.short_bytes, after.num_bytes) >= (before.short_bytes, before.num_bytes)


@given(runs(), st.lists(NODES, min_size=1, max_size=6))
def test_every_node_is_accounted_and_the_trainer_is_on_at_most_its_own(run: RunMemory, nodes: list[HostMemory]) -> None:
    accounts = account_run(run, nodes)
    assert [account.node for account in accounts] == nodes
    with_trainer = [account for account in accounts if any("trainer ranks" in need.what for need in account.needs)]
    capable = [node for node in nodes if node.num_gpus >= run.trainer.ranks_per_node]
    assert len(with_trainer) == min(run.trainer.num_nodes, len(capable))
