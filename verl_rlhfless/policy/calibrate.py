"""Fits the performance model's few efficiencies to measured iterations and reports how far off it still is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.errors import DataError
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.snapshot import FloatArray

_ROUNDS = 60
_STEP = 1e-5
_FITTED = (("hbm", 1.0), ("prefill", 1.0), ("launch_s", 1.0), ("per_seq_s", 1e-2))
"""What is fitted, and its upper limit."""


@dataclass(frozen=True, slots=True)
class IterationSample:
    """One measured engine iteration: its batch, summed context, prefill tokens (0 = pure decode), and seconds."""

    decodes: int
    context_tokens: int
    prefill_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The fitted model and its relative errors on the samples."""

    perf: EnginePerf
    mean_error: float
    max_error: float


def calibrate(perf: EnginePerf, samples: Sequence[IterationSample]) -> Calibration:
    """Return the model whose ``hbm``, ``prefill``, ``launch_s`` and ``per_seq_s`` fit the samples best.

    Levenberg-Marquardt on the log ratios of predicted to measured seconds, in the logarithms of the efficiencies.

    Raises:
        DataError: Fewer than 4 samples, or one that is not a positive time.
    """
    if len(samples) < 4:
        raise DataError(
            f"calibration needs at least 4 measured iterations, got {len(samples)}. Measure more batch sizes."
        )
    for i, sample in enumerate(samples):
        if not (
            sample.seconds > 0 and sample.decodes >= 0 and sample.context_tokens >= 0 and sample.prefill_tokens >= 0
        ):
            raise DataError(f"calibration sample {i}: {sample}: counts must be >= 0 and seconds > 0. Remove it.")
    start = [getattr(perf.efficiencies, name) for name, _ in _FITTED]
    values, damping = np.log(np.array(start)), 1e-3
    residual = _residual(perf, samples, values)
    for _ in range(_ROUNDS):
        slopes = np.stack([_residual(perf, samples, values + step) - residual for step in _STEP * np.eye(len(values))])
        slopes /= _STEP
        normal = slopes @ slopes.T
        change = np.linalg.solve(normal + damping * (np.eye(len(values)) + np.diag(np.diag(normal))), slopes @ residual)
        tried = np.minimum(values - change, np.log([top for _, top in _FITTED]))
        found = _residual(perf, samples, tried)
        if found @ found < residual @ residual:
            values, residual, damping = tried, found, damping / 3
        else:
            damping *= 4
    errors = np.expm1(np.abs(residual))
    return Calibration(_with(perf, values), float(errors.mean()), float(errors.max()))


def _with(perf: EnginePerf, values: FloatArray) -> EnginePerf:
    hbm, prefill, launch_s, per_seq_s = (float(value) for value in np.exp(values))
    fitted = replace(perf.efficiencies, hbm=hbm, prefill=prefill, launch_s=launch_s, per_seq_s=per_seq_s)
    return replace(perf, efficiencies=fitted)


def _residual(perf: EnginePerf, samples: Sequence[IterationSample], values: FloatArray) -> FloatArray:
    fitted = _with(perf, values)
    predicted = [
        fitted.iteration_s(
            s.decodes, s.context_tokens, s.prefill_tokens, s.prefill_tokens * (s.prefill_tokens + 1) // 2
        )
        for s in samples
    ]
    ratio: FloatArray = np.log(np.array(predicted) / np.array([s.seconds for s in samples]))
    return ratio
