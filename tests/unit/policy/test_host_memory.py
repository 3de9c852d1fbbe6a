"""The host-memory account: what is counted on which node, and what the user reads when it does not fit."""

from __future__ import annotations

from dataclasses import replace

from verl_rlhfless.policy.host_memory import (
    RANK_BYTES,
    SERVER_BYTES,
    HostMemory,
    Need,
    NodeAccount,
    ReplicaMemory,
    RoleMemory,
    RunMemory,
    StoreMemory,
    TrainerMemory,
    account_node,
    account_run,
    store_need,
)

GIB = 2**30
ROOMY = HostMemory("node-0", 10**13, 10**13, num_gpus=8, is_driver=True)


def run(**changes: object) -> RunMemory:
    """A 7B actor with a frozen reference on two nodes of eight GPUs, and four replicas of two GPUs."""
    made = RunMemory(
        trainer=TrainerMemory(
            roles=(RoleMemory("actor", 28 * GIB, 4), RoleMemory("reference", 14 * GIB, 1)),
            num_ranks=16,
            ranks_per_node=8,
            is_on_host=True,
            copies_at_load=1,
        ),
        store=StoreMemory(28 * GIB, max_versions=2, bucket_bytes=GIB),
        replicas=ReplicaMemory(num_replicas=4, tp=2, state_bytes=0, num_warm=4),
        num_agents=8,
        num_scorers=4,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def needed(account: NodeAccount, what: str) -> int:
    return sum(need.num_bytes for need in account.needs if what in need.what)


def test_every_version_and_what_is_on_its_way_need_room() -> None:
    assert store_need(StoreMemory(7 * GIB, max_versions=2, bucket_bytes=GIB)).num_bytes == 17 * GIB


def test_a_suspended_trainer_brings_its_share_of_every_state_to_each_of_its_nodes() -> None:
    account = account_node(run(), ROOMY, has_trainer=True)
    assert needed(account, "the trainer's state on the host (actor, reference)") == (4 * 28 + 14) * GIB // 2
    assert needed(account, "trainer ranks") == 8 * RANK_BYTES


def test_a_trainer_that_stays_on_its_gpus_brings_none() -> None:
    stays = replace(run().trainer, is_on_host=False)
    assert needed(account_node(run(trainer=stays), ROOMY, has_trainer=True), "on the host") == 0


def test_a_node_without_the_trainer_holds_replicas_and_copies_of_the_weights() -> None:
    account = account_node(run(), replace(ROOMY, is_driver=False), has_trainer=False)
    assert needed(account, "servers of replicas") == 4 * SERVER_BYTES
    assert needed(account, "pulled") == 2 * 28 * GIB
    assert not [need for need in account.needs if "trainer" in need.what or "driver" in need.what]


def test_only_replicas_that_fit_on_a_node_count_there() -> None:
    small = replace(ROOMY, num_gpus=3)
    assert needed(account_node(run(), small, has_trainer=False), "engines of TP2") * 4 == needed(
        account_node(run(), ROOMY, has_trainer=False), "engines of TP2"
    )
    driver = account_node(run(), replace(ROOMY, num_gpus=0), has_trainer=False)
    assert [need.what for need in driver.needs] == [
        "driver, router, data queue and Ray",
        "8 agent-loop workers",
        "4 reward workers",
    ]


def test_loading_whole_copies_can_be_the_worst_moment() -> None:
    whole = replace(run().trainer, copies_at_load=8, is_on_host=False)
    account = account_node(run(trainer=whole), ROOMY, has_trainer=True)
    assert needed(account, "loading a model of 28.00 GiB 8 times at once") == 8 * 28 * GIB
    assert not needed(account, "weight store"), "nothing is stored while models are loaded"


def test_a_larger_moment_that_fits_does_not_hide_an_object_store_that_is_too_small() -> None:
    whole = replace(run().trainer, copies_at_load=16, is_on_host=False)
    small_store = replace(ROOMY, object_store_bytes=10 * GIB)
    account = account_node(run(trainer=whole), small_store, has_trainer=True)
    assert "the weight store" in account.shortage()
    assert needed(account_node(run(trainer=whole), ROOMY, has_trainer=True), "loading a model") == 16 * 28 * GIB


def test_the_trainer_goes_where_it_lacks_least() -> None:
    nodes = [
        replace(ROOMY, node_id=f"node-{i}", available_bytes=size) for i, size in enumerate((10**9, 10**13, 10**13))
    ]
    accounts = account_run(run(), nodes)
    assert [needed(account, "trainer ranks") > 0 for account in accounts] == [False, True, True]


def test_a_node_that_just_fits_is_accepted() -> None:
    node = HostMemory("node", object_store_bytes=10 * GIB, available_bytes=8 * GIB)
    assert NodeAccount(node, (Need("weights", 8 * GIB, is_stored=True),)).shortage() == ""
    assert NodeAccount(node, (Need("weights", 8 * GIB, is_stored=True), Need("server", 1))).shortage()


def test_an_object_store_that_would_spill_is_refused_with_the_shortage() -> None:
    node = HostMemory("node", object_store_bytes=10 * GIB, available_bytes=100 * GIB)
    text = NodeAccount(node, (store_need(StoreMemory(2 * GIB, 2, 2 * GIB)), Need("server", GIB))).shortage()
    assert text.startswith("10.00 GiB of host memory needed (10.00 GiB for the weight store")
    assert "rlhfless.weights.max_versions=2 versions of 2.00 GiB and 3 buckets of 2.00 GiB on their way" in text
    assert "keeps 8.00 GiB in memory (80 % of 10.00 GiB): 2.00 GiB short" in text
    assert f"at least {int(12.5 * GIB) + 1} bytes (--object-store-memory)" in text


SMALL_SHM = replace(ROOMY, shm_bytes=GIB)


def test_engines_that_load_together_need_a_bucket_of_shared_memory_for_each_worker() -> None:
    text = account_node(run(), SMALL_SHM, has_trainer=False).shortage()
    assert "8.00 GiB for 8 engine workers that load weights" in text
    assert "only 1.00 GiB is free in /dev/shm on node node-0: 7.00 GiB short" in text
    assert "--shm-size" in text and "or lower rlhfless.weights.bucket_mib." in text
    assert account_node(run(), replace(SMALL_SHM, shm_bytes=8 * GIB), has_trainer=False).shortage() == ""


def test_weights_in_an_object_store_in_shared_memory_count_there_too() -> None:
    node = replace(SMALL_SHM, is_store_in_shm=True)
    account = account_node(run(), node, has_trainer=False)
    assert "64.00 GiB of shared memory needed (8.00 GiB for" in account.shortage()
    assert "63.00 GiB short" in account.shortage()
    assert "bucket_mib" not in account.shortage(), "smaller buckets alone would not do"
    enough = replace(node, shm_bytes=SMALL_SHM.shm_bytes + account.short_bytes)  # type: ignore[operator]
    assert account_node(run(), enough, has_trainer=False).shortage() == ""


def test_following_the_advice_is_enough() -> None:
    need = store_need(StoreMemory(4 * GIB + 123, 2, GIB))
    text = NodeAccount(HostMemory("node", object_store_bytes=GIB, available_bytes=100 * GIB), (need,)).shortage()
    advised = int(text.split("at least ")[1].split(" bytes")[0])
    assert NodeAccount(HostMemory("node", advised, 100 * GIB), (need,)).shortage() == ""


def test_a_full_host_is_refused_with_every_holder_and_the_shortage() -> None:
    node = HostMemory("0123456789", object_store_bytes=100 * GIB, available_bytes=6 * GIB)
    text = NodeAccount(
        node, (store_need(StoreMemory(3 * GIB, 2, GIB)), Need("2 servers of replicas", 2 * GIB))
    ).shortage()
    assert "9.00 GiB for the weight store" in text and "2.00 GiB for 2 servers of replicas" in text
    assert "only 6.00 GiB is free on node 01234567: 5.00 GiB short" in text
    for key in ("max_versions", "warm_servers", "suspend_trainer=never"):
        assert key in text
