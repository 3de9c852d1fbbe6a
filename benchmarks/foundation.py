"""What the foundation costs: plugin import, leases, control code of a step, and the instrument inside engines.

Every figure comes from this run; pairs are interleaved, so that a drift of the machine hits both sides.

    python -m benchmarks.foundation          # about 3 minutes; writes benchmarks/results/foundation.json
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import command
from benchmarks.record import write_result

_IMPORT_PAIRS = 7
_LEASES = 10
_STEPS = 20
_REPLICAS = 4


def import_cost() -> dict[str, float]:
    """Return the median seconds of ``import verl`` with and without the plugin, in fresh processes, in turn."""
    seconds: dict[str, list[float]] = {"none": [], "auto": []}
    for policy in ("none", "auto"):  # one uncounted warm-up each
        _import_verl(policy)
    for _ in range(_IMPORT_PAIRS):
        for policy, measured in seconds.items():
            measured.append(_import_verl(policy))
    with_plugin, without = statistics.median(seconds["auto"]), statistics.median(seconds["none"])
    paired = [a - b for a, b in zip(seconds["auto"], seconds["none"], strict=True)]
    return {
        "import_verl_s": without,
        "import_verl_with_plugin_s": with_plugin,
        "median_paired_difference_s": statistics.median(paired),
        "ratio": with_plugin / without,
    }


def plugin_module_cost() -> dict[str, float]:
    """Return the seconds that loading the entry point takes after ``import verl``: what the plugin adds."""
    code = (
        "import os; os.environ['VERL_USE_EXTERNAL_PLUGINS'] = 'none'\n"
        "import verl, time\n"
        "from importlib.metadata import entry_points\n"
        "start = time.perf_counter()\n"
        "[point.load() for point in entry_points(group='verl.plugins')]\n"
        "print(time.perf_counter() - start)"
    )
    runs = [
        float(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
        )
        for _ in range(5)
    ]
    return {"load_entry_point_s": statistics.median(runs)}


def _import_verl(policy: str) -> float:
    code = "import time; start = time.perf_counter(); import verl; print(time.perf_counter() - start)"
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": policy}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def lease_cost() -> dict[str, float]:
    """Return the median seconds of a lease's grant and confirmed release on a local Ray cluster with free GPUs."""
    from verl_rlhfless.live.lease import Lease, LeaseRequest

    grants, releases = [], []
    for index in range(_LEASES):
        request = LeaseRequest(f"bench-{index}", "replica", (1,))
        lease, granted = _timed(lambda request=request: Lease.acquire(request, 30))
        _, released = _timed(lambda lease=lease: lease.release(30))
        grants.append(granted)
        releases.append(released)
    return {"grant_s": statistics.median(grants), "release_s": statistics.median(releases)}


def control_cost() -> dict[str, float]:
    """Return the median seconds of our control code in a step of 4 replicas, without the engines that it waits for.

    Planning, router registration, event records, draining, completeness check of 128 x 8 samples: everything that
    the elastic trainer runs between verl's own phases; only leasing, starting and stopping an engine are stood in
    for by nothing.
    """
    import ray
    from omegaconf import OmegaConf
    from verl.workers.rollout.router import GlobalRequestLoadBalancer

    from verl_rlhfless.config import parse_config
    from verl_rlhfless.live import fleet as fleet_module
    from verl_rlhfless.live.completeness import RolloutLedger
    from verl_rlhfless.live.events import EventLog
    from verl_rlhfless.live.replica_life import WeightSource
    from verl_rlhfless.policy.schedule import scheduled_fleet

    router = ray.remote(GlobalRequestLoadBalancer).options(num_cpus=0).remote(servers={})
    ray.get(router.get_all_servers.remote())
    run_config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": 1}, "model": {}}})
    fleet_module.ElasticReplica = _FreeReplica  # type: ignore[misc,assignment]
    fleet = fleet_module.Fleet(run_config, parse_config(None), router, EventLog(None))
    uids = [f"uid{index}" for index in range(128)]
    keys = [f"{uid}_{session}_0" for uid in uids for session in range(8)]

    def one_step(step: int) -> None:
        ledger = RolloutLedger(8)
        fleet.start(scheduled_fleet(step, (_REPLICAS,), tp=1), WeightSource("store", step, 1.0))
        ledger.expect({"uid": uids, "index": list(range(128))})
        ledger.check(keys, 128)
        fleet.release()

    measured = [_timed(lambda step=step: one_step(step))[1] for step in range(1, _STEPS + 1)]
    return {"control_code_s": statistics.median(measured), "replicas": _REPLICAS, "samples": len(keys)}


class _FreeReplica:
    """A replica whose start and end cost nothing, so that only the code around it is timed."""

    def __init__(self, rank: int, *_: Any) -> None:
        self.name = f"r{rank}"
        self.world_size = 1
        self.server_address = f"address-{rank}"
        self.server_handle = None
        self.lease = type("Lease", (), {"name": self.name})
        self.state = type("State", (), {"value": "released"})

    async def start(self, weights: Any) -> Any:
        await asyncio.sleep(0)
        return type("Report", (), {"version": weights.version, "checksum": 0, "seconds": 0.0})

    async def release(self) -> Any:
        from verl_rlhfless.live.replica_life import ReleaseReport

        return ReleaseReport(True, 0.0, 0.0, 0.0)


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def main() -> None:
    """Measure everything and write the record."""
    import ray

    results: dict[str, Any] = {"import": {**import_cost(), **plugin_module_cost()}}
    ray.init("local", num_gpus=4, num_cpus=8, include_dashboard=False, object_store_memory=100_000_000)
    try:
        results["lease"] = lease_cost()
        results["control"] = control_cost()
    finally:
        ray.shutdown()
    write_result("foundation", results, command="python -m benchmarks.foundation")


if __name__ == "__main__":
    command.run(main, __doc__)
