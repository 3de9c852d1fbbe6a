"""The wrapped worker computes as before and tells its probe what it does; an unknown vLLM is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.engine_log import EngineLog, read_engine_log
from verl_rlhfless_patches import vllm_worker_hook

SCHEDULER_OUTPUT = "vllm.v1.core.sched"


@dataclass
class CachedRequestData:
    req_ids: list[str]
    num_computed_tokens: list[int]
    num_output_tokens: list[int]


def worker_module() -> ModuleType:
    class Worker:
        def __init__(self, rank: int) -> None:
            self.rank = rank
            self.parallel_config = SimpleNamespace(tensor_parallel_size=2)

        def execute_model(self, scheduler_output: Any) -> Any:
            return None if scheduler_output.num_scheduled_tokens else "nothing to compute"

        def sample_tokens(self, grammar_output: Any) -> Any:
            return f"sampled with {grammar_output}"

    module = ModuleType("gpu_worker")
    module.__dict__["Worker"] = Worker
    return module


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Let the patch find vLLM's scheduler output, and ask for a log."""
    fields = {
        "SchedulerOutput": ["scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "finished_req_ids"],
        "NewRequestData": [
            "req_id", "num_computed_tokens", "prompt_token_ids", "prompt_embeds", "prefill_token_ids",
        ],
    }  # fmt: skip
    output = SimpleNamespace(CachedRequestData=CachedRequestData)
    for name, names in fields.items():
        setattr(output, name, make_dataclass(name, names))
    monkeypatch.setitem(sys.modules, SCHEDULER_OUTPUT, SimpleNamespace(output=output))
    monkeypatch.setenv("RLHFLESS_OBSERVER_DIR", str(tmp_path))
    monkeypatch.delenv("RLHFLESS_PACE", raising=False)
    return monkeypatch


def schedule(name: str) -> Any:
    request = SimpleNamespace(
        req_id=name, num_computed_tokens=0, prompt_token_ids=[1, 2], prompt_embeds=None, prefill_token_ids=None
    )
    return SimpleNamespace(
        scheduled_new_reqs=[request],
        scheduled_cached_reqs=CachedRequestData([], [], []),
        num_scheduled_tokens={name: 2},
        finished_req_ids=set(),
    )


def finish(name: str) -> Any:
    empty = CachedRequestData([], [], [])
    return SimpleNamespace(
        scheduled_new_reqs=[], scheduled_cached_reqs=empty, num_scheduled_tokens={}, finished_req_ids={name}
    )


def only_log(directory: Path) -> EngineLog:
    (path,) = directory.iterdir()
    return read_engine_log(path)


def test_a_request_is_computed_and_recorded(observed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = worker_module()
    vllm_worker_hook._patch_worker(module)
    vllm_worker_hook._patch_worker(module)  # vLLM may call its plugins twice
    worker = module.Worker(rank=0)

    assert worker.execute_model(schedule("a")) is None
    assert worker.sample_tokens("a grammar") == "sampled with a grammar"
    assert worker.execute_model(finish("a")) == "nothing to compute"

    log = only_log(tmp_path)
    (span,) = log.busy
    assert (log.tp, span.iterations, span.prefill_tokens, span.decode_tokens, span.finished) == (2, 1, 2, 1, 1)


def test_an_iteration_ends_when_its_tokens_are_sampled(observed: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = worker_module()
    observed.setattr(module.Worker, "execute_model", lambda self, scheduler_output: calls.append("execute"))
    observed.setattr(module.Worker, "sample_tokens", lambda self, grammar_output: calls.append("sample"))
    vllm_worker_hook._patch_worker(module)
    worker = module.Worker(rank=0)
    worker._rlhfless_probe = SimpleNamespace(begin=lambda _: calls.append("begin"), end=lambda: calls.append("end"))

    worker.execute_model(schedule("a"))
    worker.sample_tokens(None)

    assert calls == ["begin", "execute", "sample", "end"]


def test_warm_up_is_not_work(observed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = worker_module()
    vllm_worker_hook._patch_worker(module)
    worker = module.Worker(rank=0)

    worker.execute_model(schedule("_warmup_0_"))
    worker.sample_tokens(None)
    worker.execute_model(finish("_warmup_0_"))

    assert only_log(tmp_path).busy == ()


def test_weight_loads_are_recorded_after_they_end(observed: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Extension:
        def update_weights_from_ipc(self, use_shm: bool = False) -> str:
            assert only_log(tmp_path).loaded_s == ()
            return f"loaded, {use_shm}"

    extensions = ModuleType("utils")
    extensions.__dict__["vLLMColocateWorkerExtension"] = Extension
    vllm_worker_hook._patch_load(extensions)
    vllm_worker_hook._patch_load(extensions)
    module = worker_module()
    vllm_worker_hook._patch_worker(module)

    worker = type("Both", (module.Worker, Extension), {})(rank=0)

    assert worker.update_weights_from_ipc(use_shm=True) == "loaded, True"
    assert len(only_log(tmp_path).loaded_s) == 1


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_a_changed_worker_is_refused(observed: pytest.MonkeyPatch, method: str) -> None:
    module = worker_module()
    setattr(module.Worker, method, lambda self, one, two: None)

    with pytest.raises(UnsupportedError, match=rf"Worker\.{method}"):
        vllm_worker_hook._patch_worker(module)


def test_a_changed_scheduler_output_is_refused(observed: pytest.MonkeyPatch) -> None:
    sys.modules[SCHEDULER_OUTPUT].output.CachedRequestData = make_dataclass("CachedRequestData", ["req_ids"])

    with pytest.raises(UnsupportedError, match="CachedRequestData"):
        vllm_worker_hook._patch_worker(worker_module())


def test_a_verl_without_the_weight_load_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"pin verl"):
        vllm_worker_hook._patch_load(ModuleType("utils"))
