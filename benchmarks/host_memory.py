"""What a run takes of the host's memory, measured beside what its start-up account computed.

Real elastic runs on CPU, two steps each: two FSDP2 ranks and one replica that shares their declared GPUs. ``tiny`` is
the demo's model, where processes are all there is; the account's constants come from it. ``larger`` is a random model
of 113 million parameters, which they were not fitted to. Measured is the largest sum, over one look, of the
proportional set size of every process that Ray started for the run; pages of the object store are in it.

    python -m benchmarks.host_memory    # about 4 minutes, 12 GB of memory; writes benchmarks/results/host_memory.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.process_watch import Look
from benchmarks.record import write_result
from benchmarks.scheduled import scheduled
from benchmarks.watched_run import NUM_GPUS, watched_run
from verl_rlhfless.ab.cluster import HostSize
from verl_rlhfless.demo.assets import MODEL_SIZE, ModelSize

_STEPS = 2
_NUM_CPUS = 64  # logical: verl reserves some for each declared GPU
_TARGET = 0.2
_LARGER = ModelSize(hidden=768, intermediate=3072, layers=12, heads=12, kv_heads=12, head_dim=64)


def measure(name: str, size: ModelSize, object_store_bytes: int, out: Path) -> dict[str, Any]:
    """Run two steps and return the computed and the measured bytes."""
    folder = out / name
    arm = scheduled(1).with_overrides(f"rlhfless.pool.max_gpus={NUM_GPUS}")
    looks = watched_run(arm, _STEPS, folder, size, HostSize(_NUM_CPUS, object_store_bytes))
    (account,) = [event for event in _events(folder) if event["event"] == "host_memory"]
    peak = max(looks, key=lambda look: look.total_bytes)
    computed, measured = account["num_bytes"], peak.total_bytes
    return {
        "computed_bytes": computed,
        "measured_bytes": measured,
        "computed_to_measured": computed / measured,
        "is_within_target": abs(computed / measured - 1) <= _TARGET,
        "computed": account["parts"],
        "measured": dict(peak.pss_bytes),
        "num_processes": dict(peak.counts),
        "measured_peaks": _peaks(looks),
    }


def _peaks(looks: Sequence[Look]) -> dict[str, int]:
    kinds = {kind for look in looks for kind in look.pss_bytes}
    return {kind: max(look.pss_bytes.get(kind, 0) for look in looks) for kind in sorted(kinds)}


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
    command.run(main, __doc__)
