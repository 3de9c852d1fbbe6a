"""Let an ``EngineProbe`` see every iteration and every weight load of a vLLM worker.

Why: busy time, sampled tokens and weight loads must be measured alike in every arm, stock verl too, and a pace has to
be kept where the device would spend the time. vLLM has no hook around a worker's iteration: a worker extension class
may add methods but not override any (``vllm/v1/worker/worker_base.py``, ``init_worker``), and stat loggers live in
another process. Wraps ``vllm/v1/worker/gpu_worker.py`` (``CPUWorker`` inherits from it) and the method with which verl
loads weights (``verl/workers/rollout/vllm_rollout/utils.py``, ``update_weights_from_ipc``).
Remove when: vLLM calls a plugin around each iteration of a worker.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.engine_probe import EngineProbe

_WORKER_MODULE, _LOAD_MODULE = "vllm.v1.worker.gpu_worker", "verl.workers.rollout.vllm_rollout.utils"
_WARM_UP = "_warmup_"  # request ids of vllm/v1/worker/gpu/warmup.py, which calls the worker as the scheduler does
_SIGNATURES = {"execute_model": ["self", "scheduler_output"], "sample_tokens": ["self", "grammar_output"]}
_FIELDS = {
    "SchedulerOutput": {"scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "finished_req_ids"},
    "CachedRequestData": {"req_ids", "num_computed_tokens", "num_output_tokens"},
    "NewRequestData": {"req_id", "num_computed_tokens", "prompt_token_ids", "prompt_embeds", "prefill_token_ids"},
}


def apply() -> None:
    """Wrap the worker and verl's weight load now if their modules are loaded, else right after their first import.

    Raises:
        UnsupportedError: vLLM or verl changed what is wrapped (raised when the module is imported).
    """
    wrapt.register_post_import_hook(_patch_worker, _WORKER_MODULE)
    wrapt.register_post_import_hook(_patch_load, _LOAD_MODULE)


def _patch_worker(module: ModuleType) -> None:
    worker = module.Worker
    if hasattr(worker, "_rlhfless_probe"):
        return
    _check(worker)
    init, execute_model, sample_tokens = worker.__init__, worker.execute_model, worker.sample_tokens

    @functools.wraps(init)
    def probed_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._rlhfless_probe = EngineProbe.from_environment(self.rank, self.parallel_config.tensor_parallel_size)

    @functools.wraps(execute_model)
    def probed_execute_model(self: Any, scheduler_output: Any) -> Any:
        if not any(name.startswith(_WARM_UP) for name in scheduler_output.num_scheduled_tokens):
            self._rlhfless_probe.begin(scheduler_output)
        return execute_model(self, scheduler_output)

    @functools.wraps(sample_tokens)
    def probed_sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = sample_tokens(self, grammar_output)
        self._rlhfless_probe.end()
        return output

    worker._rlhfless_probe = None
    worker.__init__, worker.execute_model, worker.sample_tokens = (
        probed_init,
        probed_execute_model,
        probed_sample_tokens,
    )


def _patch_load(module: ModuleType) -> None:
    extension: Any = getattr(module, "vLLMColocateWorkerExtension", None)
    load = getattr(extension, "update_weights_from_ipc", None)
    if load is None:
        raise UnsupportedError(
            f"verl changed {_LOAD_MODULE}.vLLMColocateWorkerExtension. Update {__name__} or pin verl to 0.9.1."
        )
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def probed_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        self._rlhfless_probe.loaded()
        return result

    extension.update_weights_from_ipc = probed_load


def _check(worker: type) -> None:
    from vllm.v1.core.sched import output

    changed = [
        f"{worker.__name__}.{name}"
        for name, parameters in _SIGNATURES.items()
        if list(inspect.signature(getattr(worker, name)).parameters) != parameters
    ]
    changed += [
        name
        for name, fields in _FIELDS.items()
        if not fields <= {field.name for field in dataclasses.fields(getattr(output, name))}
    ]
    if changed:
        raise UnsupportedError(f"vLLM changed {', '.join(changed)}. Update {__name__} or pin vLLM.")
