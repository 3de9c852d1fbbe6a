"""How the instrument's keys reach the processes that they are for: as environment variables, which children inherit."""

from __future__ import annotations

from pathlib import Path

from verl_rlhfless.config import InstrumentConfig
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.live.variables import METRICS_VARIABLE, OBSERVER_DIR_VARIABLE, PACE_VARIABLE


def instrument_environment(config: InstrumentConfig) -> dict[str, str]:
    """Return the environment that a run's processes need; empty when nothing of the instrument is on.

    They inherit it from the process that starts Ray. On a Ray cluster that runs already, start its nodes with it.

    Raises:
        ConfigError: The pacing profile is unreadable or breaks a rule.
    """
    environment = {}
    if config.pace is not None:
        environment[PACE_VARIABLE] = PaceModel.parse(config.pace).to_json()
    if config.observer is not None:
        folder = Path(config.observer).expanduser().resolve()
        environment |= {OBSERVER_DIR_VARIABLE: str(folder), METRICS_VARIABLE: str(folder / "metrics.jsonl")}
    return environment
