"""Measured rows beside what the shipped performance model says, and the calibration that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.gpu.rows import Row
from verl_rlhfless.policy.calibrate import FORMAT, Calibration, calibrate
from verl_rlhfless.policy.perf import BLOCK_TOKENS, EnginePerf
from verl_rlhfless.policy.transitions import LeaseTimes

_TIMES = LeaseTimes()


def predicted_s(row: Row, perf: EnginePerf) -> float | None:
    """Return the model's seconds for what a row measured; ``None`` where it has no figure of its own."""
    sample = row.sample
    if sample is not None:
        prompt = sample.prefill_tokens
        return perf.iteration_s(sample.decodes, sample.context_tokens, prompt, prompt * (prompt + 1) // 2)
    figures = {
        "load": perf.load_s,
        "load_pinned": perf.load_s,
        "pull": perf.load_s,
        "publish": row.num_bytes / _TIMES.publish_bytes_per_s,
        "start": _TIMES.cold_start_s,
        "wake_1": _TIMES.hybrid_wake_s + perf.load_s,
        "wake_2": _TIMES.wake_s,
        "sleep_1": _TIMES.hybrid_sleep_s,
        "sleep_2": _TIMES.park_s,
    }
    return figures.get(row.what)


def fit(rows: Sequence[Row], perf: EnginePerf) -> Calibration:
    """Return the model with every efficiency that the rows tell.

    Raises:
        DataError: Fewer than four iterations were measured.
    """
    fitted = calibrate(perf, [sample for row in rows if (sample := row.sample) is not None])
    copied = [row for what in ("pull", "load") for row in rows if row.what == what]
    if not copied:
        return fitted
    best = perf.shape.weight_bytes / perf.gpu.host_bytes_per_s
    host = min(1.0, best / copied[0].seconds)
    return replace(fitted, perf=replace(fitted.perf, efficiencies=replace(fitted.perf.efficiencies, host=host)))


def calibration_record(rows: Sequence[Row], perf: EnginePerf, fitted: Calibration) -> dict[str, Any]:
    """Return the calibration file: what ``parse_calibration`` reads, and what it was made from."""
    found = asdict(fitted.perf.efficiencies)
    samples = [asdict(sample) for row in rows if (sample := row.sample) is not None]
    return {
        "format": FORMAT,
        "gpu": perf.gpu.name,
        "model": perf.shape.name,
        "tp": perf.tp,
        "efficiencies": {name: found[name] for name in ("hbm", "prefill", "launch_s", "per_seq_s", "host")},
        "mean_error": fitted.mean_error,
        "max_error": fitted.max_error,
        "samples": samples,
    }


def compared(rows: Sequence[Row], perf: EnginePerf, fitted: EnginePerf) -> list[dict[str, Any]]:
    """Return every row with the shipped and the fitted model's seconds and their relative errors."""
    lines = []
    for row in rows:
        line = row.as_json()
        if row.what == "cache":
            line["shipped_tokens"] = perf.kv_blocks * BLOCK_TOKENS
            line["shipped_error"] = line["shipped_tokens"] / row.context_tokens - 1
        for name, model in (("shipped", perf), ("fitted", fitted)):
            seconds = predicted_s(row, model)
            if seconds is not None:
                line[f"{name}_s"], line[f"{name}_error"] = seconds, seconds / row.seconds - 1
        lines.append(line)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as text: milliseconds, and errors of the model in per cent of the measured time."""
    head = f"{'what':<14}{'batch':>6}{'context':>9}{'prompt':>8}{'measured ms':>13}{'shipped ms':>12}"
    text = [f"{head}{'error':>8}{'fitted':>8}"]
    for line in lines:
        counts = "".join(
            f"{line.get(key, '-'):>{width}}"
            for key, width in (("decodes", 6), ("context_tokens", 9), ("prefill_tokens", 8))
        )
        shipped = f"{line['shipped_s'] * 1e3:.2f}" if "shipped_s" in line else "-"
        errors = (f"{line[key]:+.0%}" if key in line else "-" for key in ("shipped_error", "fitted_error"))
        tail = "".join(f"{error:>8}" for error in errors)
        text.append(f"{line['what']:<14}{counts}{line['seconds'] * 1e3:>13.2f}{shipped:>12}{tail}")
    return "\n".join(text)
