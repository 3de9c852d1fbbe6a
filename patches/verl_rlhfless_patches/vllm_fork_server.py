"""Start vLLM's engine processes from a fork server that has imported vLLM already.

Why: inside a Ray actor vLLM must not fork (the actor has threads), so it spawns EngineCore, which spawns each worker
(``vllm/utils/system_utils.py``, ``_maybe_force_spawn``): torch and vLLM are imported once more in each, one after the
other, which is most of a cold start. A fork server is a fresh process without threads that imports them once, while
nobody waits; EngineCore is forked from it, and forks its workers, which is what vLLM does itself outside Ray.
Remove when: vLLM offers the fork server as a start method.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError

_MODULE, _FUNCTION = "vllm.v1.engine.utils", "get_mp_context"
_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_CUDA_SUCCESS, _CUDA_NO_DEVICE = 0, 100  # of CUresult, cuda.h


class _Process(multiprocessing.context.ForkServerProcess):
    """A process of the fork server with the environment that its parent has when it starts, as a spawned one has."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment | {_START_METHOD: "fork"})
        super().run()


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def start(preload: str, folder: Path) -> None:
    """Start this process's fork server now; it imports the module ``preload`` in the background.

    Its socket lies in ``folder``: one in a folder that multiprocessing makes stays behind when this process is killed.
    """
    server: Any = multiprocessing.forkserver
    this_process: Any = multiprocessing.current_process()
    this_process._config["tempdir"] = str(folder)
    server.set_forkserver_preload([preload])
    server.ensure_running()


def can_start_engines() -> bool:
    """Return, once the fork server has imported its module, whether what it starts can use CUDA.

    It can't if an import initialised CUDA: the driver refuses every fork of such a process.
    """
    probe = _Context().Process(target=_initialise_cuda)
    probe.start()  # the fork server starts nothing before its imports are done
    probe.join()
    return probe.exitcode == 0


def helper_pids() -> frozenset[int]:
    """Return the pids of this process's fork server and of the resource tracker beside it."""
    server: Any = multiprocessing.forkserver
    tracker: Any = multiprocessing.resource_tracker
    return frozenset((server._forkserver._forkserver_pid, tracker._resource_tracker._pid))


def withdraw() -> bool:
    """Let vLLM start engines its own way again; return whether it did not already."""
    module: Any = sys.modules[_MODULE]
    original = getattr(getattr(module, _FUNCTION), "__wrapped__", None)
    if original is not None:
        setattr(module, _FUNCTION, original)
    return original is not None


def _initialise_cuda() -> None:
    """End this process with a failure if CUDA is here and can't be initialised; takes no device memory."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    if driver.cuInit(0) not in (_CUDA_SUCCESS, _CUDA_NO_DEVICE):
        sys.exit(1)


def apply() -> None:
    """Make vLLM use the fork server of this process, at once or right after vLLM is imported.

    Raises:
        UnsupportedError: vLLM changed the function (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)


def _patch(module: ModuleType) -> None:
    original = getattr(module, _FUNCTION, None)
    if original is None or inspect.signature(original).parameters:
        raise UnsupportedError(f"vLLM changed {_MODULE}.{_FUNCTION}. Update {__name__} or pin vLLM.")
    context = _Context()

    @functools.wraps(original)
    def from_fork_server() -> Any:
        original()  # it also tells the children where Ray is
        return context

    setattr(module, _FUNCTION, from_fork_server)
