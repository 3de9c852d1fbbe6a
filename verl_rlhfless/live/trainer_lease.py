"""The trainer's lease around a rollout: given back while the replicas generate, held again before the next phase.

Invariant: outside of ``before_rollout`` .. ``after_rollout`` the trainer holds its lease. Whether it leaves is decided
in ``policy/suspend.py``; this module enacts it, and measures what the next decision is made from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from verl_rlhfless.config import PoolConfig
from verl_rlhfless.errors import DeviceMemoryError, DeviceMismatchError, LeaseTimeoutError
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.lease import share_devices
from verl_rlhfless.live.worker_group import ResumeResult, SuspendResult
from verl_rlhfless.policy.suspend import (
    RolloutNeeds,
    SuspendDecision,
    SuspendHistory,
    decide_suspend,
    learn_rollout,
    stay,
)
from verl_rlhfless.types import DeviceKey

logger = logging.getLogger(__name__)

_LEASED_FIRST_S = 5.0
"""How long the trainer stays for replicas that are being leased beside it: those that come later may be waiting for the
very GPUs that it holds."""

_POLL_S = 0.02


class SuspendableGroup(Protocol):
    """The trainer's worker group."""

    @property
    def bound_devices(self) -> DeviceKey:
        """The devices that its processes are bound to."""

    def suspend(self, timeout_s: float, max_reserved_bytes: int) -> SuspendResult:
        """Leave the devices but for so many bytes of each, and return the lease."""

    def resume(self, timeout_s: float, same_device_wait_s: float) -> ResumeResult:
        """Lease the devices again and go back onto them."""


class Replicas(Protocol):
    """The replicas of a rollout, as far as the trainer has to know them."""

    @property
    def is_leased(self) -> bool:
        """Whether all that were asked for have their GPUs."""

    def device_keys(self) -> list[DeviceKey]:
        """Return the devices of their leases."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """How many GPUs the trainer has, and how many it and the replicas may hold together."""

    trainer: int
    budget: Callable[[], int]


class TrainerLease:
    """Enacts the suspend decisions of a run.

    Attributes:
        history: What earlier rollouts took.
        decision: For the current or last rollout.
        kept_because: Why the trainer never leaves any more; empty when it may.
    """

    def __init__(
        self, group: SuspendableGroup, gpus: Gpus, config: PoolConfig, events: EventLog, kept_because: str = ""
    ) -> None:
        self._group, self._gpus, self._config, self._events = group, gpus, config, events
        self.kept_because = kept_because
        self.history = SuspendHistory()
        self.decision, self._is_validation = stay("no rollout yet"), False
        self._began_s = 0.0
        self._over = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlhfless-trainer-lease")
        self._away: Future[None] | None = None
        self._suspended: SuspendResult | None = None
        self._suspend_s = 0.0
        self._resumed: tuple[ResumeResult, float] | None = None

    @property
    def num_gpus(self) -> int:
        """GPUs of the trainer."""
        return self._gpus.trainer

    @property
    def num_gpus_beside(self) -> int:
        """GPUs of the budget for replicas while the trainer keeps its own."""
        return max(0, self._gpus.budget() - self._gpus.trainer)

    @property
    def moves_s(self) -> tuple[float, float] | None:
        """What leaving and coming back took in the last rollout; ``None`` = the trainer stayed."""
        return (self._suspend_s, self._resumed[1]) if self._resumed is not None else None

    # ---- a rollout

    def before_rollout(
        self, replica_gpus: int, *, is_validation: bool = False, is_shared: bool = False
    ) -> SuspendDecision:
        """Decide for the coming rollout; when the replicas need the trainer's GPUs, return with them given back.

        With ``is_shared`` that is decided: the replicas run beside the trainer on its own GPUs. A trainer that memory
        keeps on its devices stays, from then on; the caller knows whether the replicas have room beside it.

        Raises:
            SuspendError: The ranks did not answer.
        """
        needs = RolloutNeeds(self._gpus.trainer, replica_gpus, self._gpus.budget(), is_validation)
        kept_because = "the replicas share its GPUs" if is_shared else self.kept_because
        self.decision = decision = stay(kept_because) if kept_because else decide_suspend(self.history, needs)
        self._is_validation, self._began_s = is_validation, time.monotonic()
        self._over.clear()
        self._suspended = self._resumed = None
        self._events.write("trainer_lease", is_suspended=decision.is_suspended, reason=decision.reason)
        logger.info("rlhfless: trainer %s: %s", "leaves" if decision.is_suspended else "stays", decision.reason)
        if decision.is_first and not self._try_suspend():
            self.decision = stay(self.kept_because)
        return self.decision

    def during_rollout(self, replicas: Replicas) -> None:
        """Let the trainer leave and, when the rollout is nearly over, come back; returns at once."""
        if self.decision.is_suspended:
            self._away = self._thread.submit(self._leave_and_return, replicas)

    def after_rollout(self) -> dict[str, float]:
        """Return with the lease held and every role on its device; the value is the rollout's metrics.

        Call it when the replicas of a decision with ``is_first`` have been released.

        Raises:
            LeaseTimeoutError: The GPUs were not granted in time; the trainer is still on the host.
            DeviceMismatchError: Only other GPUs were granted; the trainer is still on the host.
            SuspendError: The ranks could not leave, or not come back.
        """
        over_s = time.monotonic()
        self._join()
        if self._suspended is not None and self._resumed is None:
            self._resume()
        return self._learn(over_s - self._began_s, time.monotonic() - over_s)

    def close(self) -> None:
        """End the wait for a rollout that failed."""
        self._over.set()
        self._thread.shutdown()

    # ---- moves

    def _leave_and_return(self, replicas: Replicas) -> None:
        if not self.decision.is_first:
            give_up_s = time.monotonic() + _LEASED_FIRST_S
            while not (replicas.is_leased or self._over.is_set()) and time.monotonic() < give_up_s:
                self._over.wait(_POLL_S)  # replicas that lease later would take the devices that it returns to
            if self._over.is_set():
                return
            if not self._try_suspend():
                return
        after_s = self.decision.resume_after_s
        if self._over.wait(None if after_s is None else max(0.0, self._began_s + after_s - time.monotonic())):
            return
        if any(share_devices(self._group.bound_devices, key) for key in replicas.device_keys()):
            return
        try:
            self._resume()
        except (LeaseTimeoutError, DeviceMismatchError) as error:  # tried again when the rollout is over
            logger.warning("rlhfless: the trainer could not come back early: %s", error)

    def _try_suspend(self) -> bool:
        """Leave the devices; return whether no memory stayed on them. Where it does, nothing tries again."""
        try:
            self._suspend()
        except DeviceMemoryError as error:
            self.kept_because = f"an earlier suspend failed: {error}"
            self._events.write("suspend_failed", reason=str(error))
            logger.warning("rlhfless: the trainer keeps its lease from now on: %s", error)
            return False
        return True

    def _suspend(self) -> None:
        began_s, config = time.monotonic(), self._config
        self._suspended = result = self._group.suspend(config.resume_timeout_s, config.suspend_residual_bytes)
        self._suspend_s = time.monotonic() - began_s
        self._events.write(
            "trainer_suspended",
            lease=result.lease.name,
            offload_s=result.offload_s,
            confirm_s=result.confirm_s,
            release_s=result.release_s,
            device_reserved_bytes=sum(rank.device_reserved_bytes for rank in result.ranks),
            pinned_host_bytes=sum(rank.pinned_host_bytes for rank in result.ranks),
        )

    def _resume(self) -> None:
        began_s = time.monotonic()
        result = self._group.resume(self._config.resume_timeout_s, self._config.same_device_wait_s)
        self._resumed = result, time.monotonic() - began_s
        self._events.write(
            "trainer_resumed",
            lease=result.lease.name,
            lease_s=result.lease_s,
            onload_s=result.onload_s,
            num_wrong_leases=len(result.wrong_leases),
        )

    def _join(self) -> None:
        self._over.set()
        if self._away is not None:
            away, self._away = self._away, None
            away.result()

    def _learn(self, rollout_s: float, waited_s: float) -> dict[str, float]:
        if not self._is_validation:
            self.history = learn_rollout(self.history, rollout_s, self.moves_s)
        if self._suspended is None or self._resumed is None:
            return {"rlhfless/trainer_suspended": 0.0}
        return {
            "rlhfless/trainer_suspended": 1.0,
            "rlhfless/suspend_s": self._suspend_s,
            "rlhfless/resume_s": self._resumed[1],
            "rlhfless/resume_wait_s": waited_s,
            "rlhfless/trainer_gpu_s_given_back": self._given_back_gpu_s(self._suspended, self._resumed[0]),
        }

    def _given_back_gpu_s(self, left: SuspendResult, back: ResumeResult) -> float:
        """Return the GPU-seconds between the two leases; wrong leases in between were held, so they don't count."""
        assert left.lease.released_s is not None
        held_s = sum(lease.released_s - lease.granted_s for lease in back.wrong_leases if lease.released_s is not None)
        return self._gpus.trainer * max(0.0, back.lease.granted_s - left.lease.released_s - held_s)
