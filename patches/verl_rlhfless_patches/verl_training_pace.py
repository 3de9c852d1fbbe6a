"""Let a trainer phase take at least the time that it would take on the declared device.

Why: pacing lets a few CPU cores stand for several GPUs, and engines are paced by vLLM's own hooks; verl has no hook
around a trainer phase (``verl/workers/engine_workers.py``, ``TrainingWorker.infer_batch`` and ``train_mini_batch``,
which actor, reference and critic all run through).
What: both methods sleep, after their work, until the declared time of their tokens has passed. A critic's batch comes
as the data queue's keys; verl's own bridge fetches it first, so that its tokens can be counted.
Remove when: verl offers a callback around its training and inference batches.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.pacing import PaceModel

_MODULE = "verl.workers.engine_workers"


def apply(model: PaceModel) -> None:
    """Pace verl's training worker now if its module is loaded, else right after its first import.

    Raises:
        UnsupportedError: verl changed one of the methods (raised when its module is imported).
    """
    wrapt.register_post_import_hook(functools.partial(_patch, model), _MODULE)


def _patch(model: PaceModel, module: ModuleType) -> None:
    worker = module.TrainingWorker
    for name, declared_s in (("infer_batch", model.inference_s), ("train_mini_batch", model.update_s)):
        method = getattr(worker, name, None)
        if method is None or list(inspect.signature(method).parameters) != ["self", "data"]:
            raise UnsupportedError(f"verl changed TrainingWorker.{name}. Update {__name__} or pin verl to 0.9.1.")
        if not getattr(method, "_rlhfless", False):
            setattr(worker, name, _paced(method, declared_s))


def _paced(method: Callable[..., Any], declared_s: Callable[[int], float]) -> Callable[..., Any]:
    from verl.single_controller.base.decorator import MAGIC_ATTR
    from verl.utils.transferqueue_utils import tqbridge

    def on_data(self: Any, data: Any) -> Any:
        deadline_s = time.monotonic() + declared_s(num_tokens(data))
        output = method(self, data)
        time.sleep(max(0.0, deadline_s - time.monotonic()))
        return output

    dispatch_mode = getattr(method, MAGIC_ATTR, {}).get("dispatch_mode")
    paced: Callable[..., Any] = functools.wraps(method)(tqbridge(dispatch_mode)(on_data))  # keeps verl's dispatch marks
    paced._rlhfless = True  # type: ignore[attr-defined]
    return paced


def num_tokens(data: Any) -> int:
    """Return the tokens of this rank's share of a batch: ``input_ids`` is jagged [B, T] int64, or padded."""
    ids = data["input_ids"]
    return int((ids.values() if ids.is_nested else ids).numel())
