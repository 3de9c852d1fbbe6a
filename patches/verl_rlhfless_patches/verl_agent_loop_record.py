"""Let verl's agent-loop workers tell the observer how long every training sample was.

Why: verl keeps the lengths of single samples nowhere. Its metrics hold the mean, its rollout dumps hold text without
special tokens, whose tokens cannot be counted again, and requests of vLLM are cut and continued. Only the workers see a
complete sample (``AgentLoopWorker._agent_loop_postprocess`` in ``verl/experimental/agent_loop/agent_loop.py``).
Installed in observed runs only; what verl computes is not touched.
Remove when: verl dumps the token counts of samples.
"""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.sample_log import SampleBounds, SampleLog, SampleRecord, prompt_digest, turns_of
from verl_rlhfless.live.variables import OBSERVER_DIR_VARIABLE

_MODULE = "verl.experimental.agent_loop.agent_loop"
_PARAMETERS = ["self", "output", "validate", "kwargs"]


def apply() -> None:
    """Wrap verl's agent-loop worker now if its module is loaded, else right after its first import.

    Raises:
        UnsupportedError: verl changed the worker (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)


def _patch(module: ModuleType) -> None:
    worker = module.AgentLoopWorker
    if hasattr(worker, "_rlhfless_samples"):
        return
    if list(inspect.signature(worker._agent_loop_postprocess).parameters) != _PARAMETERS:
        raise UnsupportedError(
            f"verl changed AgentLoopWorker._agent_loop_postprocess. Update {__name__} or pin verl to 0.9.1."
        )
    init = worker.__init__

    @functools.wraps(init)
    def recording_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        self._rlhfless_samples = SampleLog(Path(os.environ[OBSERVER_DIR_VARIABLE]), _bounds(config))
        postprocess = self._agent_loop_postprocess  # of the subclass, which overrides verl's

        async def recorded(output: Any, validate: bool, **kwargs: Any) -> Any:
            result = await postprocess(output, validate, **kwargs)
            outputs = output if isinstance(output, list) else [output]
            if outputs and not validate:
                self._rlhfless_samples.write(_record(outputs, kwargs))
            return result

        self._agent_loop_postprocess = recorded

    worker._rlhfless_samples = None
    worker.__init__ = recording_init


def _bounds(config: Any) -> SampleBounds:
    from omegaconf import OmegaConf

    rollout = config.actor_rollout_ref.rollout
    is_replayed = OmegaConf.select(config, "rlhfless.replay.trace") is not None
    return SampleBounds(int(rollout.response_length), int(rollout.n), is_replayed)


def _record(outputs: list[Any], sample: dict[str, Any]) -> SampleRecord:
    prompt_ids = outputs[0].prompt_ids
    return SampleRecord(
        step=int(sample["global_steps"]),
        uid=str(sample["uid"]),
        prompt=prompt_digest(prompt_ids),
        row=_row(sample.get("index")),
        session=int(sample["session_id"]),
        prompt_tokens=len(prompt_ids),
        turns=turns_of(part.response_mask for part in outputs),
    )


def _row(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
