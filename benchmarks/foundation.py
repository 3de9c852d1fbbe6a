"""What the foundation costs: the plugin's import, and leases.

Every figure comes from this run; pairs are interleaved, so that a drift of the machine hits both sides.

    python -m benchmarks.foundation          # about 3 minutes; writes benchmarks/results/foundation.json
"""

from __future__ import annotations

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
    finally:
        ray.shutdown()
    write_result("foundation", results, command="python -m benchmarks.foundation")


if __name__ == "__main__":
    command.run(main, __doc__)
