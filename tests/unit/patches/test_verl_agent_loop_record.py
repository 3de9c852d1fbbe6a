"""Training samples are recorded with their lengths, validation is not, and verl's own result is handed on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.sample_log import prompt_digest, read_bounds, read_samples
from verl_rlhfless_patches import verl_agent_loop_record

CONFIG = OmegaConf.create({"actor_rollout_ref": {"rollout": {"response_length": 64, "n": 2}}})


def fake_verl() -> ModuleType:
    module = ModuleType("agent_loop")

    class AgentLoopWorker:
        def __init__(self, config: Any, llm_client: Any) -> None:
            self.stored: list[Any] = []

        async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> str:
            self.stored.append(output)
            return "stored"

    module.AgentLoopWorker = AgentLoopWorker  # type: ignore[attr-defined]
    return module


def output(prompt: list[int], *mask: int) -> SimpleNamespace:
    return SimpleNamespace(prompt_ids=prompt, response_mask=list(mask))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RLHFLESS_OBSERVER_DIR", str(tmp_path))
    verl = fake_verl()

    class Subclass(verl.AgentLoopWorker):  # type: ignore[name-defined, misc]  # what verl's trainer uses
        async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> str:
            return "transferred " + await super()._agent_loop_postprocess(output, validate, **kwargs)

    verl_agent_loop_record._patch(verl)
    verl_agent_loop_record._patch(verl)
    return Subclass(CONFIG, llm_client=None)


def finish(worker: Any, what: Any, validate: bool = False, **kwargs: Any) -> str:
    sample = {"uid": "u", "session_id": 1, "index": 7, "global_steps": 3, **kwargs}
    result: str = asyncio.run(worker._agent_loop_postprocess(what, validate, **sample))
    return result


def test_a_training_sample_is_recorded_and_the_workers_own_result_returned(worker: Any, tmp_path: Path) -> None:
    assert finish(worker, output([1, 2, 3], 1, 1, 1, 1)) == "transferred stored"
    (sample,) = read_samples(tmp_path)
    assert (sample.step, sample.uid, sample.row, sample.session) == (3, "u", 7, 1)
    assert (sample.prompt_tokens, sample.turns, sample.prompt) == (3, (4,), prompt_digest([1, 2, 3]))
    bounds = read_bounds(tmp_path)
    assert (bounds.max_response_tokens, bounds.n, bounds.is_replayed) == (64, 2, False)


def test_turns_are_what_the_policy_wrote_between_what_tools_wrote(worker: Any, tmp_path: Path) -> None:
    finish(worker, [output([1], 1, 1, 0, 0, 1), output([1], 0, 1, 1, 1)])
    (sample,) = read_samples(tmp_path)
    assert sample.turns == (2, 1, 3) and sample.response_tokens == 6


def test_validation_and_empty_outputs_are_not_recorded(worker: Any, tmp_path: Path) -> None:
    finish(worker, output([1], 1), validate=True)
    finish(worker, [])
    assert list(read_samples(tmp_path)) == [] and len(worker.stored) == 2


def test_rows_without_a_number_are_recorded_all_the_same(worker: Any, tmp_path: Path) -> None:
    finish(worker, output([1], 1), index="a")
    assert [sample.row for sample in read_samples(tmp_path)] == [None]


def test_the_same_prompt_has_the_same_name_and_others_do_not() -> None:
    assert prompt_digest([1, 23]) == prompt_digest([1, 23]) != prompt_digest([12, 3])


def test_a_changed_verl_is_refused() -> None:
    verl = fake_verl()
    verl.AgentLoopWorker._agent_loop_postprocess = lambda self, output: None  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="_agent_loop_postprocess"):
        verl_agent_loop_record._patch(verl)
