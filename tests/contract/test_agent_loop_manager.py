"""A batch of prompts reaches verl's agent-loop workers in the same pieces, whichever manager hands it out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl")

from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from verl_rlhfless.live.stage import StageManager


class Worker:
    def __init__(self) -> None:
        self.batches: list[TensorDict] = []
        self.generate_sequences = SimpleNamespace(remote=self.batches.append)


@pytest.mark.parametrize("manager_class", [AgentLoopManagerTQ, StageManager], ids=["verl", "ours"])
@pytest.mark.parametrize("validate", [False, True], ids=["training", "validation"])
@pytest.mark.parametrize(("num_prompts", "pieces"), [(6, [3, 3]), (5, [3, 2]), (1, [1])])
def test_prompts_are_dealt_to_the_workers_unchanged(
    monkeypatch: pytest.MonkeyPatch, manager_class: type, validate: bool, num_prompts: int, pieces: list[int]
) -> None:
    monkeypatch.setattr(agent_loop_tq.ray, "get", lambda answers, **_: answers)
    manager: Any = manager_class.__new__(manager_class)
    manager.agent_loop_workers = workers = [Worker(), Worker()]
    manager.rollout_config = SimpleNamespace(n=4, prompt_length=64, response_length=32)
    once = SimpleNamespace(remote=lambda _call, _method, _announced: tuple(range(num_prompts)))
    manager.llm_client = SimpleNamespace(_load_balancer=SimpleNamespace(once=once))
    batch = TensorDict(
        {
            "uid": NonTensorStack(*[f"u{i}" for i in range(num_prompts)]),
            "raw_prompt": NonTensorStack(*[[{"role": "user", "content": str(i)}] for i in range(num_prompts)]),
            "index": NonTensorStack(*range(num_prompts)),
        },
        batch_size=num_prompts,
    )
    batch["global_steps"], batch["validate"] = NonTensorData(7), NonTensorData(validate)
    keys = set(batch.keys())

    manager.generate_sequences(batch)

    dealt = [part for worker in workers for part in worker.batches]
    assert [len(part) for part in dealt] == pieces
    assert [uid for part in dealt for uid in part["uid"]] == [f"u{i}" for i in range(num_prompts)]
    assert all(set(part.keys()) == keys for part in dealt)
