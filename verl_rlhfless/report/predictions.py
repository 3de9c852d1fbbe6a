"""What the planner expected of each step beside what was measured, from the ``planned`` events of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from verl_rlhfless.report.observed import Observed
from verl_rlhfless.report.record import Figures

_PREFIX = "predicted_"
_MEASURED: Mapping[str, Callable[[Figures], float | None]] = {
    "rollout_s": lambda figures: figures.requests.rollout_s if figures.requests else None,
    "step_s": lambda figures: figures.step_s,
    "gpu_s": lambda figures: figures.gpu.allocated if figures.gpu else None,
    "gpu_s_allocated": lambda figures: figures.gpu.allocated if figures.gpu else None,
    "response_tokens": lambda figures: figures.response_tokens,
    "num_replicas": lambda figures: figures.num_replicas,
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """One figure of one step: what was predicted, and what was measured (``None`` = not known)."""

    step: int
    figure: str
    predicted: float
    measured: float | None

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        return None if not self.measured else (self.predicted - self.measured) / self.measured


def predictions(observed: Observed, steps: Mapping[int, Figures]) -> list[Prediction]:
    """Return every number that a ``planned`` event of a step predicts; the last event of a step counts.

    A prediction is a field ``predicted_<figure>`` of the event, or ``<figure>`` in its ``forecast``.
    """
    planned = {event["step"]: event for event in observed.events if event["event"] == "planned" and "step" in event}
    return [
        Prediction(step, figure, float(value), _measured(figure, steps.get(step)))
        for step, event in sorted(planned.items())
        for figure, value in _forecast(event).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _forecast(event: Mapping[str, Any]) -> dict[str, Any]:
    prefixed = {name.removeprefix(_PREFIX): value for name, value in event.items() if name.startswith(_PREFIX)}
    return {**(event.get("forecast") or {}), **prefixed}


def _measured(figure: str, figures: Figures | None) -> float | None:
    measure = _MEASURED.get(figure)
    return measure(figures) if measure is not None and figures is not None else None
