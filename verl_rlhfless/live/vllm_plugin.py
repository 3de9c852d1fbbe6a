"""The entry point ``vllm.general_plugins``: vLLM calls it in its API process, in EngineCore and in every worker.

vLLM does so before it builds an executor or a worker, also when it forks; what is patched here is therefore in place
before its first use. The module must stay light: nothing of vLLM is imported before vLLM does so itself.
"""

from __future__ import annotations

import multiprocessing
import os

from verl_rlhfless.live.engine_files import name_segments
from verl_rlhfless.live.variables import LEASE_VARIABLE, OBSERVER_DIR_VARIABLE, PACE_VARIABLE, is_cpu_platform
from verl_rlhfless.processes import die_with_parent
from verl_rlhfless_patches import vllm_file_store, vllm_shm_spin, vllm_worker_hook


def install_in_vllm() -> None:
    """Tie an elastic replica's engine to its server, and install those parts of the instrument that the run asks for.

    May be called any number of times.

    Raises:
        UnsupportedError: This version of vLLM or Python is not the one that the patches were written for.
    """
    name_segments()
    is_leased = bool(os.environ.get(LEASE_VARIABLE))
    if is_leased:
        vllm_file_store.apply()
    if is_leased and multiprocessing.parent_process() is not None:
        die_with_parent()  # else EngineCore outlives a server actor that is killed, and goes on using leased GPUs
    is_paced = bool(os.environ.get(PACE_VARIABLE))
    if is_paced or is_cpu_platform():
        vllm_shm_spin.apply()
    if is_paced or os.environ.get(OBSERVER_DIR_VARIABLE):
        vllm_worker_hook.apply()
