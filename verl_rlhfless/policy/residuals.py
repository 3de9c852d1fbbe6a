"""How far lengths fall from their prediction: the survival curve of the standardised error, learnt from finished steps.

Real tails are not log-normal: some end early, some go on for long. What is left of a sample that outlives its
prediction follows from the errors that were seen that far out.

Invariants: survival falls from 1; the mean is 0 (a shift of all lengths is the level's business); few samples leave
the normal curve nearly as it was; a response that was clipped counts as longer than the cap, not as of that length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from verl_rlhfless.policy.snapshot import FloatArray

_LOW, _HIGH = -6.0, 8.0
"""Least and largest standardised error that is told apart."""

_KNOTS = np.linspace(_LOW, _HIGH, 57)
"""Where a curve is kept, four knots a unit; between two of them its logarithm is linear."""

_PER_UNIT = 256
"""Points of a unit in the tables that look-ups read."""

_NUM_NODES = 16
_FINE = np.linspace(_LOW, _HIGH, round((_HIGH - _LOW) * _PER_UNIT) + 1)
_LEAST = 1e-12
"""Least survival, so that what follows from it is finite."""


def _normal(z: FloatArray) -> FloatArray:
    """Return the normal distribution's survival at each of ``z``, [K]."""
    return np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in z.tolist()])


NORMAL = tuple(_normal(_KNOTS).tolist())
"""Survival of the normal distribution at the knots."""


@dataclass(frozen=True)
class Residuals:
    """Standardised errors of log lengths. ``survival`` is P(error > knot) at 57 knots from -6 to 8."""

    survival: tuple[float, ...] = NORMAL

    @cached_property
    def _curve(self) -> FloatArray:
        """Survival at each point of ``_FINE``."""
        knots = np.log(np.maximum(self.survival, _LEAST))
        curve: FloatArray = np.exp(np.interp(_FINE, _KNOTS, knots))
        return curve

    @cached_property
    def _beyond(self) -> FloatArray:
        """Mean error of those beyond each point z: z and the area under the survival beyond it, over that at z."""
        area = (self._curve[1:] + self._curve[:-1]) / 2 / _PER_UNIT
        rest = np.concatenate((np.cumsum(area[::-1])[::-1], [0.0]))
        beyond: FloatArray = _FINE + rest / self._curve
        return beyond

    def beyond(self, z: FloatArray) -> FloatArray:
        """Return the probability of an error larger than ``z``, any shape."""
        # the nearest point of the table: half a point is added, the rest is cut off
        nearest = np.clip((z - (_LOW - 0.5 / _PER_UNIT)) * _PER_UNIT, 0.0, len(_FINE) - 1.0)
        return self._curve.take(nearest.astype(np.intp))

    def mean_beyond(self, z: FloatArray) -> FloatArray:
        """Return the mean of the errors that are larger than ``z``, any shape."""
        mean: FloatArray = np.maximum(_interpolated(self._beyond, z), z)
        return mean

    @cached_property
    def _gentle(self) -> FloatArray:
        """``_beyond``, lowered so that its distance from the point never grows from one point to the next."""
        gentle: FloatArray = _FINE + np.minimum.accumulate(self._beyond - _FINE)
        return gentle

    def gentle_beyond(self, z: FloatArray) -> FloatArray:
        """Return ``mean_beyond`` where it never rises faster than ``z``.

        So whatever raises what is expected of a sample never lowers what is imputed for it.
        """
        mean: FloatArray = np.maximum(_interpolated(self._gentle, z), z)
        return mean

    def quantile(self, share: float) -> float:
        """Return the error that a ``share`` of all stays below."""
        return float(np.interp(1 - share, self._curve[::-1], _FINE[::-1]))

    @cached_property
    def nodes(self) -> FloatArray:
        """16 errors that stand for equal shares of all."""
        shares = 1 - (np.arange(_NUM_NODES) + 0.5) / _NUM_NODES
        nodes: FloatArray = np.interp(shares, self._curve[::-1], _FINE[::-1])[::-1].copy()
        return nodes


def _interpolated(table: FloatArray, z: FloatArray) -> FloatArray:
    """Return a table's values at ``z``, any shape, linear between the points of ``_FINE``, constant beyond them."""
    position = np.clip((z - _LOW) * _PER_UNIT, 0.0, len(table) - 1.0)
    left = np.minimum(position.astype(np.intp), len(table) - 2)
    low = table.take(left)
    value: FloatArray = low + (position - left) * (table.take(left + 1) - low)
    return value


@lru_cache(maxsize=8)
def residuals_of(survival: tuple[float, ...]) -> Residuals:
    """Return the residuals with this survival curve; its tables are built once."""
    return Residuals(survival)


def learn_residuals(
    old: tuple[float, ...], error: FloatArray, is_clipped: NDArray[np.bool_], rate: float
) -> tuple[float, ...]:
    """Return the survival curve after a step: the mean of the old one and of the step's own (Kaplan-Meier).

    Beyond the step's largest error, where it says nothing, its curve goes on in proportion to the normal one.

    Args:
        old: Before.
        error: [B] standardised errors.
        is_clipped: [B] whether the response reached the cap, so that its error is at least this large.
        rate: Weight of the step.
    """
    error = error - error.mean()
    order = np.lexsort((is_clipped, error))  # at equal errors those that ended come before those that were clipped
    at_risk = np.arange(len(error), 0, -1)
    left = np.cumprod(1 - np.where(is_clipped[order], 0.0, 1.0) / at_risk)
    sorted_error = error[order]
    position = np.searchsorted(sorted_error, _KNOTS, side="right")
    seen = np.concatenate(([1.0], left))[position]
    normal = np.array(NORMAL)
    last = float(np.interp(sorted_error[-1], _KNOTS, normal))
    seen = np.where(position == len(error), left[-1] * np.minimum(normal / max(last, _LEAST), 1.0), seen)
    mixed = (1 - rate) * np.array(old) + rate * seen
    return tuple(np.minimum.accumulate(mixed).tolist())
