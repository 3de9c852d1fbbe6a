"""Let verl's agent-loop workers run training samples with forced response lengths.

Why: verl picks an agent loop by a name in a registry of each worker process, and the loop is not told whether a sample
is for training or validation; only ``AgentLoopWorker._run_agent_loop`` knows both
(``verl/experimental/agent_loop/agent_loop.py``). ``agent_loop_config_path`` could add a loop, but not for training
alone, and it is a key of the user's recipe. A run without ``rlhfless.replay.trace`` is left as it is.
Remove when: verl tells an agent loop whether it validates, and takes agent loops from a plugin.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import wrapt

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.replay import SINGLE_TURN_AGENT, check_replay

REPLAY_AGENT = "rlhfless_replay"
_MODULE = "verl.experimental.agent_loop.agent_loop"
_STOCK_LOOP = "verl.experimental.agent_loop.single_turn_agent_loop.SingleTurnAgentLoop"
_REPLAY_LOOP = "verl_rlhfless.live.replay_agent_loop.ReplayAgentLoop"
_SIGNATURES = {
    "__init__": ["self", "config", "llm_client", "teacher_client", "reward_loop_worker_handles"],
    "_run_agent_loop": ["self", "sampling_params", "trajectory", "agent_name", "trace", "kwargs"],
}


def apply() -> None:
    """Wrap verl's agent-loop worker now if its module is loaded, else right after its first import.

    Raises:
        UnsupportedError: verl changed the worker (raised when its module is imported).
    """
    wrapt.register_post_import_hook(_patch, _MODULE)


def _patch(module: ModuleType) -> None:
    worker = module.AgentLoopWorker
    if hasattr(worker, "_rlhfless_replays"):
        return
    changed = [n for n, names in _SIGNATURES.items() if list(inspect.signature(getattr(worker, n)).parameters) != names]
    if changed:
        raise UnsupportedError(
            f"verl changed AgentLoopWorker.{', '.join(changed)}. Update {__name__} or pin verl to 0.9.1."
        )
    init, run_agent_loop = worker.__init__, worker._run_agent_loop

    @functools.wraps(init)
    def replay_init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        replay = check_replay(config)
        self._rlhfless_replays = replay.trace is not None
        init(self, config, *args, **kwargs)
        if self._rlhfless_replays:
            _check_loop(module._agent_loop_registry.get(SINGLE_TURN_AGENT))
            values = {"replay_trace": replay.trace, "replay_scale": replay.scale}
            module._agent_loop_registry[REPLAY_AGENT] = {"_target_": _REPLAY_LOOP, **values}

    @functools.wraps(run_agent_loop)
    async def run_replay_loop(
        self: Any, sampling_params: dict[str, Any], trajectory: Mapping[str, Any], *, agent_name: str, **kwargs: Any
    ) -> Any:
        if self._rlhfless_replays and not trajectory["validate"]:
            agent_name = _replay_name(agent_name)
        return await run_agent_loop(self, sampling_params, trajectory, agent_name=agent_name, **kwargs)

    worker._rlhfless_replays = False
    worker.__init__, worker._run_agent_loop = replay_init, run_replay_loop


def _check_loop(entry: Mapping[str, Any] | None) -> None:
    if entry is not None and entry["_target_"] != _STOCK_LOOP:
        raise UnsupportedError(
            f"actor_rollout_ref.rollout.agent.agent_loop_config_path: it replaces {SINGLE_TURN_AGENT} by "
            f"{entry['_target_']}, whose lengths replay cannot force. Drop that entry, or rlhfless.replay.trace."
        )


def _replay_name(agent_name: str) -> str:
    if agent_name != SINGLE_TURN_AGENT:
        raise UnsupportedError(
            f"agent_name={agent_name!r} in the training data: replay forces lengths of {SINGLE_TURN_AGENT} only. "
            "Drop the column agent_name, or rlhfless.replay.trace."
        )
    return REPLAY_AGENT
