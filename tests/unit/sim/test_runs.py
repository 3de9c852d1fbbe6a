"""Whole simulated runs: what must add up, what must not be hidden, what must be reproducible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.ledger import account, usd
from verl_rlhfless.policy.baselines.rlhfless_paper import History, RlhflessPaper
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.goal import Goal
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.sim.cell import ARMS
from verl_rlhfless.sim.cluster import CLUSTERS
from verl_rlhfless.sim.records import RunRecord
from verl_rlhfless.sim.report import cell_record, settings, table
from verl_rlhfless.sim.run import ArmRun
from verl_rlhfless.types import BusySpan, GpuSeconds, LeaseSpan, Window

DATA = steps(2, 32, 4, mean=900.0)


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_accounts_for_each_leased_second_and_every_token(arm: str) -> None:
    one = cell(DATA)
    record = one.run(one.arm(arm))
    for step, data in zip(record.steps, DATA, strict=True):
        assert step.gpu_s_busy + step.gpu_s_idle + step.gpu_s_startup == pytest.approx(step.gpu_s_allocated)
        assert step.tokens == data.lengths.sum()
        assert 0 < step.gen_s < step.step_s
        assert step.gpu_s_allocated <= 16 * step.step_s * (1 + 1e-9)
    inside = sum(step.gpu_s_allocated for step in record.steps)
    start = record.gpu_s_allocated - inside
    assert 16 * one.times.cold_start_s < start <= 16 * (record.init_s - one.times.grant_s) * (1 + 1e-9)
    assert record.max_gpus == 16


def test_engines_that_need_fewer_gpus_than_the_trainer_start_on_their_own_leases() -> None:
    one = cell(DATA)
    full, half = one.run(RlhflessPaper(num_actors=8, tp=2)), one.run(RlhflessPaper(num_actors=4, tp=2))

    def start_gpu_s(record: RunRecord) -> float:
        return record.gpu_s_allocated - sum(step.gpu_s_allocated for step in record.steps)

    assert start_gpu_s(full) == pytest.approx(16 * 2 * one.times.cold_start_s)
    assert start_gpu_s(half) < 0.8 * start_gpu_s(full)


def test_engines_beyond_the_trainers_gpus_start_on_leases_of_their_own() -> None:
    one = cell(DATA, "h100-16-spot")
    record = one.run(RlhflessPaper(num_actors=16, tp=1))
    started = record.gpu_s_allocated - sum(step.gpu_s_allocated for step in record.steps)
    times = one.times
    assert started == pytest.approx(8 * (2 * times.cold_start_s + times.grant_s) + 8 * times.cold_start_s)
    assert record.steps[0].gpu_s_startup < 16 * times.cold_start_s  # all of them wake


def test_engines_on_a_node_that_is_down_are_not_waited_for() -> None:
    down = replace(CLUSTERS["h100-16-spot"], outages=(((0.0, 5000.0),),))
    one = cell(DATA, down)
    record = one.run(RlhflessPaper(num_actors=16, tp=1))
    assert record.init_s == pytest.approx(2 * (one.times.cold_start_s + one.times.grant_s))
    assert record.max_gpus == 8


def test_a_fixed_fleet_shrinks_to_what_an_outage_leaves_and_grows_again() -> None:
    outage = (((130.0, 200.0),),)
    one = cell(steps(5, 32, 4, mean=900.0), replace(CLUSTERS["h100-16-spot"], outages=outage))
    fleets = [step.fleet for step in one.run(RlhflessPaper(num_actors=16, tp=1)).steps]
    assert fleets[0] == fleets[-1] == "16xTP1"
    assert "8xTP1" in fleets
    assert RlhflessPaper(4, 8).plan(History(), replace(one.pool, num_gpus=4), DATA[0].batch).fleet == (8,)


def test_the_whole_runs_bill_holds_the_minimum_that_ends_after_it_and_steps_bill_what_they_are_billed() -> None:
    one = cell(DATA, replace(CLUSTERS["h100-16"], min_billing_s=3600.0))
    record = one.run(RlhflessPaper(num_actors=2, tp=4))
    assert record.wall_s < 3600
    assert record.node_usd == pytest.approx(16 * one.cluster.usd_per_gpu_h)
    for step in record.steps:
        assert step.node_usd == pytest.approx(usd(16 * step.step_s, one.cluster.usd_per_gpu_h))


def test_a_step_is_accounted_for_without_the_leases_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(leases: Sequence[LeaseSpan], busy: Sequence[BusySpan], window: Window) -> GpuSeconds:
        seen.append(len(leases) + len(busy))
        return account(leases, busy, window)

    monkeypatch.setattr("verl_rlhfless.sim.run.account", counted)
    data = steps(1, 32, 4, mean=900.0)[0]
    same = tuple(replace(data, batch=replace(data.batch, step=number)) for number in range(1, 7))
    cell(same).run(RlhflessPaper(num_actors=8, tp=2))
    *by_step, whole = seen
    assert max(by_step[1:]) <= by_step[0]
    assert whole > 4 * by_step[0]


def test_stock_holds_the_whole_cluster_through_the_whole_step() -> None:
    one = cell(DATA)
    for step in one.run(StockSync()).steps:
        assert step.gpu_s_allocated == pytest.approx(16 * step.step_s)
        assert step.node_usd == pytest.approx(step.gpu_lease_usd)


@pytest.mark.parametrize("arm", list(ARMS))
def test_same_seed_gives_an_identical_record(arm: str) -> None:
    texts = {json.dumps(asdict(one.run(one.arm(arm))), sort_keys=True) for one in (cell(DATA), cell(DATA))}
    assert len(texts) == 1


def test_elastic_arms_pay_for_waking_and_stock_does_not_depend_on_it() -> None:
    long = steps(2, 64, 8, mean=2500.0, cap=16384)
    slow, fast = cell(long, wake_s=20.0), cell(long, wake_s=1.0)
    assert fast.run(StockSync()).steps == slow.run(StockSync()).steps
    cheap = fast.arm("rlhfless_paper")
    assert slow.run(cheap).gpu_s_startup > fast.run(cheap).gpu_s_startup
    assert slow.run(cheap).steps[1].step_s > fast.run(cheap).steps[1].step_s


def test_an_elastic_step_publishes_leaves_and_comes_back_before_it_trains() -> None:
    one = cell(DATA, resume_s=7.0)
    trainer, times = one.pool.trainer, one.times
    for step, data in zip(one.run(RlhflessPaper(num_actors=8, tp=2)).steps, DATA, strict=True):
        tokens = int(data.batch.prompt_tokens.sum() + data.lengths.sum())
        context = tokens / data.batch.num_samples
        back_s = max(times.grant_s, times.park_s) + times.resume_s
        phases_s = trainer.inference_s(tokens, context) + trainer.update_s(tokens, context)
        beside_s = trainer.publish_s + 2 * trainer.state_copy_s + back_s + phases_s
        assert step.step_s - step.gen_s == pytest.approx(beside_s)


def test_a_trainer_that_keeps_its_lease_trains_beside_its_replicas() -> None:
    one = cell(DATA)
    trainer = replace(one.pool.trainer, num_gpus=8)
    pool = replace(one.pool, num_gpus=8, trainer=trainer, keeps_trainer=True, has_resident=False)
    record = ArmRun(Ours(can_fuse=False), one.cluster, pool, DATA).run()
    assert record.max_gpus <= 16
    for step, data in zip(record.steps, DATA, strict=True):
        assert step.tokens == data.lengths.sum()
        assert step.gpu_s_busy + step.gpu_s_idle + step.gpu_s_startup == pytest.approx(step.gpu_s_allocated)
        replicas_gpu_s = step.gpu_s_allocated - 8 * step.step_s
        assert 0 < replicas_gpu_s <= 8 * step.gen_s * (1 + 1e-9)


def test_engines_that_share_the_trainers_lease_publish_load_and_sleep_and_nothing_else_is_leased() -> None:
    data = steps(2, 64, 4, mean=60.0, cap=512)
    one = cell(data, wake_s=3.0)
    own, shared = (replace(one.pool, shares_engines=shares) for shares in (False, True))
    record, hybrid = (ArmRun(Ours(can_fuse=False), one.cluster, pool, data).run() for pool in (shared, own))
    assert [step.fleet for step in record.steps] == [step.fleet for step in hybrid.steps]
    assert all("resident" in step.fleet for step in record.steps)
    trainer = one.pool.trainer
    load_s = one.pool.perf[one.best_tp].load_s
    instead_s = trainer.times.hybrid_wake_s + trainer.reshard_s + trainer.times.hybrid_sleep_s
    more_s = trainer.publish_s + 3.0 + load_s + trainer.times.park_s - instead_s
    for step, beside in zip(record.steps, hybrid.steps, strict=True):
        assert step.step_s == pytest.approx(beside.step_s + more_s)
        assert step.gpu_s_allocated == pytest.approx(16 * step.step_s)
        assert step.predicted_step_s == pytest.approx(step.step_s, rel=0.1)


def test_nothing_starts_beside_the_trainer() -> None:
    data = steps(1, 64, 4, mean=60.0, cap=512)
    one = cell(data, wake_s=3.0)
    count = 16 // one.best_tp

    def fleet(num_started: int, goal: Goal) -> str:
        layout = type("Layout", (Ours,), {"layout": lambda *_: {one.best_tp: num_started}})
        arm = layout(goal, can_fuse=False)
        return ArmRun(arm, one.cluster, replace(one.pool, shares_engines=True), data).run().steps[0].fleet

    every = Goal(min_replicas=count)
    assert fleet(count, every) == f"{count}xTP{one.best_tp} resident"
    assert "resident" not in fleet(count - 1, every)


def test_a_parked_engine_is_reported_and_can_be_charged() -> None:
    long = steps(2, 64, 8, mean=2500.0, cap=16384)
    free, charged = cell(long), replace(cell(long), parked_charge=1.0)
    record = free.run(Ours())
    given_back = sum(16 * step.step_s - step.gpu_s_allocated for step in record.steps)
    assert 0 < record.gpu_s_parked <= given_back * (1 + 1e-9)
    assert charged.run(Ours()).gpu_lease_usd > record.gpu_lease_usd
    assert charged.run(StockSync()).gpu_lease_usd == free.run(StockSync()).gpu_lease_usd


def test_losing_a_spot_node_loses_no_sample() -> None:
    long = steps(2, 64, 8, mean=3000.0, cap=16384)
    outage = (((130.0, 135.0), (150.0, 155.0), (170.0, 5000.0)),)
    one = cell(long, replace(CLUSTERS["h100-16-spot"], outages=outage))
    record = one.run(RlhflessPaper(num_actors=16, tp=1))
    assert sum(step.num_lost_replicas for step in record.steps) > 0
    assert [step.tokens for step in record.steps] == [int(data.lengths.sum()) for data in long]


def test_ours_stays_resident_and_says_so_when_elasticity_cannot_pay() -> None:
    short = cell(steps(3, 64, 4, mean=60.0, cap=512), wake_s=30.0)
    record, best = short.run(short.arm("ours")), short.run(short.arm("stock_sync_best_tp"))
    assert all("resident" in step.reason and "saving 0" in step.reason for step in record.steps)
    assert record.steps[-1].gpu_s_allocated <= 1.02 * best.steps[-1].gpu_s_allocated


def test_the_record_has_every_documented_field_and_no_arm_beats_the_bound() -> None:
    one = cell(DATA)
    arms = {name: one.run(one.arm(name)) for name in ("stock_sync", "stock_sync_best_tp", "ours", "oracle")}
    labels = {"trace": "t", "cluster": "l40s-16", "model": "qwen2.5-3b", "seed": 0}
    labels |= {"recipe": "grpo", "calibration": None, **settings(one)}
    run = cell_record(one, arms, labels)
    step = run["arms"]["ours"]["steps"][0]
    wanted = {"step", "step_s", "gen_s", "gpu_s_allocated", "gpu_s_busy", "gpu_s_idle", "gpu_s_startup"}
    assert wanted | {"gpu_lease_usd", "node_usd", "num_migrations", "prefill_tokens", "objective"} <= step.keys()
    assert all(s["objective"] == pytest.approx(1.0) for s in run["arms"]["stock_sync_best_tp"]["steps"])
    for arm in run["arms"].values():
        assert arm["total"]["step_s"] >= run["bound"]["step_s"]
        assert arm["total"]["gpu_lease_usd_per_step"] >= run["bound"]["gpu_lease_usd"]
    text = table(run)
    assert "simulated" in text
    assert all(name in text for name in arms)
