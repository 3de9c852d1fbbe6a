"""``rlhfless doctor``: what of this machine a run would stumble over, and what to do about it.

Each check returns one finding and changes nothing; facts of the machine come in as arguments, so that a test can
invent them.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verl_rlhfless import __version__
from verl_rlhfless.config import TRAINER_MODE, WeightsConfig
from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live.available_memory import available_bytes
from verl_rlhfless.live.seams import check_seams
from verl_rlhfless.live.startup import PLUGIN_NAME, check_plugin_policy, load_plugin
from verl_rlhfless.policy.host_memory import SPILL_THRESHOLD, StoreMemory, store_need
from verl_rlhfless.versions import REQUIREMENTS, Requirement, check_requirement, installed_version

Status = Literal["ok", "warn", "fail"]

_GIB = 1024**3
_MIN_FREE_MEMORY_GIB = 16.0  # the demo's stock arm, four trainer ranks and four engines on CPU, takes 15.1 GiB
_MIN_FREE_SHM_GIB = 1.0  # what Ray's object store and vLLM's message queues take in the demo
_USUAL_PARAMS = 7.6e9  # of Qwen2.5-7B, the size that is told how much shared memory it takes
_BYTES_PER_PARAM = 2  # bfloat16, in which weights travel
_REINSTALL = "Install this package again, in its source folder: pip install --no-deps --force-reinstall ."
_INSTALL_FLASH = "pip install wheel ninja && pip install --no-build-isolation 'flash-attn>=2.8.3,<3'"
_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check; ``action`` says what to do and is empty when nothing is."""

    name: str
    status: Status
    detail: str
    action: str = ""


def check_version(requirement: Requirement) -> Finding:
    """Return whether a distribution is installed in a supported version."""
    name = requirement.distribution
    try:
        found = check_requirement(requirement)
    except RlhflessError as error:
        return Finding(name, "fail", str(error), f"pip install '{name}{requirement.supported}'")
    return Finding(name, "ok", f"{found} (supported {requirement.supported})")


def check_policy(environ: Mapping[str, str]) -> Finding:
    """Return whether verl may load plugins in this environment."""
    try:
        check_plugin_policy(environ)
    except RlhflessError as error:
        return Finding("plugin policy", "fail", str(error), "unset VERL_USE_EXTERNAL_PLUGINS")
    return Finding("plugin policy", "ok", "verl may load the plugin")


def check_plugin() -> Finding:
    """Return whether the entry point loads and the elastic trainer is in verl's registry."""
    try:
        load_plugin()
        from verl.trainer.ppo.v1.trainer_base import get_trainer_cls

        trainer = get_trainer_cls(TRAINER_MODE)
        check_seams()
    except (RlhflessError, ValueError) as error:  # ValueError: verl's registry lacks the name
        return Finding("verl plugin", "fail", str(error), _REINSTALL)
    return Finding("verl plugin", "ok", f"trainer mode {TRAINER_MODE} is {trainer.__name__}")


def check_cpu_platform(num_gpus: int) -> Finding:
    """Return whether verl has our CPU platform, which a machine without a GPU needs."""
    if num_gpus:
        return Finding("CPU platform", "ok", "not needed: this machine has a GPU")
    from verl.plugin.platform import PlatformRegistry

    if PlatformRegistry.get("cpu") is None:
        return Finding("CPU platform", "fail", "verl has no platform 'cpu'", "Set VERL_PLATFORM=cpu. " + _REINSTALL)
    return Finding("CPU platform", "ok", "registered with verl")


def check_vllm_entry_point() -> Finding:
    """Return whether vLLM would find and load our entry point in its processes."""
    found = entry_points(group="vllm.general_plugins", name=PLUGIN_NAME)
    if not found:
        return Finding("vLLM plugin", "fail", "no entry point in group vllm.general_plugins", _REINSTALL)
    for entry_point in found:
        entry_point.load()
    return Finding("vLLM plugin", "ok", ", ".join(sorted({entry_point.value for entry_point in found})))


def check_hydra_group() -> Finding:
    """Return whether ``+rlhfless=default`` composes with verl's recipe without a search path."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException

    try:
        with initialize_config_module("verl.trainer.config", version_base=None):
            mode = compose("ppo_trainer", overrides=["+rlhfless=default"]).trainer.v1.trainer_mode
    except HydraException as error:
        return Finding("Hydra group", "fail", " ".join(str(error).split()), _REINSTALL)
    if mode != TRAINER_MODE:
        return Finding("Hydra group", "fail", f"+rlhfless=default composes with trainer mode {mode!r}", _REINSTALL)
    return Finding("Hydra group", "ok", f"+rlhfless=default selects {mode}")


def check_ray_authentication(environ: Mapping[str, str], home: Path) -> Finding:
    """Return whether the Ray cluster that a run would join asks for a token; an open one runs anybody's code."""
    name, address = "Ray security", environ.get("RAY_ADDRESS", "")
    host = address.rpartition("://")[2].rpartition(":")[0].strip("[]") or address
    if host in ("", "local", "localhost", "::1") or host.startswith("127."):
        return Finding(name, "ok", f"loopback or local cluster ({address or 'no RAY_ADDRESS'})")
    has_token = any(environ.get(key) for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    has_token = has_token or (home / ".ray" / "auth_token").is_file()
    mode = environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "token" or (not mode and has_token):
        return Finding(name, "ok", f"token authentication for {address}")
    action = "Start the cluster with RAY_AUTH_MODE=token and a token (`ray get-auth-token --generate`)."
    return Finding(name, "warn", f"no token authentication for {address}: whoever reaches it runs code there", action)


def check_gpus(num_gpus: int) -> Finding:
    """Return how many GPUs torch sees; none means CPU mode."""
    if num_gpus:
        return Finding("GPUs", "ok", f"{num_gpus} visible")
    mode = "CPU mode (`rlhfless demo` needs no more; own recipes set VERL_PLATFORM=cpu)"
    return Finding("GPUs", "ok", f"none: {mode}. Parked engines free no memory: parking is accounting only")


def check_flash_attention(num_gpus: int) -> Finding:
    """Return whether flash-attn is there where it is of use; it is never imported, since that fails without a GPU."""
    found = installed_version("flash-attn") or installed_version("flash_attn")
    is_there = found is not None and importlib.util.find_spec("flash_attn") is not None
    if is_there:
        return Finding("flash-attn", "ok", f"{found} (not imported here)")
    if not num_gpus:
        return Finding("flash-attn", "ok", "not installed, not needed in CPU mode")
    action = (
        f"{_INSTALL_FLASH} (it needs nvcc, and builds against the torch that is there), or append "
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa to the recipe."
    )
    return Finding("flash-attn", "warn", "not installed: verl's flash_attention_2 is not available", action)


def check_memory(available_bytes: int, total_bytes: int) -> Finding:
    """Return whether enough host memory is free for the demo."""
    detail = f"{available_bytes / _GIB:.1f} of {total_bytes / _GIB:.1f} GiB available"
    if available_bytes / _GIB >= _MIN_FREE_MEMORY_GIB:
        return Finding("memory", "ok", detail)
    return Finding("memory", "warn", detail, f"Free memory: the demo needs {_MIN_FREE_MEMORY_GIB:g} GiB or more.")


def check_shared_memory(free_bytes: int, num_gpus: int) -> Finding:
    """Return whether ``/dev/shm`` has room for the demo, or on a machine with GPUs for a model of the usual size."""
    weights = WeightsConfig()
    buffers = num_gpus * (weights.bucket_mib << 20)
    model = int(_USUAL_PARAMS * _BYTES_PER_PARAM)
    store = store_need(StoreMemory(model, weights.max_versions, weights.bucket_mib << 20))
    needed = store.num_bytes / SPILL_THRESHOLD + buffers if num_gpus else _MIN_FREE_SHM_GIB * _GIB
    detail = f"{free_bytes / _GIB:.1f} GiB free in /dev/shm"
    if free_bytes >= needed:
        return Finding("shared memory", "ok", detail)
    size = f"{math.ceil(needed / _GIB)}g"
    action = f"Enlarge /dev/shm (docker run --shm-size={size}), or remove what stopped runs left there."
    if num_gpus:
        per_param = weights.max_versions * _BYTES_PER_PARAM / SPILL_THRESHOLD
        action += (
            f" {size} is for 7B parameters: Ray's object store takes {per_param:g} bytes a parameter for "
            f"{weights.max_versions} versions of the weights, and each GPU's engine worker {weights.bucket_mib} MiB. "
            "A run that lacks room ends at start, and says how much."
        )
    return Finding("shared memory", "warn", detail, action)


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Return the findings of all checks; a check that can't run is a failure of its own."""
    num_gpus = count_gpus()
    checks: dict[str, Callable[[], Finding]] = {
        **{item.distribution: partial(check_version, item) for item in REQUIREMENTS},
        "plugin policy": partial(check_policy, environ),
        "verl plugin": check_plugin,
        "CPU platform": partial(check_cpu_platform, num_gpus),
        "vLLM plugin": check_vllm_entry_point,
        "Hydra group": check_hydra_group,
        "Ray security": partial(check_ray_authentication, environ, Path.home()),
        "GPUs": partial(check_gpus, num_gpus),
        "flash-attn": partial(check_flash_attention, num_gpus),
        "memory": partial(check_memory, available_bytes(), psutil.virtual_memory().total),
        "shared memory": partial(check_shared_memory, shutil.disk_usage("/dev/shm").free, num_gpus),
    }
    return [_run_check(name, check) for name, check in checks.items()]


def render(findings: list[Finding], console: Console) -> None:
    """Print the table, then what to do for each finding that is not ok."""
    table = Table(title=f"verl_rlhfless {__version__}", title_justify="left", expand=False)
    for column in ("check", "status", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.name), Text(finding.status, _STYLES[finding.status]), Text(finding.detail))
    console.print(table)
    for finding in findings:
        if finding.action:
            console.print(Text(f"{finding.status}: {finding.name}: {finding.action}", _STYLES[finding.status]))
    failures = sum(finding.status == "fail" for finding in findings)
    console.print(f"{failures} of {len(findings)} checks failed" if failures else "ready")


def run() -> int:
    """Check this machine, print the findings and return the exit code: 1 if any check fails."""
    if not count_gpus():
        os.environ.setdefault("VERL_PLATFORM", "cpu")  # what a run here sets; verl reads it when it is imported
    with _silence():
        findings = diagnose(os.environ)
    render(findings, Console())
    return int(any(finding.status == "fail" for finding in findings))


def _run_check(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (Exception, SystemExit) as error:  # noqa: BLE001  recorded: it must not hide the other findings
        return Finding(name, "fail", f"{type(error).__name__}: {error}", _REINSTALL)


def count_gpus() -> int:
    """Return how many GPUs torch sees on this host."""
    if importlib.util.find_spec("torch") is None:
        return 0
    import torch

    return int(torch.cuda.device_count())


@contextmanager
def _silence() -> Iterator[None]:
    """Keep verl's warnings about engines that nobody asked for out of the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
