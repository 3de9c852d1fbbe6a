"""The rollout stage: announces a step's prompts to the router before they come, and tells which sample each turn is of.

verl's own agent-loop manager and worker do everything else, so any agent loop works unchanged. Validation is not
announced: nothing is predicted for it and nothing is learnt from it.

To build an agent loop takes milliseconds. verl's worker builds all of its loops before any of them sends its first
request. Ours lets the event loop run after each build, and builds the samples first that the plan puts first. So
replicas have requests at once, and they need not keep a slot free for a request that the plan wants earlier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from tensordict import TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from verl_rlhfless.errors import SampleLossError
from verl_rlhfless.live.announcement import announcement_of
from verl_rlhfless.live.client import serving
from verl_rlhfless.live.preload import SERVER_MODULE, import_in_background
from verl_rlhfless.live.retry import once, retry
from verl_rlhfless.live.tickets import SampleKey


class Turns:
    """Lets one waiting coroutine at a time go on, so that its request is sent before the next agent loop is built."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def take(self) -> None:
        """Return in an iteration of the event loop in which no other caller returns."""
        async with self._lock:
            await asyncio.sleep(0)


class StageWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's worker; its client learns which sample a turn belongs to, and when a sample has all its tokens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns = Turns()
        import_in_background(SERVER_MODULE)

    async def live(self) -> None:
        """Return never: the call fails when this process ends."""
        await asyncio.Event().wait()

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, agent_name: str, **kwargs: Any
    ) -> Any:
        sample = None if trajectory["validate"] else _key_of(kwargs)
        try:
            await self._turns.take()
            with serving(sample):
                return await super()._run_agent_loop(sampling_params, trajectory, agent_name=agent_name, **kwargs)
        except BaseException:
            if sample is not None:
                self.llm_client.end_session(sample)  # else the router was told before its reward was computed
            raise

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        if not validate:
            self.llm_client.end_session(_key_of(kwargs))
        await super()._agent_loop_postprocess(output, validate, **kwargs)


def _key_of(sample: Mapping[str, Any]) -> SampleKey:
    return SampleKey(str(sample["uid"]), int(sample["session_id"]))


class StageManager(AgentLoopManagerTQ):
    """verl's manager; it announces a training step to the router before it submits the prompts."""

    _lives: dict[Any, Any] | None = None  # calls that end with their worker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(StageWorker)

    def check_workers(self) -> None:
        """Return if every worker lives. verl hands prompts out and waits for samples, not for their workers.

        Raises:
            SampleLossError: A worker ended: its samples will never come.
        """
        if self._lives is None:
            self._lives = {worker.live.remote(): worker for worker in self.agent_loop_workers}
        for ended in ray.wait(list(self._lives), num_returns=len(self._lives), timeout=0)[0]:
            worker = self._lives.pop(ended)
            self._lives[worker.live.remote()] = worker
            try:
                ray.get(ended)
            except ray.exceptions.ActorUnavailableError:
                continue  # it may be back, and the next call tells
            except ray.exceptions.RayActorError as error:
                raise SampleLossError(
                    f"an agent-loop worker ended, and the samples that it worked on are lost: {error} Look for its "
                    "error above and at its node's memory; fewer workers "
                    "(actor_rollout_ref.rollout.agent.num_workers) take less."
                ) from error

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Announce a training batch, then dispatch it as verl does: a prompt's samples to one worker."""
        is_validation = prompts["validate"] if "validate" in prompts else False  # noqa: SIM401  get() wraps the value
        if not is_validation:
            router = self.llm_client._load_balancer
            order = retry(once(router, "announce", announcement_of(prompts, self.rollout_config)))
            prompts = prompts[ordered_in_shares(order, len(self.agent_loop_workers))]
        super().generate_sequences(prompts)


def ordered_in_shares(order: Sequence[int], num_workers: int) -> list[int]:
    """Return the prompts' positions, sorted as in ``order`` within the contiguous share that verl gives each worker."""
    size = -(-len(order) // num_workers)
    rank = {prompt: place for place, prompt in enumerate(order)}
    return sorted(range(len(order)), key=lambda prompt: (prompt // size, rank[prompt]))
