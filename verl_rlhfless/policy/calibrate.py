"""Fits the performance model's few efficiencies to measured iterations and reports how far off it still is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.policy.gpus import GPUS
from verl_rlhfless.policy.perf import Efficiencies, EnginePerf
from verl_rlhfless.policy.snapshot import FloatArray

FORMAT = "rlhfless-calibration/1"
"""Of a calibration file, which ``benchmarks.gpu`` writes."""

_ROUNDS = 60
_STEP = 1e-5  # of a logarithm, for the slopes
_FIRST_DAMPING, _MORE_DAMPING, _LESS_DAMPING = 1e-3, 4, 3
"""Levenberg-Marquardt: the damping of the first round, and its factors after a round that failed or helped."""

_LEAST_SAMPLES = 4
_FITTED = (("hbm", 1.0), ("prefill", 1.0), ("launch_s", 1.0), ("per_seq_s", 1e-2))
"""What is fitted, and its upper limit."""
_READ = {**dict(_FITTED), "host": 1.0}
"""What a calibration file may set, and its upper limit."""


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


@dataclass(frozen=True, slots=True)
class MeasuredEfficiencies:
    """What a calibration file says: the type of GPU that was measured, and the efficiencies found on it."""

    gpu: str
    efficiencies: Efficiencies


def calibrate(perf: EnginePerf, samples: Sequence[IterationSample]) -> Calibration:
    """Return the model whose ``hbm``, ``prefill``, ``launch_s`` and ``per_seq_s`` fit the samples best.

    Levenberg-Marquardt on the log ratios of predicted to measured seconds, in the logarithms of the efficiencies.

    Raises:
        DataError: Fewer than 4 samples, or one that is not a positive time.
    """
    _check(samples)
    start = [getattr(perf.efficiencies, name) for name, _ in _FITTED]
    values, damping = np.log(np.array(start)), _FIRST_DAMPING
    residual = _residual(perf, samples, values)
    for _ in range(_ROUNDS):
        slopes = np.stack([_residual(perf, samples, values + step) - residual for step in _STEP * np.eye(len(values))])
        slopes /= _STEP
        normal = slopes @ slopes.T
        change = np.linalg.solve(normal + damping * (np.eye(len(values)) + np.diag(np.diag(normal))), slopes @ residual)
        tried = np.minimum(values - change, np.log([top for _, top in _FITTED]))
        found = _residual(perf, samples, tried)
        if found @ found < residual @ residual:
            values, residual, damping = tried, found, damping / _LESS_DAMPING
        else:
            damping *= _MORE_DAMPING
    errors = np.expm1(np.abs(residual))
    return Calibration(_with(perf, values), float(errors.mean()), float(errors.max()))


def parse_calibration(values: object, name: str) -> MeasuredEfficiencies:
    """Return what a parsed calibration file says; efficiencies that it does not mention keep their shipped value.

    Args:
        values: The parsed JSON object.
        name: The prefix of keys in errors (the file's path).

    Raises:
        ConfigError: The format is another one, or an efficiency is unknown or out of range.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, Mapping) else type(values).__name__
        raise ConfigError(f"{name}: format", found, f"must be {FORMAT!r}", "Write one: python -m benchmarks.gpu.")
    gpu = values.get("gpu")
    if not isinstance(gpu, str) or gpu not in GPUS:
        raise ConfigError(f"{name}: gpu", gpu, f"must be one of {', '.join(GPUS)}", "Measure on a GPU.")
    read = values.get("efficiencies")
    if not isinstance(read, Mapping) or not set(read) <= set(_READ):
        raise ConfigError(f"{name}: efficiencies", read, f"must hold some of {', '.join(_READ)}", "Correct it.")
    for key, value in read.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _READ[key]:
            rule = f"must be a number above 0, at most {_READ[key]:g}"
            raise ConfigError(f"{name}: efficiencies.{key}", value, rule, "Correct it.")
    return MeasuredEfficiencies(gpu, replace(Efficiencies(), **read))


def _check(samples: Sequence[IterationSample]) -> None:
    if len(samples) < _LEAST_SAMPLES:
        raise DataError(
            f"calibration needs at least {_LEAST_SAMPLES} measured iterations, got {len(samples)}. Measure more batch "
            "sizes."
        )
    for i, sample in enumerate(samples):
        counts = (sample.decodes, sample.context_tokens, sample.prefill_tokens)
        if not (sample.seconds > 0 and min(counts) >= 0):
            raise DataError(f"calibration sample {i}: {sample}: counts must be >= 0 and seconds > 0. Remove it.")


def _with(perf: EnginePerf, values: FloatArray) -> EnginePerf:
    """Return the model with ``values``, the logarithms of the fitted efficiencies in the order of ``_FITTED``."""
    hbm, prefill, launch_s, per_seq_s = (float(value) for value in np.exp(values))
    fitted = replace(perf.efficiencies, hbm=hbm, prefill=prefill, launch_s=launch_s, per_seq_s=per_seq_s)
    return replace(perf, efficiencies=fitted)


def _residual(perf: EnginePerf, samples: Sequence[IterationSample], values: FloatArray) -> FloatArray:
    """Return the log of predicted over measured seconds of each sample; prefills begin at a prompt's first token."""
    fitted = _with(perf, values)
    predicted = [
        fitted.iteration_s(
            s.decodes, s.context_tokens, s.prefill_tokens, s.prefill_tokens * (s.prefill_tokens + 1) // 2
        )
        for s in samples
    ]
    ratio: FloatArray = np.log(np.array(predicted) / np.array([s.seconds for s in samples]))
    return ratio
