"""Training samples run with forced lengths, validation and other runs as stock."""

from __future__ import annotations

import asyncio
from types import ModuleType
from typing import Any

import pytest

from verl_rlhfless.config import ReplayConfig
from verl_rlhfless.errors import ConfigError, UnsupportedError
from verl_rlhfless_patches import verl_agent_loop_replay

STOCK = "verl.experimental.agent_loop.single_turn_agent_loop.SingleTurnAgentLoop"


def fake_verl(custom_loop: str | None = None) -> ModuleType:
    module = ModuleType("agent_loop")
    registry: dict[str, dict[str, Any]] = {"single_turn_agent": {"_target_": STOCK}}

    class AgentLoopWorker:
        def __init__(
            self, config: Any, llm_client: Any, teacher_client: Any = None, reward_loop_worker_handles: Any = None
        ) -> None:
            if custom_loop is not None:  # what agent_loop_config_path does
                registry["single_turn_agent"] = {"_target_": custom_loop}

        async def _run_agent_loop(
            self, sampling_params: Any, trajectory: Any, *, agent_name: str, trace: bool = True, **kwargs: Any
        ) -> tuple[str, Any]:
            return agent_name, kwargs

    module.__dict__.update(AgentLoopWorker=AgentLoopWorker, _agent_loop_registry=registry)
    return module


def run(worker: Any, validate: bool, agent_name: str = "single_turn_agent") -> str:
    coroutine = worker._run_agent_loop({}, {"validate": validate}, agent_name=agent_name, trace=False, session_id=3)
    name, kwargs = asyncio.run(coroutine)
    assert kwargs == {"session_id": 3}
    return str(name)


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Replay is what the fake configuration says: a path, None, or an error."""

    def check(config: Any) -> ReplayConfig:
        if isinstance(config, Exception):
            raise config
        return ReplayConfig(trace=config, scale=0.5)

    monkeypatch.setattr(verl_agent_loop_replay, "check_replay", check)
    return monkeypatch


def test_training_is_replayed_and_validation_is_not(replay: pytest.MonkeyPatch) -> None:
    verl = fake_verl()
    verl_agent_loop_replay._patch(verl)
    verl_agent_loop_replay._patch(verl)
    worker = verl.AgentLoopWorker("trace.jsonl", llm_client=None)

    assert run(worker, validate=True) == "single_turn_agent"
    entry = verl._agent_loop_registry[run(worker, validate=False)]
    assert entry == {
        "_target_": "verl_rlhfless.live.replay_agent_loop.ReplayAgentLoop",
        "replay_trace": "trace.jsonl",
        "replay_scale": 0.5,
    }
    assert verl._agent_loop_registry["single_turn_agent"] == {"_target_": STOCK}


def test_a_run_without_replay_is_stock(replay: pytest.MonkeyPatch) -> None:
    verl = fake_verl(custom_loop="my.Loop")
    verl_agent_loop_replay._patch(verl)
    worker = verl.AgentLoopWorker(None, None)

    assert run(worker, validate=False) == "single_turn_agent"
    assert run(worker, validate=False, agent_name="tool_agent") == "tool_agent"
    assert list(verl._agent_loop_registry) == ["single_turn_agent"]


def test_a_bad_configuration_stops_the_worker(replay: pytest.MonkeyPatch) -> None:
    verl = fake_verl()
    verl_agent_loop_replay._patch(verl)

    with pytest.raises(ConfigError):
        verl.AgentLoopWorker(ConfigError("data.shuffle", True, "must be False", "Set it."), None)


def test_a_replaced_single_turn_loop_is_refused(replay: pytest.MonkeyPatch) -> None:
    verl = fake_verl(custom_loop="my.Loop")
    verl_agent_loop_replay._patch(verl)

    with pytest.raises(UnsupportedError, match=r"agent_loop_config_path.*my\.Loop"):
        verl.AgentLoopWorker("trace.jsonl", None)


def test_a_row_with_another_agent_is_refused(replay: pytest.MonkeyPatch) -> None:
    verl = fake_verl()
    verl_agent_loop_replay._patch(verl)
    worker = verl.AgentLoopWorker("trace.jsonl", None)

    assert run(worker, validate=True, agent_name="tool_agent") == "tool_agent"
    with pytest.raises(UnsupportedError, match="agent_name='tool_agent'"):
        run(worker, validate=False, agent_name="tool_agent")


@pytest.mark.parametrize("method", ["__init__", "_run_agent_loop"])
def test_a_changed_verl_is_refused(method: str) -> None:
    verl = fake_verl()
    setattr(verl.AgentLoopWorker, method, lambda self, config: None)

    with pytest.raises(UnsupportedError, match=method):
        verl_agent_loop_replay._patch(verl)
