import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Cluster
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.observer import Observer
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.observed import read_observed

WAIT_S = 120.0
CLOCK_S = 0.02  # resolution of the times: Ray cuts them to milliseconds, a file system to a kernel tick of up to 10 ms
TRAINER = "global_poolverl_group_2:0"


def run_job(folder: Path, address: str) -> dict[str, list[float]]:
    script = Path(__file__).with_name("leasing_job.py")
    command = [sys.executable, str(script), str(folder), address]
    job = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert job.returncode == 0, job.stderr
    return json.loads(job.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def watched(ray_cluster: Cluster, tmp_path_factory):
    """Return the folder of a watched job and, by event, between which times the job saw it happen."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "metrics.jsonl").write_text('{"step": 77, "data": {}}\n')  # of an earlier run
    with Observer(folder):
        happened = run_job(folder, ray_cluster.address)
        ray_cluster.wait_until(
            lambda: f'"released", "lease": "{TRAINER}"' in (folder / "leases.jsonl").read_text(),
            "the release of the trainer's lease, which ends with its job",
        )
        happened[f"released {TRAINER}"].append(time.time())
    return folder, happened


def test_every_lease_is_seen_with_its_role_its_gpus_and_the_times_of_its_grant_and_release(watched):
    folder, happened = watched
    holds = {hold.lease_id: hold for hold in read_observed(folder).holds}
    assert {name: (hold.role, hold.num_gpus) for name, hold in holds.items()} == {
        TRAINER: ("trainer", 2),
        "rlhfless/replica/r0": ("replica", 2),
        "rlhfless/replica/r1": ("replica", 2),
        "rlhfless/replica/short": ("replica", 1),
    }
    for name, hold in holds.items():
        earliest_s, latest_s = happened[f"granted {name}"]
        assert earliest_s - CLOCK_S <= hold.granted_s <= latest_s + CLOCK_S, name
        earliest_s, latest_s = happened[f"released {name}"]
        assert earliest_s - CLOCK_S <= hold.released_s <= latest_s + CLOCK_S, name


def test_every_step_is_stamped_with_the_time_at_which_verl_logged_it(watched):
    folder, happened = watched
    logged_s = read_observed(folder).logged_s
    assert list(logged_s) == [1, 2]
    for step, time_s in logged_s.items():
        earliest_s, latest_s = happened[f"step {step}"]
        assert earliest_s - CLOCK_S <= time_s <= latest_s + CLOCK_S


def test_the_ledger_adds_up_and_agrees_with_the_job_that_held_the_gpus(watched):
    folder, happened = watched
    arm = build_arm(folder)
    gpu = arm.total.gpu
    assert gpu.busy + gpu.idle + gpu.startup == pytest.approx(gpu.allocated, rel=1e-9)
    least = most = 0.0
    for lease in arm.leases:
        (granted_from_s, granted_to_s), (released_from_s, released_to_s) = (
            happened[f"{event} {lease.lease_id}"] for event in ("granted", "released")
        )
        least += lease.num_gpus * (released_from_s - granted_to_s - 2 * CLOCK_S)
        most += lease.num_gpus * (released_to_s - granted_from_s + 2 * CLOCK_S)
    assert least <= gpu.allocated <= most
    assert arm.steps[1].figures.gpu.allocated < gpu.allocated


def test_gpus_that_change_hands_never_count_twice(watched):
    folder, _ = watched
    assert build_arm(folder).total.gpu.max_gpus == 4


def test_the_host_is_sampled_from_start_to_end(watched):
    folder, happened = watched
    samples = read_observed(folder).host
    assert samples[0].t < happened[f"granted {TRAINER}"][0]
    assert samples[-1].t > happened[f"released {TRAINER}"][0]
    assert all(0 <= sample.cpu_percent <= 100 and sample.memory_peak_bytes >= 0 for sample in samples)
    assert samples[-1].observer_cpu_s > 0


def test_a_process_that_is_not_connected_to_ray_can_watch_a_cluster_by_its_address(ray_cluster, tmp_path):
    script = (
        "import sys, pathlib, ray\n"
        "from verl_rlhfless.live.observer import Observer\n"
        "with Observer(pathlib.Path(sys.argv[1]), sys.argv[2]):\n"
        "    assert ray.is_initialized()\n"
        "assert not ray.is_initialized()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), ray_cluster.address]
    job = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert job.returncode == 0, job.stderr
    assert len(read_lines(tmp_path / "host.jsonl")) >= 2


def test_a_watch_that_fails_says_so_at_its_end(ray_cluster, tmp_path):
    observer = Observer(tmp_path)
    observer.start()
    (tmp_path / "metrics.jsonl").write_text("this is not what verl writes\n")
    with pytest.raises(RlhflessError, match="records are incomplete"):
        observer.stop()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
