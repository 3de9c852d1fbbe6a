"""The patches fit the installed vLLM and verl, and vLLM's queues still deliver every message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

SCRIPT = """
import json, threading
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.device_communicators import shm_broadcast
from vllm.v1.worker.cpu_worker import CPUWorker
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension as Extension

writer = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1)
reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), rank=0)
received = []
def read():
    reader.wait_until_ready()
    received.extend(reader.dequeue(timeout=60) for _ in range(1000))
thread = threading.Thread(target=read)
thread.start()
writer.wait_until_ready()
for number in range(1000):
    writer.enqueue(number, timeout=60)
thread.join(60)
print(json.dumps({
    "spin_s": reader._spin_condition.busy_loop_s,
    "in_order": received == list(range(1000)),
    "probed": [hasattr(getattr(owner, name), "__wrapped__") for owner, name in
               ((CPUWorker, "execute_model"), (CPUWorker, "sample_tokens"), (Extension, "update_weights_from_ipc"))],
    "has_probe": hasattr(CPUWorker, "_rlhfless_probe"),
}))
"""


def run_in_vllm(environment: dict[str, str]) -> dict[str, object]:
    """Return what a fresh process says that loads vLLM's plugins by their entry points."""
    ours = ("VERL_PLATFORM", "RLHFLESS_PACE", "RLHFLESS_OBSERVER_DIR", "VLLM_PLUGINS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_vllm_loads_the_instrument(tmp_path: Path) -> None:
    seen = run_in_vllm({"VERL_PLATFORM": "cpu", "RLHFLESS_OBSERVER_DIR": str(tmp_path)})

    assert seen == {"spin_s": 0, "in_order": True, "probed": [True, True, True], "has_probe": True}


def test_without_being_asked_vllm_is_stock() -> None:
    seen = run_in_vllm({})

    assert (seen["spin_s"], seen["has_probe"]) == (1, False)
