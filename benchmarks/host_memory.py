"""What a run takes of the host's memory, measured beside what its start-up account computed.

Real elastic runs on CPU, two steps each: two FSDP2 ranks and one replica that shares their declared GPUs. ``tiny`` is
the demo's model, where processes are all there is; the account's constants come from it. ``larger`` is a random model
of 113 million parameters, which they were not fitted to. Measured is the largest sum, over one look, of the
proportional set size of every process that Ray started for the run; pages of the object store are in it.

    python -m benchmarks.host_memory    # about 4 minutes, 12 GB of memory; writes benchmarks/results/host_memory.json
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write_result
from benchmarks.scheduled import scheduled
from verl_rlhfless.ab.cluster import Cluster, HostSize, private_cluster
from verl_rlhfless.demo.assets import MODEL_SIZE, ModelSize, arithmetic_problems, build_assets
from verl_rlhfless.demo.run import DemoOptions, arm_command, arm_environment

_GPUS = 2
_STEPS = 2
_NUM_CPUS = 64  # logical: verl reserves some for each declared GPU
_LOOK_S = 1.0
_TIMEOUT_S = 600.0
_TARGET = 0.2
_LARGER = ModelSize(hidden=768, intermediate=3072, layers=12, heads=12, kv_heads=12, head_dim=64)
_OVERRIDES = (
    f"rlhfless.pool.max_gpus={_GPUS}",
    "data.train_batch_size=4",
    "data.max_response_length=16",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.max_model_len=528",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
)
_KIND = re.compile(r"ray::(?:IDLE|(\w+))")


@dataclass(frozen=True, slots=True)
class Look:
    """Proportional set size by kind of process, and how many there were, at one moment."""

    pss_bytes: Mapping[str, int]
    counts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return sum(self.pss_bytes.values())


class MemoryWatch:
    """Looks at the processes of a cluster until it is closed, and keeps the largest look."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak = Look({}, {})
        self.peaks: dict[str, int] = {}

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            look = _look(self._cluster.processes())
            if look.total_bytes > self.peak.total_bytes:
                self.peak = look
            for kind, pss in look.pss_bytes.items():
                self.peaks[kind] = max(self.peaks.get(kind, 0), pss)


def _look(processes: list[psutil.Process]) -> Look:
    pss: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            kind = _kind(command)
            pss[kind] += process.memory_full_info().pss
            counts[kind] += 1
    return Look(dict(pss), dict(counts))


def _kind(command: str) -> str:
    for mark in ("VLLM::EngineCore", "VLLM::Worker", "forkserver", "resource_tracker", "raylet", "gcs_server"):
        if mark in command:
            return mark
    if "main_ppo" in command:
        return "main_ppo"
    match = _KIND.match(command)
    return (match.group(1) or "idle worker") if match else "other of Ray"


def measure(name: str, size: ModelSize, object_store_bytes: int, out: Path) -> dict[str, Any]:
    """Run two steps and return the computed and the measured bytes."""
    folder = out / name
    folder.mkdir(parents=True)
    assets = build_assets(folder / "assets", arithmetic_problems(64, seed=1), seed=1, size=size)
    arm = scheduled(1).with_overrides(*_OVERRIDES)
    command = arm_command(arm, assets, DemoOptions(out=folder, steps=_STEPS), folder)
    environment = arm_environment(folder)
    with (
        private_cluster(_GPUS, environment, HostSize(_NUM_CPUS, object_store_bytes)) as cluster,
        (folder / "train.log").open("w") as log,
        MemoryWatch(cluster) as watch,
    ):
        driver = subprocess.Popen(command, env=cluster.child_environment(), stdout=log, stderr=log)
        try:
            exit_code = driver.wait(_TIMEOUT_S)
        finally:
            driver.kill()
    if exit_code:
        raise SystemExit(f"{name}: the run ended with {exit_code}; see {folder / 'train.log'}")
    (account,) = [event for event in _events(folder) if event["event"] == "host_memory"]
    computed, measured = account["num_bytes"], watch.peak.total_bytes
    return {
        "computed_bytes": computed,
        "measured_bytes": measured,
        "computed_to_measured": computed / measured,
        "is_within_target": abs(computed / measured - 1) <= _TARGET,
        "computed": account["parts"],
        "measured": dict(watch.peak.pss_bytes),
        "num_processes": dict(watch.peak.counts),
        "measured_peaks": watch.peaks,
    }


def _events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for log in folder.glob("events-*.jsonl") for line in log.read_text().splitlines()]


def main() -> None:
    """Measure both models."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        results = {
            "tiny": measure("tiny", MODEL_SIZE, 500_000_000, out),
            "larger": measure("larger", _LARGER, 2_000_000_000, out),
        }
    write_result("host_memory", results, command="python -m benchmarks.host_memory")
    if not all(result["is_within_target"] for result in results.values()):
        raise SystemExit(f"the account is off by more than {_TARGET:.0%}")


if __name__ == "__main__":
    main()
