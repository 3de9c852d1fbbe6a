"""verl's single-turn agent loop with forced response lengths."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from verl_rlhfless.live.replay import plan_of, row_index


class ReplayAgentLoop(SingleTurnAgentLoop):
    """Ends each response where the trace says; without a trace it is verl's own loop.

    ``max_tokens`` with ``ignore_eos``: all that verl's own resuming clients lower is ``max_tokens``.

    Args:
        replay_trace: Path of the trace.
        replay_scale: Factor on every length.
    """

    def __init__(self, *args: Any, replay_trace: str | None = None, replay_scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plan = plan_of(replay_trace, replay_scale, self.response_length) if replay_trace else None

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Return one response of the length that the trace holds for it."""
        if self._plan is None:
            return await super().run(sampling_params, **kwargs)
        forced = self._plan.forced_tokens(
            int(kwargs["global_steps"]), row_index(kwargs["index"]), int(kwargs["session_id"])
        )
        output = await super().run(sampling_params | {"max_tokens": forced, "ignore_eos": True}, **kwargs)
        output.extra_fields["forced_tokens"] = forced
        return output
