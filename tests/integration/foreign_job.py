"""A Ray job of someone else: takes GPUs of a running cluster, works on them, and leaves when its standard input closes.

Usage: python foreign_job.py ADDRESS NUM_GPUS
"""

from __future__ import annotations

import json
import os
import sys

import ray

_START_TIMEOUT_S = 60.0


@ray.remote(num_cpus=0)
class Occupant:
    def work(self) -> list[str]:
        """Return the devices that this process sees, after some work on them."""
        sum(i * i for i in range(100_000))
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")


def main(address: str, num_gpus: int) -> None:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    occupant = Occupant.options(num_gpus=num_gpus).remote()
    devices = ray.get(occupant.work.remote(), timeout=_START_TIMEOUT_S)
    print(json.dumps({"devices": devices, "job_id": ray.get_runtime_context().get_job_id()}), flush=True)
    sys.stdin.read()
    assert ray.get(occupant.work.remote(), timeout=_START_TIMEOUT_S) == devices
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
