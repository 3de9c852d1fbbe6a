"""Measure one GPU with an engine and compare it with the shipped performance model.

    python -m benchmarks.gpu                 # both models on this machine's GPU, within 8 minutes
    python -m benchmarks.gpu --check         # the kit itself, on a CPU with a tiny model

vLLM is used where it is installed, else transformers, which needs torch and nothing of verl or Ray. Parts that are
finished are kept in ``--out``: the same command goes on after an interruption. A complete run on a GPU writes
``benchmarks/results/gpu_<type>_<engine>.json``; a check on a CPU never does.
"""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import command
from benchmarks.gpu.comparison import calibration_record, compared, fit, table
from benchmarks.gpu.device import CPU, Device, find_device
from benchmarks.gpu.rows import Subject
from benchmarks.gpu.session import Session
from benchmarks.gpu.workload import CHECK, FULL, SHAPES, Workload, write_model
from benchmarks.record import write_result
from verl_rlhfless.errors import ConfigError, DataError
from verl_rlhfless.policy.perf import EngineLimits, EnginePerf

_ENGINES = ("vllm", "transformers")
_LIMITS_ON_CPU = EngineLimits(max_num_seqs=8, max_batched_tokens=2048)


def main(
    engine: Annotated[str, typer.Option(help="vllm, transformers, or auto: vLLM where it is installed.")] = "auto",
    model: Annotated[str, typer.Option(help="Shapes, with commas.")] = "qwen2.5-3b,qwen2.5-7b",
    parts: Annotated[str, typer.Option(help="Parts to measure, with commas; all if empty.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of finished parts and of the calibrations.")] = Path("out/gpu"),
    results: Annotated[Path | None, typer.Option(help="Folder of the record; benchmarks/results if not given.")] = None,
    budget_s: Annotated[float, typer.Option(help="No part is begun after these seconds.")] = 420.0,
    check: Annotated[bool, typer.Option("--check", help="Try the kit on a CPU with a tiny model.")] = False,
) -> None:
    """Measure, compare, and write calibrations."""
    started = time.monotonic()
    device = Device("CPU", "", CPU) if check else find_device()
    name = _choose_engine(engine)
    measured = {}
    for one in ["tiny"] if check else model.split(","):
        if one not in SHAPES:
            raise ConfigError("--model", one, f"must be among {', '.join(SHAPES)}", "Choose from these.")
        perf = EnginePerf(SHAPES[one], device.gpu, 1, limits=_LIMITS_ON_CPU if check else EngineLimits())
        measured[one] = _measure(
            name, perf, device, CHECK if check else FULL, parts, out, lambda: time.monotonic() - started < budget_s
        )
    if device.is_gpu and all(record["open"] == {} for record in measured.values()):
        command = f"python -m benchmarks.gpu --engine {name} --model {model}"
        record = {"device": device.name, "driver": device.driver, "engine": name, "models": measured}
        gpu = device.gpu.name.lower().replace("-", "_")
        write_result(f"gpu_{gpu}_{name}", record, command=command, num_gpus=1, folder=results)


def _choose_engine(name: str) -> str:
    if name == "auto":
        return "vllm" if find_spec("vllm") else "transformers"
    if name not in _ENGINES:
        raise ConfigError("--engine", name, f"must be auto, {' or '.join(_ENGINES)}", "Choose one.")
    return name


def _measure(
    engine: str, perf: EnginePerf, device: Device, workload: Workload, parts: str, out: Path, has_time: Any
) -> dict[str, Any]:
    """Measure one model, print its table, write its calibration, and return its part of the record."""
    out.mkdir(parents=True, exist_ok=True)
    label = f"{perf.shape.name}_{engine}"
    session = Session.resume(
        out / f"parts_{label}.json", {"device": device.name, "engine": engine, "model": perf.shape.name}
    )
    subject = _subject(engine, write_model(out / "models" / perf.shape.name, perf.shape), perf, workload, device)
    names = list(subject.parts)
    wanted = parts.split(",") if parts else names
    for part in wanted:
        if part not in names:
            raise ConfigError("--parts", part, f"must be among {', '.join(names)}", "Choose from these.")
    try:
        session.run(subject, wanted, has_time)
    finally:
        subject.close()
    record: dict[str, Any] = {
        "open": {name: session.failures.get(name, "") for name in names if name not in session.parts}
    }
    try:
        fitted = fit(session.rows, perf)
    except DataError as error:  # decode or prefill is among what is open
        print(f"{label}: no calibration: {error}")
        return record
    lines = compared(session.rows, perf, fitted.perf)
    print(f"\n{label} on {device.name}\n{table(lines)}")
    calibration = calibration_record(session.rows, perf, fitted)
    path = out / f"calibration_{label}.json"
    path.write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
    print(f"mean error after fitting {fitted.mean_error:.1%}, most {fitted.max_error:.1%}; wrote {path}\n")
    return record | {"rows": lines, "calibration": calibration}


def _subject(engine: str, model: Path, perf: EnginePerf, workload: Workload, device: Device) -> Subject:
    if engine == "vllm":
        from benchmarks.gpu.vllm_subject import VllmSubject

        return VllmSubject(model, perf, workload, device)
    from benchmarks.gpu.transformers_subject import TransformersSubject

    return TransformersSubject(model, perf, workload, device)


if __name__ == "__main__":
    command.run(main, __doc__)
