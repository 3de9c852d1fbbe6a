"""Let the rendezvous file of a vLLM engine have no name, so that it is gone with the engine.

Why: torch's ``FileStore`` is read as long as the engine lives, and its file is removed by an orderly exit only: every
engine that is killed, which is how a replica ends (``live/server.py``), leaves ``vllm_dist_*`` in the folder for
temporary files. A file in memory that EngineCore holds open is reached through ``/proc`` instead. Before that function
workers met at a TCP port (0.24, what a GPU machine gets), and there is nothing to patch.
Upstream: ``vllm/utils/network_utils.py``, ``get_file_store_init_method``; called by the executor in EngineCore.
Remove when: vLLM removes the file on every kind of exit, or takes its folder from a setting.
"""

from __future__ import annotations

import inspect
import os
from types import ModuleType

import wrapt

from verl_rlhfless.errors import UnsupportedError

_MODULE, _FUNCTION = "vllm.v1.executor.multiproc_executor", "get_file_store_init_method"


def apply() -> None:
    """Patch vLLM's executor now if its module is loaded, else right after its first import.

    Raises:
        UnsupportedError: vLLM changed the function (raised when the module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)


def unnamed_file() -> str:
    """Return the rendezvous of this process's workers: an open file that ends with the last process that holds it."""
    return f"file:///proc/{os.getpid()}/fd/{os.memfd_create('vllm_dist')}"


def _patch(module: ModuleType) -> None:
    original = getattr(module, _FUNCTION, None)
    if original is None or original is unnamed_file:
        return
    if inspect.signature(original).parameters:
        raise UnsupportedError(f"vLLM changed {_MODULE}.{_FUNCTION}. Update {__name__} or pin vLLM.")
    setattr(module, _FUNCTION, unnamed_file)
