"""Every arm has the recipe's budget, and what is impossible on it is refused with what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.ab.arms import NAMES, build_arms, default_split, parse_names
from verl_rlhfless.ab.probe import RecipeFacts
from verl_rlhfless.errors import ConfigError

FACTS = RecipeFacts(
    gpus_per_node=8, nnodes=1, tp=1, prompts=64, samples=8, mini_batch=32, epochs=1, seed=None, is_fp32=False,
    has_switch=True, can_leave=True, extra_gpus=0, ray_limits=(), environment={},
)  # fmt: skip


def values(overrides: tuple[str, ...]) -> dict[str, str]:
    return {key.lstrip("+"): value for key, _, value in (item.partition("=") for item in overrides)}


def _gpus(chosen: dict[str, str], part: str) -> int:
    return int(chosen[f"{part}.nnodes"]) * int(chosen[f"{part}.n_gpus_per_node"])


def test_names_are_checked_and_sync_is_stock() -> None:
    assert parse_names("sync, elastic") == ("stock", "elastic")
    for text, says in [("stok", "must be among stock, colocate_async"), ("stock,sync", "once"), ("", "must be among")]:
        with pytest.raises(ConfigError, match=says):
            parse_names(text)


def test_stock_arms_switch_everything_of_ours_off_and_ours_choose_our_trainer() -> None:
    for arm in build_arms(NAMES, FACTS, None, ["rlhfless.x=1"]):
        chosen = values(arm.overrides)
        is_ours = chosen["rlhfless"] != "off"
        assert arm.is_ours == is_ours == (chosen["trainer.v1.trainer_mode"] == "rlhfless_sync")
        assert ("rlhfless.x" in chosen) == is_ours, "plugin overrides are for the plugin's arms"
        assert arm.is_asynchronous == ("async" in arm.name)


def test_where_the_trainer_stays_the_elastic_arm_divides_the_recipes_gpus() -> None:
    (arm,) = build_arms(["elastic"], replace(FACTS, tp=2, can_leave=False), None, [])
    chosen = values(arm.overrides)
    assert (chosen["trainer.n_gpus_per_node"], chosen["trainer.nnodes"]) == ("4", "1")
    assert chosen["rlhfless.pool.max_gpus"] == "8"
    (given,) = build_arms(["elastic"], FACTS, 2, [])
    assert values(given.overrides)["trainer.n_gpus_per_node"] == "2"


def test_a_trainer_with_all_gpus_leaves_them_to_replicas_during_rollouts() -> None:
    two = replace(FACTS, gpus_per_node=2, tp=2)
    for facts, asked in [(replace(FACTS, tp=2), 8), (FACTS, None), (two, None), (replace(two, can_leave=False), None)]:
        (arm,) = build_arms(["elastic"], facts, asked, [])
        chosen = values(arm.overrides)
        assert chosen["trainer.n_gpus_per_node"] == str(facts.gpus_per_node)
    with pytest.raises(ConfigError, match="a replica needs 4 GPUs and the recipe has 2"):
        build_arms(["elastic"], replace(FACTS, gpus_per_node=2, tp=4), None, [])


def test_separate_async_divides_them_too_on_several_nodes_along_nodes_or_along_each() -> None:
    cluster = replace(FACTS, nnodes=4)
    for trainer, expected in [(16, ("4", "4", "4", "4")), (8, ("4", "2", "4", "6"))]:
        (arm,) = build_arms(["separate_async_switch"], cluster, trainer, [])
        chosen = values(arm.overrides)
        rollout = "actor_rollout_ref.rollout"
        keys = ("trainer.nnodes", "trainer.n_gpus_per_node", f"{rollout}.nnodes", f"{rollout}.n_gpus_per_node")
        assert tuple(chosen[key] for key in keys) == expected
        assert chosen["trainer.v1.separate_async.parameter_sync_step"] == "2"
        assert chosen["trainer.v1.separate_async.hybrid_rollout.enable_switch"] == "True"
    narrow = replace(FACTS, gpus_per_node=1, nnodes=4)
    chosen = values(build_arms(["separate_async"], narrow, 1, [])[0].overrides)
    assert (chosen["trainer.nnodes"], chosen["actor_rollout_ref.rollout.nnodes"]) == ("1", "3")


@given(
    per_node=st.integers(1, 8),
    nnodes=st.integers(1, 4),
    tp=st.sampled_from([1, 2, 4]),
    mini=st.integers(1, 64),
    trainer=st.none() | st.integers(-1, 40),
)
def test_whatever_is_asked_the_budget_is_kept_or_refused(
    per_node: int, nnodes: int, tp: int, mini: int, trainer: int | None
) -> None:
    facts = replace(FACTS, gpus_per_node=per_node, nnodes=nnodes, tp=tp, mini_batch=mini)
    try:
        elastic, separate = build_arms(["elastic", "separate_async"], facts, trainer, [])
    except ConfigError as error:
        assert error.key in ("--trainer-gpus", "trainer.n_gpus_per_node")
        return
    chosen, beside, budget = values(elastic.overrides), values(separate.overrides), per_node * nnodes
    rollout = _gpus(beside, "actor_rollout_ref.rollout")
    assert int(chosen["rlhfless.pool.max_gpus"]) == _gpus(beside, "trainer") + rollout == budget
    for kept in (_gpus(chosen, "trainer"), _gpus(beside, "trainer")):
        assert kept == budget or (kept >= 1 and mini * facts.samples % kept == 0)


@pytest.mark.parametrize(
    ("facts", "trainer_gpus", "says"),
    [
        (replace(FACTS, gpus_per_node=1), None, "1 GPUs are too few"),
        (FACTS, 8, r"--trainer-gpus=8: must be >= 1 and leave.*Try --trainer-gpus 4"),
        (FACTS, 0, "must be >= 1"),
        (replace(FACTS, tp=4), 2, "leaves 6 GPUs, which replicas of 4 GPUs do not fill"),
        (replace(FACTS, nnodes=2), 5, "same number on each of 2 nodes"),
        (replace(FACTS, mini_batch=1), 3, "must divide the 8 samples of a mini batch"),
    ],
)
def test_an_impossible_split_is_refused(facts: RecipeFacts, trainer_gpus: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_arms(["separate_async"], facts, trainer_gpus, [])


def test_arms_that_verl_or_the_host_cannot_run_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"separate_async'.*needs a collective weight transfer"):
        build_arms(["separate_async"], replace(FACTS, environment={"VERL_PLATFORM": "cpu"}), None, [])
    with pytest.raises(ConfigError, match="cannot lend idle trainer GPUs"):
        build_arms(["separate_async_switch"], replace(FACTS, has_switch=False), None, [])


def test_the_default_leaves_at_least_half_to_the_rollout() -> None:
    assert default_split(FACTS) == 4
    assert default_split(replace(FACTS, gpus_per_node=6, tp=4)) == 2
    assert default_split(replace(FACTS, gpus_per_node=1)) is None
