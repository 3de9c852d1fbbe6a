"""What a router did for the prompts of one step: those announced first, those that joined, and later refills."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RolloutReport:
    """What the router did for the prompts of one step, those that were announced later than the first included.

    Attributes:
        step: Training step.
        num_samples: Samples that were announced, those that joined without a plan included.
        num_looks: How often the policy was asked.
        num_migrations: Running samples that were cut to continue elsewhere.
        num_late: Messages about attempts that had ended already, since the start of the run.
        rollout_s: From the first announcement to the last sample's end.
        router_cpu_s: CPU time of the router's process meanwhile: requests, journal and decisions.
        failure: Why no decisions were made to the end; empty when they were.
        num_released: Replicas that gave their lease back before the last announced sample ended.
        num_started: Replicas that were asked for during the rollout.
    """

    step: int
    num_samples: int
    num_looks: int
    num_migrations: int
    num_late: int
    rollout_s: float
    router_cpu_s: float
    failure: str = ""
    num_released: int = 0
    num_started: int = 0

    def after(self, earlier: RolloutReport) -> RolloutReport:
        """Return the report of both parts of a step, of which this is the later one."""
        return replace(
            self,
            num_samples=earlier.num_samples + self.num_samples,
            num_looks=earlier.num_looks + self.num_looks,
            num_migrations=earlier.num_migrations + self.num_migrations,
            router_cpu_s=earlier.router_cpu_s + self.router_cpu_s,
            failure=earlier.failure or self.failure,
            num_released=earlier.num_released + self.num_released,
        )


class StepReport:
    """Adds up the reports of what is announced for one step.

    Attributes:
        total: Of the last step of which something has ended; ``None`` before that.
        num_joined: Samples that joined without a plan since the last announcement.
    """

    def __init__(self) -> None:
        self.total: RolloutReport | None = None
        self.num_joined = 0
        self._began_s = 0.0

    def begin(self, step: int) -> None:
        """Note an announcement."""
        self.num_joined = 0
        if not self.has_part_of(step):
            self._began_s = time.monotonic()

    def has_part_of(self, step: int) -> bool:
        """Return whether something of a step has ended."""
        return self.total is not None and self.total.step == step

    @property
    def rollout_s(self) -> float:
        """Seconds since the step's first announcement."""
        return time.monotonic() - self._began_s

    def add(self, report: RolloutReport) -> None:
        """Add what has ended."""
        is_further = self.total is not None and self.total.step == report.step
        self.total = report.after(self.total) if is_further and self.total is not None else report

    def sample_ended(self) -> None:
        """Note the end of a sample that joined without a plan: it may be the step's last."""
        if self.total is not None:
            self.total = replace(self.total, rollout_s=self.rollout_s)
