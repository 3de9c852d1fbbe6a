import json

import pytest

from tests.unit.observed_run import RunFolder, elastic_run, stock_run
from verl_rlhfless.errors import DataError
from verl_rlhfless.report.ab import build_ab, build_arm
from verl_rlhfless.report.guards import GuardLimits
from verl_rlhfless.report.record import HostUse


def figures(run, step):
    return build_arm(run.path).steps[step - 1].figures


def states(gpu):
    return gpu.allocated, gpu.busy, gpu.idle, gpu.startup


def test_a_stock_step_is_paid_from_the_end_of_the_step_before_to_its_own_end(tmp_path):
    run = stock_run(tmp_path)
    # log-probs, update and weight sync keep all 4 GPUs busy for 4 s; the engines 1 GPU each for 2.5 s and 3.5 s
    assert states(figures(run, 1).gpu) == (44.0, 22.0, 22.0, 0.0)
    assert states(figures(run, 2).gpu) == (44.0, 22.0, 22.0, 0.0)


def test_the_total_of_stock_holds_the_start_and_the_end_of_the_run(tmp_path):
    arm = build_arm(stock_run(tmp_path).path)
    assert states(arm.total.gpu) == (240.0, 44.0, 240.0 - 44.0 - 36.0, 36.0)
    assert arm.total.gpu.max_gpus == 4
    assert arm.wall_s == 70.0


def test_an_elastic_step_pays_for_its_replicas_from_grant_to_release(tmp_path):
    run = elastic_run(tmp_path)
    # trainer: 2 GPUs for 11 s, busy for 4 s; a replica: leased 5.5 s, starting 3.5 s, busy 1.5 s
    assert states(figures(run, 1).gpu) == (22 + 5.5, 8 + 1.5, 14 + 0.5, 3.5)
    assert states(figures(run, 2).gpu) == (22 + 11.0, 8 + 3.0, 14 + 1.0, 7.0)
    assert (figures(run, 1).gpu.max_gpus, figures(run, 2).gpu.max_gpus) == (3, 4)


def test_a_trainer_that_came_back_is_usable_when_it_says_so_and_costs_nothing_meanwhile(tmp_path):
    run = RunFolder(tmp_path).host(0.0, 100.0)
    run.lease("rlhfless/trainer/a", 2, 0.0, 21.0).lease("rlhfless/trainer/b", 2, 50.0, 100.0)
    run.step(1, 20.0, step=10, gen=5).step(2, 60.0, step=40, gen=33, old_log_prob=2, update_actor=3)
    run.append("events-1.jsonl", {"event": "trainer_resumed", "lease": "rlhfless/trainer/b", "t": 51.5})
    # held from 20 to 21 and from 50 to 60; back on the devices from 51.5; busy in the last 5 s
    assert states(figures(run, 2).gpu) == (2 * 11, 2 * 5, 2 * (1 + 3.5), 2 * 1.5)


def test_a_trainer_that_infers_beside_the_rollout_is_busy(tmp_path):
    run = elastic_run(tmp_path)
    before = figures(run, 1).gpu.busy
    run.append("events-1.jsonl", {"event": "fused", "t": 113.0, "seconds": 0.5, "step": 1})
    assert figures(run, 1).gpu.busy == before + 2 * 0.5


def test_inference_beside_the_rollout_lies_before_the_moment_at_which_it_was_told(tmp_path):
    run = elastic_run(tmp_path)
    before = [figures(run, step).gpu.busy for step in (1, 2)]
    run.append("events-1.jsonl", {"event": "fused", "t": 120.25, "seconds": 0.5, "step": 1})  # step 2 begins at 120
    assert [figures(run, step).gpu.busy for step in (1, 2)] == [before[0] + 2 * 0.25, before[1] + 2 * 0.25]


def test_the_hosts_use_is_weighed_by_time_and_the_observers_own_is_told(tmp_path):
    run = RunFolder(tmp_path).lease("pool", 1, 0.0, 100.0)
    used = [(10.0, 90.0, 5, 0.0), (11.0, 10.0, 6, 0.01), (14.0, 50.0, 7, 0.04)]
    for t, cpu_percent, peak_bytes, observer_s in used:
        use = {"cpu_percent": cpu_percent, "memory_peak_bytes": peak_bytes, "observer_cpu_s": observer_s}
        run.append("host.jsonl", {"t": t, **use})
    # 10 % for 1 s, 50 % for 3 s; what was used before the first sample nobody saw
    assert build_arm(tmp_path).host == HostUse(cpu_percent=40.0, memory_peak_bytes=7, observer_cpu_percent=1.0)


def test_of_a_host_that_was_seen_once_nothing_is_known(tmp_path):
    assert build_arm(RunFolder(tmp_path).lease("pool", 1, 0.0, 100.0).host(10.0).path).host is None


def test_replicas_are_counted_in_both_arms(tmp_path):
    for name in ("stock", "elastic"):
        (tmp_path / name).mkdir()
    stock, elastic = stock_run(tmp_path / "stock"), elastic_run(tmp_path / "elastic")
    assert [figures(stock, step).num_replicas for step in (1, 2)] == [2, 2]
    assert [figures(elastic, step).num_replicas for step in (1, 2)] == [1, 2]


def test_a_replica_is_starting_until_its_trainer_says_that_it_is_ready_else_until_its_weights_are_loaded(tmp_path):
    run = elastic_run(tmp_path)
    (tmp_path / "events-1.jsonl").unlink()
    assert figures(run, 1).gpu.startup == 2.0


def test_a_replica_that_never_came_up_is_paid_as_start_up_and_not_counted(tmp_path):
    run = elastic_run(tmp_path).lease("rlhfless/replica/r9", 1, 110.0, 118.0)
    assert figures(run, 1).gpu.startup == 3.5 + 8.0
    assert figures(run, 1).num_replicas == 1


def test_the_drivers_advantage_and_a_validation_keep_no_trainer_gpu_busy(tmp_path):
    run = RunFolder(tmp_path).lease("pool", 2, 0.0, 100.0).host(0.0, 100.0)
    run.step(1, 60.0, step=20, gen=5, adv=7, testing=30)
    assert figures(run, 1).gpu.busy == 0.0
    assert figures(run, 1).gpu.allocated == 100.0  # the step began 50 s before its metrics were written


def test_replicas_of_verls_on_gpus_of_their_own_work_there_and_trainer_phases_do_not(tmp_path):
    run = RunFolder(tmp_path).lease("global_poolverl_group_2:0", 2, 0.0, 100.0).host(0.0, 100.0)
    for rank in (0, 1):  # separate_async
        run.lease(f"rollout_pool_{rank}verl_group_1:0", 1, 5.0, 100.0)
        run.engine(20 + rank, None, rank, (10.0,), (42.0, 58.0))
    run.step(1, 60.0, step=20, gen=5, update_actor=10)
    assert figures(run, 1).gpu.busy == 2 * 10.0 + 2 * 16.0


def test_the_trainer_is_usable_from_an_initial_validation_on(tmp_path):
    run = RunFolder(tmp_path).lease("pool", 1, 0.0, 100.0).host(0.0, 100.0)
    run.append("metrics.jsonl", {"step": 0, "data": {"val-core/x": 1.0}})
    run.append("steps.jsonl", {"step": 0, "t": 50.0})
    run.engine(7, None, 0, (20.0,), (30.0, 45.0)).step(1, 70.0, step=15, gen=5)
    arm = build_arm(tmp_path)
    assert states(arm.total.gpu) == (100.0, 15.0, 55.0, 30.0)
    assert [record.step for record in arm.steps] == [1]
    assert arm.steps[0].figures.gpu.allocated == 20.0


def test_a_run_that_never_trained_is_all_start_up(tmp_path):
    RunFolder(tmp_path).lease("pool", 2, 10.0, None).host(0.0, 40.0)
    arm = build_arm(tmp_path)
    assert states(arm.total.gpu) == (60.0, 0.0, 0.0, 60.0)
    assert (arm.steps, arm.total.step_s) == ((), None)


def test_a_tp2_engine_keeps_two_gpus_busy(tmp_path):
    run = RunFolder(tmp_path).lease("pool", 4, 0.0, 100.0).host(0.0, 100.0).step(1, 60.0, step=60, gen=5)
    run.engine(7, None, 1, (1.0,), (10.0, 20.0), tp=2)
    assert figures(run, 1).gpu.busy == 20.0


def test_a_hybrid_engine_of_the_second_node_works_on_that_nodes_lease(tmp_path):
    run = RunFolder(tmp_path).host(0.0, 100.0)
    run.lease("pool:0", 2, 0.0, 100.0).lease("pool:1", 2, 0.0, 50.0).step(1, 90.0, step=90, gen=5)
    run.engine(7, None, 3, (1.0,), (40.0, 60.0))
    assert figures(run, 1).gpu.busy == 10.0  # the lease of its node ends at 50


def test_work_outside_every_lease_is_an_error_that_names_the_engine(tmp_path):
    run = stock_run(tmp_path)
    run.engine(99, None, 4, (105.0,), (110.0, 111.0))
    with pytest.raises(DataError, match=r"engine 99 \(replica 4\)"):
        build_arm(run.path)


def test_only_generated_samples_are_counted(tmp_path):
    run = RunFolder(tmp_path).lease("pool", 1, 0.0, 100.0).host(0.0, 100.0).step(1, 90.0, step=60, gen=5)
    # two sessions, one of them with two turns; verl padded the batch with two synthetic samples
    run.samples(1, "g1_0_0", "g1_1_0", "g1_1_1", "pad4f2c_0_0", "pad4f2c_1_0")
    assert figures(run, 1).num_samples == 2
    assert figures(run, 1).response_tokens == round(12.5 * 3)


def test_what_was_not_recorded_is_null_and_so_is_its_total(tmp_path):
    run = stock_run(tmp_path)
    (tmp_path / "rollouts" / "2.jsonl").unlink()
    (tmp_path / "steps.jsonl").write_text('{"step": 1, "t": 120.0}\n')
    assert (figures(run, 2).num_samples, figures(run, 2).response_tokens, figures(run, 2).gpu) == (None, None, None)
    total = build_arm(run.path).total
    assert (total.num_samples, total.response_tokens) == (None, None)
    assert total.gpu.allocated == 240.0


def test_means_sums_and_extremes_of_the_total(tmp_path):
    run = stock_run(tmp_path)
    run.step(3, 145.0, step=13, gen=7).samples(3, "g1_0_0", "g1_1_0", "g2_0_0", "g2_1_0")
    total = build_arm(run.path).total
    assert (total.step_s, total.gen_s, total.reward_mean) == (11.0, 5.0, pytest.approx(0.2))
    assert (total.num_samples, total.response_tokens) == (12, 150)
    assert total.rollout_probs_diff_max == pytest.approx(3e-8)


def test_parked_is_zero_while_the_trainer_keeps_its_lease_and_unknown_after_it_gave_it_back(tmp_path):
    run = RunFolder(tmp_path).host(0.0, 100.0)
    run.lease("rlhfless/trainer/a", 2, 0.0, 30.0).lease("rlhfless/trainer/b", 2, 35.0, 100.0)
    run.step(1, 20.0, step=10, gen=5).step(2, 60.0, step=40, gen=30)
    assert (figures(run, 1).gpu_s_parked, figures(run, 2).gpu_s_parked) == (0.0, None)
    assert build_arm(run.path).total.gpu_s_parked is None


def test_time_in_which_engines_slept_stands_in_the_step_in_which_it_passed(tmp_path):
    run = elastic_run(tmp_path)
    parked = {"event": "replica_parked", "lease": "rlhfless/replica/r0", "num_gpus": 1}
    run.append(
        "events-1.jsonl",
        {**parked, "t": 115.0, "memory": {"device_bytes": 600, "host_bytes": 9, "host_available_bytes": 9}},
        {"event": "replica_woken", "lease": "rlhfless/replica/r1", "parked_as": "rlhfless/replica/r0", "t": 121.0},
    )
    steps = [figures(run, step) for step in (1, 2)]
    assert [step.gpu_s_parked for step in steps] == [5.0, 1.0]
    assert [step.parked_device_bytes for step in steps] == [600, 600]


def test_replicas_that_share_the_trainers_lease_work_on_it_and_are_counted_and_checked(tmp_path):
    run = elastic_run(tmp_path)
    before = figures(run, 2)
    part = "rlhfless/trainer/global_pool/r3-1"
    pulled = {"event": "pulled", "t": 121.0, "lease": part, "version": 1, "checksum": "c1"}
    run.append("events-1.jsonl", pulled, {"event": "replica_ready", "t": 121.5, "lease": part})
    run.engine(33, part, 3, (121.0,), (122.0, 124.0))
    shared = figures(run, 2)
    assert shared.gpu.allocated == before.gpu.allocated, "it costs nothing beside the trainer's lease"
    assert shared.gpu.busy == before.gpu.busy + 2.0
    assert [figures(run, step).num_replicas for step in (1, 2)] == [1, 3]
    arm = build_arm(run.path)
    assert arm.total.num_replicas == 4
    assert (arm.pulls[-1].lease, arm.pulls[-1].version, arm.pulls[-1].expected_version) == (part, 1, 1)


def test_every_pull_stands_beside_the_version_that_its_step_needed(tmp_path):
    pulls = build_arm(elastic_run(tmp_path).path).pulls
    assert [(pull.version, pull.expected_version) for pull in pulls] == [(0, 0), (1, 1), (1, 1)]
    assert [(pull.checksum, pull.published_checksum) for pull in pulls] == [("c0", "c0"), ("c1", "c1"), ("c1", "c1")]


def test_a_replica_that_served_without_a_recorded_pull_is_listed(tmp_path):
    run = elastic_run(tmp_path)
    events = (tmp_path / "events-1.jsonl").read_text().splitlines()
    (tmp_path / "events-1.jsonl").write_text("\n".join(line for line in events if '"pulled"' not in line) + "\n")
    assert [pull.version for pull in build_arm(run.path).pulls] == [None, None, None]


def test_a_run_that_was_killed_while_writing_is_read_up_to_its_last_whole_line(tmp_path):
    run = stock_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "data": {"timing_s/st')
    assert len(build_arm(run.path).steps) == 2


@pytest.mark.parametrize("name", ["leases.jsonl", "steps.jsonl", "host.jsonl", "metrics.jsonl"])
def test_a_missing_or_broken_record_is_named(tmp_path, name):
    run = stock_run(tmp_path)
    with (tmp_path / name).open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=rf"{name}, line \d+"):
        build_arm(run.path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=name):
        build_arm(run.path)


@pytest.mark.parametrize("line", ["3", "{}"])
@pytest.mark.parametrize("name", ["leases.jsonl", "steps.jsonl", "host.jsonl", "metrics.jsonl"])
def test_a_record_whose_lines_have_another_form_is_refused_with_what_to_do(tmp_path, name, line):
    run = stock_run(tmp_path)
    with (tmp_path / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="Run the arm again"):
        build_arm(run.path)


def test_the_record_has_the_published_format_and_is_json(tmp_path):
    for name in ("stock", "elastic"):
        (tmp_path / name).mkdir()
    folders = {"stock": stock_run(tmp_path / "stock").path, "elastic": elastic_run(tmp_path / "elastic").path}
    limits = GuardLimits(num_steps=2, num_samples=4, max_gpus=4, pulling_arms=("elastic",))
    record = json.loads(json.dumps(build_ab(folders, 7, 4, limits, {"stock": [], "elastic": []}), allow_nan=False))
    assert (record["format"], record["seed"], list(record["arms"])) == ("rlhfless-ab/1", 7, ["stock", "elastic"])
    assert set(record["versions"]) == {"python", "verl", "vllm", "torch", "ray", "verl_rlhfless"}
    assert record["hardware"]["gpus_declared"] == 4
    assert record["arms"]["stock"]["steps"][0] == {
        "step": 1,
        "step_s": 10,
        "gen_s": 4,
        "gpu_s_allocated": 44.0,
        "gpu_s_busy": 22.0,
        "gpu_s_idle": 22.0,
        "gpu_s_startup": 0.0,
        "gpu_s_parked": 0.0,
        "parked_device_bytes": 0,
        "max_gpus": 4,
        "reward_mean": 0.1,
        "rollout_probs_diff_max": 1e-8,
        "rollout_probs_diff_mean": 1e-9,
        "response_tokens": 50,
        "num_samples": 4,
        "num_replicas": 2,
        "rollout_s": 4.0,
        "prefill_tokens": 0,
        "num_migrations": None,
        "router_cpu_s": None,
        "host_cpu_percent": 50.0,
    }
    assert all(guard["ok"] for guard in record["guards"]), record["guards"]
    assert all(set(guard) == {"name", "ok", "value", "limit"} for guard in record["guards"])


def test_rewards_and_lengths_are_known_by_prompt_group(tmp_path):
    run = RunFolder(tmp_path).lease("pool", 1, 0.0, 100.0).host(0.0, 100.0)
    run.step(1, 60.0, step=20)
    for uid, score in [("g1_0_0", 0.0), ("g1_1_0", 1.0), ("g2_0_0", 1.0), ("g2_1_0", 1.0), ("pad_0_0", 9.0)]:
        run.append("rollouts/1.jsonl", {"uid": uid, "step": 1, "score": score})
    run.lengths(1, {0: [10, 20], 1: [40, 50]})
    arm = build_arm(run.path)
    assert (arm.reward.mean, arm.reward.std_error, arm.reward.num_groups) == (0.75, 0.25, 2)
    assert (arm.response_tokens.mean, arm.response_tokens.std_error) == (30.0, 15.0)


def test_without_their_records_lengths_are_not_known(tmp_path):
    run = stock_run(tmp_path)
    assert build_arm(run.path).response_tokens is None
