"""verl's transfer queue is one of a whole Ray cluster: a second run there would take the first one's samples."""

from __future__ import annotations

import ray
from transfer_queue import interface

from verl_rlhfless.errors import UnsupportedError


def refuse_foreign_queue() -> None:
    """Return if the queue that this process has joined was made by this run.

    Raises:
        UnsupportedError: It is another run's. It is let go, because verl ends the queue that a process knows when its
            run ends, and the other run with it.
    """
    controller = interface._TQ_CONTROLLER
    own_job = ray.get_runtime_context().get_job_id()
    if controller is None or (job := controller._actor_id.job_id.hex()) == own_job:
        return
    interface._TQ_CONTROLLER = None
    raise UnsupportedError(
        f"another run of verl (Ray job {job}) uses this cluster, and verl's transfer queue does not tell the samples "
        "of two runs apart. Wait for its end (ray job list), or give each run a Ray cluster of its own."
    )
