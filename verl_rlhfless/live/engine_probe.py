"""The instrument inside one vLLM worker process: the activity log (rank 0 of an engine) and pacing (every rank).

Chosen by the environment, because vLLM starts these processes and passes nothing else on: ``RLHFLESS_OBSERVER_DIR``
names the folder of the logs, ``RLHFLESS_PACE`` holds a pace model as JSON.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from verl_rlhfless.live.engine_log import EngineLogWriter
from verl_rlhfless.live.iteration import Iteration, RequestTable
from verl_rlhfless.live.pacing import NOT_PACED, PaceModel, Pacer
from verl_rlhfless.live.variables import OBSERVER_DIR_VARIABLE, PACE_VARIABLE


class EngineProbe:
    """Watches, and when asked paces, the iterations of one worker."""

    def __init__(self, log: EngineLogWriter | None, pacer: Pacer | None) -> None:
        self._log, self._pacer = log, pacer
        self._requests = RequestTable()
        self._iteration: Iteration | None = None

    @classmethod
    def from_environment(cls, rank: int, tp: int) -> EngineProbe:
        """Return what the environment asks for.

        Args:
            rank: Rank of the worker in its engine; rank 0 writes the log.
            tp: Tensor-parallel size of the engine.

        Raises:
            ConfigError: The pace model is malformed, or does not know ``tp``.
        """
        directory, pace = os.environ.get(OBSERVER_DIR_VARIABLE), os.environ.get(PACE_VARIABLE)
        pacer = Pacer(PaceModel.parse(pace), tp) if pace else None
        return cls(EngineLogWriter(Path(directory), tp) if directory and rank == 0 else None, pacer)

    def begin(self, scheduler_output: Any) -> None:
        """Note that the worker starts to compute what vLLM's ``SchedulerOutput`` holds."""
        self._iteration = self._requests.observe(scheduler_output)
        if self._pacer is not None and self._iteration.num_requests:
            self._pacer.begin(self._iteration)
        if self._log is not None:
            self._log.begin(self._iteration)

    def end(self) -> None:
        """Note that the iteration that began, if any, is computed; wait for its declared end when paced."""
        iteration, self._iteration = self._iteration, None
        if iteration is None or not iteration.num_requests:
            return
        paced = NOT_PACED if self._pacer is None else self._pacer.wait()
        if self._log is not None:
            self._log.end(iteration, paced)

    def change_lease(self) -> None:
        """Go on in a log of its own: the environment names another lease."""
        if self._log is not None:
            self._log = self._log.successor()

    def loaded(self) -> None:
        """Note that a weight load is complete."""
        if self._log is not None:
            self._log.loaded()
