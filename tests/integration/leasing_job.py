"""A Ray job that leases GPUs and logs steps like a training run, and prints between which times each of it happened."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

FOLDER, ADDRESS = Path(sys.argv[1]), sys.argv[2]
WAIT_S = 60.0
happened: dict[str, list[float]] = {}


def wait_until_recorded(text: str, name: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in (FOLDER / name).read_text():
        assert time.monotonic() < deadline, f"{text} did not appear in {name}"
        time.sleep(0.01)


def lease(name: str, *bundles: float, resource: str = "GPU"):
    before_s = time.time()
    group = placement_group([{resource: count} for count in bundles], name=name)
    assert group.wait(WAIT_S)
    happened[f"granted {name}"] = [before_s, time.time()]
    return group


def release(group, name: str) -> None:
    before_s = time.time()
    remove_placement_group(group)
    while placement_group_table(group)["state"] != "REMOVED":
        time.sleep(0.002)
    happened[f"released {name}"] = [before_s]


def log_step(step: int, **data: float) -> None:
    before_s = time.time()
    with (FOLDER / "metrics.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps({"step": step, "data": data}).encode() + b"\n")
    happened[f"step {step}"] = [before_s, time.time()]
    wait_until_recorded(f'"step": {step},', "steps.jsonl")


ray.init(address=ADDRESS, log_to_driver=False, logging_level="ERROR")
lease("only CPUs", 1.0, resource="CPU")
trainer = lease("global_poolverl_group_2:0", 1.0, 1.0)
begin_s = time.time()
first = lease("rlhfless/replica/r0", 2.0)
log_step(1, **{"timing_s/step": time.time() - begin_s})
release(first, "rlhfless/replica/r0")
second = lease("rlhfless/replica/r1", 2.0)  # granted as soon as the GPUs of r0 are free
wait_until_recorded('"rlhfless/replica/r1"', "leases.jsonl")
happened["released rlhfless/replica/r0"].append(happened["granted rlhfless/replica/r1"][1])
release(second, "rlhfless/replica/r1")
wait_until_recorded('"released", "lease": "rlhfless/replica/r1"', "leases.jsonl")
happened["released rlhfless/replica/r1"].append(time.time())
log_step(2, **{"timing_s/step": 0.001})
release(lease("rlhfless/replica/short", 1.0), "rlhfless/replica/short")
wait_until_recorded('"released", "lease": "rlhfless/replica/short"', "leases.jsonl")
happened["released rlhfless/replica/short"].append(time.time())
happened["released global_poolverl_group_2:0"] = [time.time()]  # by the end of the job, as a real trainer's
print(json.dumps(happened), flush=True)
