"""A trainer that leaves its GPUs in each rollout trains as one that stays; one that loses them goes on later.

Real runs of two steps, with greedy tokens and replayed lengths so that their work is alike: ``stays`` beside its
replica; ``leaves``, on a cluster that has no room for both, while another Ray job works on a GPU that it gave back, and
in step 2 that job does not go; ``again`` is the same command once the GPUs are free.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scheduled import scheduled
from verl_rlhfless.ab.cluster import Cluster, private_cluster
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets
from verl_rlhfless.demo.run import DemoOptions, arm_command, arm_environment
from verl_rlhfless.errors import LeaseLostError

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

_TRAINER_GPUS = 2
_RUN_TIMEOUT_S = 400.0
_FOREIGN_JOB = Path(__file__).parents[1] / "integration" / "foreign_job.py"
_WAIT_S = 60.0
_IN_TURN = ("trainer_suspended", "replica_ready", "trainer_resumed")
_TRAINED_ALIKE = ("actor/pg_loss", "actor/grad_norm", "critic/score/mean", "response_length/mean")


@dataclass(frozen=True)
class Run:
    """What a run left."""

    folder: Path
    exit_code: int
    errors: str
    foreign_devices: tuple[str, ...] = ()

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = [line for log in self.folder.glob("events-*.jsonl") for line in log.read_text().splitlines()]
        return sorted(map(json.loads, lines), key=lambda event: event["t"])

    def named(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record["event"] == event]

    def metrics(self, step: int) -> dict[str, Any]:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return next(line["data"] for line in lines if line["step"] == step)

    def responses(self, step: int) -> list[tuple[str, str]]:
        rows = map(json.loads, (self.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines())
        return sorted((row["input"], row["output"]) for row in rows)


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace whose samples of a group differ in length, so that greedy ones differ in reward."""
    header = {
        "format": "rlhfless-trace/1", "unit": "tokens", "max_response_tokens": 64, "n": 4, "kind": "composed",
        "name": "lengths", "source": "a test", "licence": "none", "note": "",
    }  # fmt: skip
    groups = [
        {"prompt_id": f"p{index}", "prompt_tokens": 20, "response_tokens": [4 + index, 9, 17, 33]}
        for index in range(recipe.PROMPTS_PER_STEP)
    ]
    steps = [{"step": step, "epoch": 0, "groups": groups} for step in (1, 2)]
    path = tmp_path_factory.mktemp("trace") / "lengths.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *steps)))
    return path


class Guest:
    """Another Ray job on the cluster of a run: it takes one GPU in each rollout, and leaves in the first one only."""

    def __init__(self, cluster: Cluster, folder: Path, driver: subprocess.Popen[bytes]) -> None:
        self._cluster, self._folder, self._driver = cluster, folder, driver
        self.devices: list[str] = []

    def visit(self) -> None:
        self._wait_for("trainer_suspended", 1)
        with self._job() as job:
            self._wait_for("replica_ready", 1)
        assert job.wait(_WAIT_S) == 0, "the guest must not lose its GPU before it leaves"
        self._wait_for("trainer_suspended", 2)
        with self._job():
            self._driver.wait(_RUN_TIMEOUT_S)

    @contextmanager
    def _job(self) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, str(_FOREIGN_JOB), self._cluster.address, "1"]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=self._cluster.child_environment()
        ) as job:
            assert job.stdin is not None and job.stdout is not None
            self.devices += json.loads(job.stdout.readline())["devices"]
            try:
                yield job
            finally:
                job.stdin.close()

    def _wait_for(self, event: str, count: int) -> None:
        deadline = time.monotonic() + _RUN_TIMEOUT_S
        while len(Run(self._folder, 0, "").named(event)) < count:
            assert self._driver.poll() is None and time.monotonic() < deadline, f"no {event} number {count}"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward that differs inside every group, so that both steps train."""
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text("def compute_score(data_source, solution_str, **_):\n    return len(solution_str) % 7 / 7\n")
    return path


@pytest.fixture(scope="module")
def train(
    assets: Assets, lengths: Path, reward: Path, tmp_path_factory: pytest.TempPathFactory, external_module: Any
) -> Callable[..., Run]:
    checkpoints = tmp_path_factory.mktemp("checkpoints")

    def run(name: str, suspend: str, num_gpus: int, has_guest: bool = False) -> Run:
        folder = tmp_path_factory.mktemp(name)
        overrides = (
            f"rlhfless.pool.max_gpus={num_gpus}",
            f"rlhfless.pool.suspend_trainer={suspend}",
            "rlhfless.pool.resume_timeout_s=5",
            f"rlhfless.replay.trace={lengths}",
            "actor_rollout_ref.rollout.top_k=1",
            f"reward.custom_reward_function.path={reward}",
            "trainer.resume_mode=auto",
        )
        command = arm_command(scheduled(1).with_overrides(*overrides), assets, DemoOptions(out=folder, steps=2), folder)
        command.append(f"trainer.default_local_dir={checkpoints}")
        environment = {**arm_environment(folder), **external_module("fingerprints")}
        errors = folder / "errors.log"
        with (
            private_cluster(num_gpus, environment) as cluster,
            (folder / "train.log").open("w") as log,
            errors.open("w") as error_log,
        ):
            driver = subprocess.Popen(command, env=cluster.child_environment(), stdout=log, stderr=error_log)
            guest = Guest(cluster, folder, driver)
            try:
                if has_guest:
                    guest.visit()
                exit_code = driver.wait(_RUN_TIMEOUT_S)
            finally:
                driver.kill()
        return Run(folder, exit_code, errors.read_text(), tuple(guest.devices))

    return run


@pytest.fixture(scope="module")
def stays(train: Callable[..., Run]) -> Run:
    """Trains two steps and never leaves."""
    return train("stays", "never", _TRAINER_GPUS + 1)


@pytest.fixture(scope="module")
def leaves(train: Callable[..., Run], stays: Run) -> Run:
    """Trains step 1 between visits of the guest, and loses its GPUs to it in step 2."""
    return train("leaves", "auto", _TRAINER_GPUS, has_guest=True)


@pytest.fixture(scope="module")
def again(train: Callable[..., Run], leaves: Run) -> Run:
    """The same command as ``leaves``, without the guest."""
    return train("again", "auto", _TRAINER_GPUS)


def test_replica_and_another_job_work_on_the_gpus_that_the_trainer_gave_back(leaves: Run) -> None:
    assert len(leaves.foreign_devices) == 2 and set(leaves.foreign_devices) <= {"0", "1"}
    (decision, _) = leaves.named("trainer_lease")
    assert decision["reason"] == "the trainer's 2 GPUs and the replicas' 1 are more than the budget of 2"
    suspended, ready, resumed = (leaves.named(name)[0]["t"] for name in _IN_TURN)
    assert suspended < ready < resumed, "the replica has its GPU while the trainer has none"


def test_every_rank_comes_back_bit_for_bit(leaves: Run) -> None:
    before, after, *_ = leaves.named("fingerprints")
    assert (before["when"], after["when"]) == ("before", "after")
    assert before["ranks"] == after["ranks"] and len(before["ranks"]) == _TRAINER_GPUS


def test_a_step_trains_alike_whether_the_trainer_left_or_not(stays: Run, leaves: Run, again: Run) -> None:
    assert stays.exit_code == again.exit_code == 0
    assert not any(decision["is_suspended"] for decision in stays.named("trainer_lease"))
    for step, run in ((1, leaves), (2, again)):
        assert run.responses(step) == stays.responses(step)
        trained, expected = run.metrics(step), stays.metrics(step)
        for name in _TRAINED_ALIKE:
            assert trained[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
        assert trained["actor/grad_norm"] > 0, "a step that trains nothing is alike in any case"
        assert trained["rlhfless/trainer_gpu_s_given_back"] > 0


def test_gpus_that_do_not_come_back_end_the_run_with_a_checkpoint_and_one_line(leaves: Run, again: Run) -> None:
    assert leaves.exit_code == LeaseLostError.EXIT_CODE == 75
    (line,) = [line for line in leaves.errors.splitlines() if line.startswith("rlhfless: error: ")]
    assert "did not come back (rlhfless.pool.resume_timeout_s=5)" in line and "1 of 2 GPU are available" in line
    assert "The state after step 1 is in" in line and "trainer.resume_mode=auto" in line
    assert "Traceback" not in leaves.errors.split(line)[1]
    assert [record["step"] for record in map(json.loads, (again.folder / "metrics.jsonl").open())] == [2]


def test_the_checkpoint_holds_what_the_host_held(leaves: Run, again: Run) -> None:
    lost, restored = leaves.named("fingerprints")[-1], again.named("fingerprints")[0]
    assert (lost["when"], restored["when"]) == ("before", "before"), "the state of both before the rollout of step 2"
    for name in ("parameters", "optimizer", "random"):
        assert [rank[name] for rank in restored["ranks"]] == [rank[name] for rank in lost["ranks"]]
    assert all(rank["num_states"] > 0 for rank in lost["ranks"]), "Adam's state must be part of the comparison"
