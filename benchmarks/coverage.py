"""How far predicted lengths can be trusted: each step of a trace is predicted before it, and at its half, then learnt.

Counts from the third step on. `before`: p10 to p90, the nominal 80 % interval, before the step. `running`: that of the
samples that still run when half of the step's are complete, given what was generated. `width` is the median of p90
over p10; `step_width`, p90 over p10 of the step's own lengths, is what an interval needs that knows no prompts.
`pinball` is the loss of p10, p50 and p90 over that of the step's own quantiles: 1 for who knows the distribution
beforehand, less for who tells prompts apart, more where intervals are too wide or too short.

A clipped response is inside where p90 is the cap: where a tenth is clipped, perfect predictions cover up to 90 %.

Usage: python -m benchmarks.coverage TRACE... --json OUT
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import command
from benchmarks.record import file_names, write_simulated
from verl_rlhfless.errors import DataError
from verl_rlhfless.policy.predict import LengthModel, learn, predict, refine
from verl_rlhfless.policy.prediction import Prediction
from verl_rlhfless.policy.snapshot import FloatArray, IntArray
from verl_rlhfless.sim.workload import StepData, load_steps

SHARES = np.array([0.1, 0.5, 0.9])
LIMITS = (0.75, 0.85)
"""Of the share of samples that an 80 % interval covers."""

_ONLY_LEARNT = 2
"""First steps, whose predictions rest on guesses."""

_OF_STEPS = {"least": np.min, "mean": np.mean, "most": np.max}


@dataclass(frozen=True)
class Forecast:
    """One step's predictions.

    Attributes:
        lengths: [B] what came.
        is_known: [B] whether the prompt was seen before.
        before: [B, 3] p10, p50, p90 tokens before the step.
        going: [R] the samples that still ran at half of the step.
        running: [R, 3] their quantiles then.
    """

    lengths: IntArray
    is_known: IntArray
    before: FloatArray
    going: IntArray
    running: FloatArray


def forecasts(steps: Sequence[StepData]) -> Iterator[Forecast]:
    """Yield every step's predictions, each learnt from the steps before it."""
    model = LengthModel()
    for step in steps:
        batch, lengths = step.batch, step.lengths
        prior, depth = predict(model, batch), int(np.median(lengths))
        going = np.flatnonzero(lengths > depth)
        refined = refine(model, prior, batch, np.minimum(lengths, depth), (lengths <= depth).astype(float))
        is_known = np.array([prompt in model.effects for prompt in batch.prompt_ids])[batch.group_of]
        yield Forecast(lengths, is_known, prior.quantiles(), going, beyond(refined, depth)[going])
        model = learn(model, batch, lengths)


def beyond(prediction: Prediction, depth: int) -> FloatArray:
    """Return [B, 3] p10, p50, p90 tokens of samples that are longer than ``depth``."""
    alive = prediction.alive_at(np.array([float(depth)]))[:, 0]
    z = np.array(
        [[prediction.errors.quantile(1 - (1 - share) * still) for share in SHARES] for still in alive.tolist()]
    )
    tokens: FloatArray = np.exp(prediction.mu[:, None] + z * prediction.sigma[:, None])
    return np.clip(tokens, depth + 1, max(prediction.cap, depth + 1))


def covered(lengths: IntArray, quantiles: FloatArray) -> FloatArray:
    """Return [B] 1.0 where a length lies from p10 to p90."""
    inside: FloatArray = ((lengths >= quantiles[:, 0]) & (lengths <= quantiles[:, 2])).astype(float)
    return inside


def pinball(lengths: IntArray, quantiles: FloatArray) -> float:
    """Return the mean loss of [B, 3] or [3] quantiles; 0 where each is the length itself."""
    above = lengths[:, None] - quantiles
    return float(np.maximum(SHARES * above, (SHARES - 1) * above).mean())


def quality(steps: Sequence[tuple[IntArray, FloatArray]]) -> dict[str, Any]:
    """Return the figures of predictions: the [B] lengths and [B, 3] quantiles of every step."""
    lengths, quantiles = (np.concatenate([step[part] for step in steps]) for part in (0, 1))
    error = np.abs(quantiles[:, 1] - lengths)
    own = [np.quantile(each, SHARES) for each, _ in steps]
    hindsight = sum(len(each) * pinball(each, known) for (each, _), known in zip(steps, own, strict=True)) / len(
        lengths
    )
    of_steps = [float(covered(*step).mean()) for step in steps]
    return {
        "samples": len(lengths),
        "coverage": round(float(covered(lengths, quantiles).mean()), 3),
        "of_steps": {name: round(float(of(of_steps)), 3) for name, of in _OF_STEPS.items()},
        "below": round(float(np.mean(lengths < quantiles[:, 0])), 3),
        "above": round(float(np.mean(lengths > quantiles[:, 2])), 3),
        "p50_error_tokens": {"median": round(float(np.median(error))), "p90": round(float(np.quantile(error, 0.9)))},
        "width": round(float(np.median(quantiles[:, 2] / quantiles[:, 0])), 2),
        "step_width": round(float(np.median([known[2] / known[0] for known in own])), 2),
        "pinball": round(pinball(lengths, quantiles) / max(hindsight, 1e-9), 3),
    }


def rate(path: Path) -> dict[str, Any]:
    """Return the figures of a trace.

    Raises:
        DataError: It is too short.
    """
    steps = load_steps(path)
    if len(steps) <= _ONLY_LEARNT:
        raise DataError(
            f"{path.name}: {len(steps)} steps, but the first {_ONLY_LEARNT} are only learnt from. Take longer."
        )
    seen = list(forecasts(steps))[_ONLY_LEARNT:]
    known = np.concatenate([one.is_known for one in seen])
    inside = np.concatenate([covered(one.lengths, one.before) for one in seen])
    clipped = [step.lengths >= step.batch.max_response_tokens for step in steps[_ONLY_LEARNT:]]
    visits = {"first_visit": inside[known == 0], "revisit": inside[known == 1]}
    return {
        "steps": len(seen),
        "clipped": round(float(np.concatenate(clipped).mean()), 3),
        "before": quality([(one.lengths, one.before) for one in seen])
        | {f"{name}_coverage": round(float(of.mean()), 3) if len(of) else None for name, of in visits.items()},
        "running": quality([(one.lengths[one.going], one.running) for one in seen if len(one.going)]),
    }


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each interval: the traces on which it covers too little or too much."""
    found = []
    for when in ("before", "running"):
        coverage = {row["trace"]: row[when]["coverage"] for row in rows}
        missed = {trace: value for trace, value in coverage.items() if not LIMITS[0] <= value <= LIMITS[1]}
        entry = {"target": f"80 % interval, {when}: coverage on each trace", "limits": list(LIMITS)}
        found.append(entry | {"traces": len(rows), "missed": missed, "verdict": "missed" if missed else "met"})
    return found


def main(traces: list[Path], out: Annotated[Path, typer.Option("--json")]) -> None:
    """Rate every trace: seconds."""
    rows = [{"trace": path.name.split(".")[0]} | rate(path) for path in traces]
    told = f"python -m benchmarks.coverage {file_names(traces)} --json {out.name}"
    write_simulated(out, {"targets": verdicts(rows), "traces": rows}, told, shown=["targets", "traces"])


if __name__ == "__main__":
    command.run(main, __doc__)
