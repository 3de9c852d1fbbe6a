"""The rollout stage: the router knows a step's prompts before they come, and every turn says whose it is.

verl's own agent-loop manager and worker do everything else, so any agent loop works unchanged. Validation is not
announced: nothing is predicted for it and nothing is learnt from it.
"""

from __future__ import annotations

from typing import Any

import ray
from tensordict import TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_rlhfless.live.announcement import announcement_of
from verl_rlhfless.live.client import serving
from verl_rlhfless.live.preload import SERVER_MODULE, import_in_background
from verl_rlhfless.live.tickets import SampleKey


class StageWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's worker; its client learns which sample a turn belongs to, and when a sample has all its tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import_in_background(SERVER_MODULE)

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, agent_name: str, **kwargs: Any
    ) -> Any:
        run = super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, **kwargs)
        if trajectory["validate"]:
            return await run
        sample = SampleKey(str(kwargs["uid"]), int(kwargs["session_id"]))
        try:
            with serving(sample):
                return await run
        except BaseException:
            self.llm_client.end_session(sample)  # else the router was told before its reward was computed
            raise

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        if not validate:
            self.llm_client.end_session(SampleKey(str(kwargs["uid"]), int(kwargs["session_id"])))
        await super()._agent_loop_postprocess(output, validate, **kwargs)


class StageManager(AgentLoopManagerTQ):
    """verl's manager; it announces a training step to the router before it submits the prompts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(StageWorker)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Announce a training batch, then dispatch it as verl does: a prompt's samples to one worker."""
        is_validation = prompts["validate"] if "validate" in prompts else False  # noqa: SIM401  get() wraps the value
        if not is_validation:
            router = self.llm_client._load_balancer
            ray.get(router.announce.remote(announcement_of(prompts, self.rollout_config)))
        super().generate_sequences(prompts)
