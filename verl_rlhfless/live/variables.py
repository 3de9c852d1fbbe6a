"""The environment variables by which a run reaches the processes that verl, Ray and vLLM start for it.

Nothing else gets there: vLLM starts its engines itself, and plugins are imported without arguments. Light to import.
"""

from __future__ import annotations

import os

PACE_VARIABLE = "RLHFLESS_PACE"
"""A pace model (``PaceModel.to_json``): engines and trainer phases take the time that it declares."""

OBSERVER_DIR_VARIABLE = "RLHFLESS_OBSERVER_DIR"
"""Folder that every arm's processes write their records to; unset = nothing is recorded."""

METRICS_VARIABLE = "VERL_FILE_LOGGER_PATH"
"""verl's own: where its file logger writes."""

LEASE_VARIABLE = "RLHFLESS_LEASE"
"""Name of the lease that an engine runs on; unset in a hybrid engine."""

CHECK_ONLY_VARIABLE = "RLHFLESS_CHECK_ONLY"
"""Set: the process of a training ends well after the start-up check."""


def is_cpu_platform() -> bool:
    """Return whether verl runs on a host without accelerators (``VERL_PLATFORM=cpu``)."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
