"""What starts, trainer phases and engine iterations really took, so that a plan counts that and not a data sheet.

Each figure is the lower median of the latest steps: first starts and first phases import and compile, and must not be
expected of every later step. Until there is a first measurement the pool's own figure stands.

Invariants: applying an empty model changes nothing; state round-trips through JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from verl_rlhfless.errors import DataError
from verl_rlhfless.policy.calibrate import IterationSample, calibrate
from verl_rlhfless.policy.perf import EnginePerf
from verl_rlhfless.policy.snapshot import Batch, IntArray, PoolSnapshot
from verl_rlhfless.policy.transitions import TrainerPerf

FORMAT = "rlhfless-costs/1"

_LATEST = 5
"""Measurements of a figure that are kept."""

_LEAST_SAMPLES = 8
"""Least measured iterations of a size from which its speed is fitted."""

_STARTS = ("wake_s", "warm_start_s", "cold_start_s")
_SECONDS = ("grant_s", *_STARTS, "load_s", "release_s", "publish_s", "suspend_s", "resume_s")
_SPEEDS = ("hbm", "prefill", "launch_s", "per_seq_s")
_LEAST = 1e-9  # an efficiency is fitted in its logarithm, and a declared device may have one of zero


Way = Literal["wake", "warm_start", "cold_start"]
"""How a replica came up: its engine was parked, or started on a server whose imports were done, or on a new one."""


@dataclass(frozen=True, slots=True)
class Standby:
    """What waits for a replica.

    Attributes:
        parked: Tensor-parallel size -> parked engines.
        num_servers: Servers whose imports are done.
        beside: Tensor-parallel size -> parked engines that can wake together beside the trainer, on its GPUs.
    """

    parked: Mapping[int, int] = field(default_factory=dict)
    num_servers: int = 0
    beside: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReplicaTimes:
    """One replica: from request to grant, from grant to an engine that runs (without weights), and the weight load."""

    way: Way
    grant_s: float
    start_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What one step took: its replicas' starts, their release, the trainer's phases, and publishing the weights.

    ``moves_s`` is what the trainer's way to the host and its way back took; ``None`` = it stayed.
    """

    starts: tuple[ReplicaTimes, ...]
    release_s: float | None
    phases_s: float
    publish_s: float | None
    moves_s: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class CostModel:
    """Measured figures.

    Attributes:
        latest: Figure -> its newest measurements, oldest first: the times of starts, release, publication and the
            trainer's moves, and ``phases``, the factor by which the trainer's phases take longer than modelled.
        speeds: Tensor-parallel size -> factor on each of ``hbm``, ``prefill``, ``launch_s`` and ``per_seq_s``.
    """

    latest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    speeds: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    def figure(self, name: str) -> float | None:
        """Return what a plan counts with; ``None`` = not measured yet."""
        seen = sorted(self.latest.get(name, ()))
        return seen[(len(seen) - 1) // 2] if seen else None

    def to_json(self) -> str:
        """Return the state as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Return the state that ``to_json`` wrote.

        Raises:
            DataError: The text is no such state.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError(f"format must be {FORMAT!r}")
            speeds = {int(tp): tuple(map(_non_negative, of)) for tp, of in values["speeds"].items()}
            if any(len(of) != len(_SPEEDS) for of in speeds.values()):
                raise ValueError(f"speeds must have {len(_SPEEDS)} factors each")
            latest = {name: tuple(map(_non_negative, of)) for name, of in values["latest"].items()}
            if unknown := set(latest) - {*_SECONDS, "phases"}:
                raise ValueError(f"{min(unknown)!r} is no measured figure")
            return cls(latest, speeds)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"measured costs: {error}. Delete the state file to start without them.") from error


def _non_negative(value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[operator, arg-type]
        raise ValueError(f"{value!r} is not a number >= 0")
    return float(value)  # type: ignore[arg-type]


def learn_step(model: CostModel, pool: PoolSnapshot, done: tuple[Batch, IntArray], times: StepTimes) -> CostModel:
    """Return the model after a step; a step counts each figure once, by the mean of what was measured in it.

    Args:
        model: What was measured before.
        pool: The pool as declared, nothing applied.
        done: The step's prompts and lengths, [B] int64.
        times: What was measured.
    """
    batch, lengths = done
    tokens = float(batch.prompt_tokens.sum() + lengths.sum())
    context = tokens / batch.num_samples
    modelled_s = pool.trainer.inference_s(tokens, context) + pool.trainer.update_s(tokens, context)
    seen: dict[str, list[float]] = {
        "grant_s": [start.grant_s for start in times.starts],
        **{name: [s.start_s for s in times.starts if f"{s.way}_s" == name] for name in _STARTS},
        "load_s": [start.load_s for start in times.starts],
        "release_s": [] if times.release_s is None else [times.release_s],
        "publish_s": [] if times.publish_s is None else [times.publish_s],
        "suspend_s": [] if times.moves_s is None else [times.moves_s[0]],
        "resume_s": [] if times.moves_s is None else [times.moves_s[1]],
        "phases": [times.phases_s / modelled_s],
    }
    means = {name: sum(values) / len(values) for name, values in seen.items() if values}
    newest = {name: (*model.latest.get(name, ()), mean)[-_LATEST:] for name, mean in means.items()}
    return replace(model, latest={**model.latest, **newest})


def learn_speed(
    model: CostModel, perf: Mapping[int, EnginePerf], samples: Mapping[int, Sequence[IterationSample]]
) -> CostModel:
    """Return the model after iterations were measured, by tensor-parallel size; too few of a size change nothing.

    Args:
        model: What was measured before.
        perf: The replicas as declared, nothing applied.
        samples: Measured iterations, those of earlier steps included.
    """
    speeds = dict(model.speeds)
    for tp, of in samples.items():
        if tp in perf and len(of) >= _LEAST_SAMPLES:
            declared = _scaled(perf[tp], ())
            fitted = calibrate(declared, of).perf.efficiencies
            speeds[tp] = tuple(getattr(fitted, name) / getattr(declared.efficiencies, name) for name in _SPEEDS)
    return replace(model, speeds=speeds)


def apply(model: CostModel, pool: PoolSnapshot, standby: Standby) -> PoolSnapshot:
    """Return the pool with what was measured; a size that never ran has the factors of the nearest one that did.

    A plan knows two ways to come up, ``times.wake_s`` (on ``warm`` GPUs) and ``times.cold_start_s`` (on all others).
    But there are three: wake a parked engine, start one on a waiting server, start server and engine. So ``wake_s`` is
    the fastest way that there is now, and ``cold_start_s`` the next one:

    * some engine is parked: a wake, and then a start on a waiting server (if there are any, and one was measured);
    * none is: a start on a waiting server, and then a start of both.

    A step runs on the trainer's GPUs (``has_resident``) only if engines are parked there: while engines start, they
    would be held for nothing.
    """
    times = pool.trainer.times
    known = {name: value for name in _SECONDS if (value := model.figure(name)) is not None}
    has_parked = any(standby.parked.values())
    fast = "wake_s" if has_parked else "warm_start_s"
    has_servers = has_parked and standby.num_servers and "warm_start_s" in known
    slow = "warm_start_s" if has_servers else "cold_start_s"
    measured_as = {"wake_s": fast, "cold_start_s": slow, "park_s": "release_s", "grant_s": "grant_s"}
    figures = {name: known[source] for name, source in measured_as.items() if source in known}
    if "publish_s" in known:
        figures["publish_bytes_per_s"] = pool.trainer.shape.weight_bytes / max(known["publish_s"], _LEAST)
    trainer = replace(pool.trainer, times=replace(times, **figures), slowness=model.figure("phases") or 1.0)
    if "resume_s" in known:
        trainer = _with_moves(trainer, known["suspend_s"], known["resume_s"])
    perf = {tp: _with_load(_applied(model, tp, engine), known.get("load_s")) for tp, engine in pool.perf.items()}
    warm = {tp: tp * (standby.parked.get(tp, 0) if has_parked else standby.num_servers) for tp in pool.perf}
    beside = {tp: tp * standby.beside.get(tp, 0) for tp in pool.perf}
    has_resident = pool.has_resident and any(beside.values())
    return replace(pool, perf=perf, trainer=trainer, warm=warm, warm_beside=beside, has_resident=has_resident)


def _with_moves(trainer: TrainerPerf, suspend_s: float, resume_s: float) -> TrainerPerf:
    """Return the trainer whose state goes to the host in ``suspend_s``, and whose way back takes ``resume_s``."""
    host = trainer.efficiencies.host * trainer.state_copy_s / max(suspend_s, _LEAST)
    times = replace(trainer.times, resume_s=max(0.0, resume_s - suspend_s))
    return replace(trainer, efficiencies=replace(trainer.efficiencies, host=host), times=times)


def _applied(model: CostModel, tp: int, perf: EnginePerf) -> EnginePerf:
    """Return a replica with the measured speed of its size, else of the nearest one by ratio."""
    if not model.speeds:
        return perf
    nearest = min(model.speeds, key=lambda known: (abs(math.log(known / tp)), known))
    return _scaled(perf, model.speeds[nearest])


def _scaled(perf: EnginePerf, factors: Sequence[float]) -> EnginePerf:
    """Return a replica whose ``_SPEEDS``, none zero, are multiplied by ``factors`` (empty: by one)."""
    of = {name: max(getattr(perf.efficiencies, name), _LEAST) for name in _SPEEDS}
    scaled = {name: of[name] * factor for name, factor in zip(_SPEEDS, factors, strict=True)} if factors else of
    return replace(perf, efficiencies=replace(perf.efficiencies, **scaled))


def _with_load(perf: EnginePerf, load_s: float | None) -> EnginePerf:
    """Return a replica that loads its weights in ``load_s``; ``None`` = as modelled."""
    if load_s is None:
        return perf
    host = perf.efficiencies.host * perf.load_s / max(load_s, _LEAST)
    return replace(perf, efficiencies=replace(perf.efficiencies, host=host))
