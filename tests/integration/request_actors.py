"""Servers as real Ray actors around an engine that needs no model, and verl's configuration for a client.

The engine is greedy: each token follows from everything before it, so a response that was put together wrongly, with a
token twice, left out or from another request, differs from the one that is expected.
"""

from __future__ import annotations

import asyncio
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

import ray

from verl_rlhfless.live.tickets import ENGINE_DEAD, Delta, Part, ServerLimits

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers can't import a test module
MODEL_LEN = 4096
INTERVAL_S = 0.05


def next_token(context: Sequence[int]) -> int:
    """Return the greedy token."""
    return (context[-1] * 31 + len(context) * 17 + context[len(context) // 2]) % 997


def response_to(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return what an engine that is never disturbed generates."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


def client_config(**rollout: Any) -> Any:
    """Return what a client reads of verl's configuration."""
    values = {
        "name": "vllm",
        "prompt_length": 512,
        "response_length": 64,
        "max_model_len": MODEL_LEN,
        "full_determinism": False,
        "enable_rollout_routing_replay": False,
    }
    section = types.SimpleNamespace(**(values | rollout))
    return types.SimpleNamespace(actor_rollout_ref=types.SimpleNamespace(rollout=section))


class EngineDeadError(Exception):
    """Named as vLLM's."""


@ray.remote(num_cpus=0, max_concurrency=10_000)
class Server:
    """Answers as verl's server with our streams does."""

    def __init__(self, token_s: float = 0.0, max_num_seqs: int | None = None) -> None:
        self._token_s, self._limits = token_s, ServerLimits(max_num_seqs)
        self._tokens: dict[str, list[int]] = {}
        self._reported: dict[str, int] = {}
        self._cut: set[str] = set()
        self._is_dead = self._has_guard = False
        self.largest_batch = self.num_requests = 0

    async def report_to(self, router: Any, name: str, interval_s: float) -> ServerLimits:
        async def report() -> None:
            while not self._is_dead:
                await asyncio.sleep(interval_s)
                parts = []
                for attempt, tokens in self._tokens.items():
                    start = self._reported.get(attempt, 0)
                    parts.append(Part(attempt, start, tokens[start:], [-t / 1000 for t in tokens[start:]]))
                    self._reported[attempt] = len(tokens)
                await router.progress.remote(name, Delta(tuple(parts), 7))

        self._reporting = asyncio.create_task(report())
        return self._limits

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_: Any) -> Any:
        if len(prompt_ids) >= MODEL_LEN:
            raise ValueError(f"Prompt length ({len(prompt_ids)}) leaves no room")
        self.num_requests += 1
        tokens = self._tokens[request_id] = []
        self.largest_batch = max(self.largest_batch, len(self._tokens))
        context = list(prompt_ids)
        reason = "completed"
        try:
            while len(tokens) < sampling_params["max_tokens"]:
                await asyncio.sleep(self._token_s)
                if self._is_dead and not self._has_guard:
                    raise EngineDeadError()
                if self._is_dead or request_id in self._cut:
                    reason = "aborted"
                    break
                tokens.append(next_token(context))
                context.append(tokens[-1])
        finally:
            del self._tokens[request_id]
        fields = {"global_steps": 7} | ({ENGINE_DEAD: True} if self._is_dead else {})
        log_probs = [-token / 1000 for token in tokens] if sampling_params.get("logprobs") else None
        return types.SimpleNamespace(  # verl's TokenOutput, without verl's imports in every server
            token_ids=tokens,
            log_probs=log_probs,
            stop_reason=reason,
            extra_fields=fields,
            routed_experts=None,
            num_preempted=None,
        )

    async def abort(self, attempts: Sequence[str]) -> None:
        self._cut.update(attempts)

    async def die(self, has_guard: bool) -> None:
        """Let the engine die: with a guard, requests end with what they have; without, with vLLM's error."""
        self._is_dead, self._has_guard = True, has_guard

    async def exit(self) -> None:
        os._exit(1)

    async def num_tokens(self) -> int:
        return sum(map(len, self._tokens.values()))

    async def seen(self) -> tuple[int, int]:
        """Return the number of requests, and how many ran at once."""
        return self.num_requests, self.largest_batch


@ray.remote(num_cpus=0)
class RemoteClient:
    """An agent-loop worker in a process of its own."""

    async def ask_all(self, router: Any, requests: list[tuple[Any, list[int]]], params: dict[str, Any]) -> list[Any]:
        from verl_rlhfless.live.client import ElasticClient, serving

        client: Any = ElasticClient(client_config(), router)

        async def ask(sample: Any, prompt: list[int]) -> Any:
            with serving(sample):
                output = await client.generate(f"r{prompt}", prompt_ids=prompt, sampling_params=params)
            client.end_session(sample)
            return output

        outputs = await asyncio.gather(*[ask(*request) for request in requests])
        while client._mailbox._is_sending:
            await asyncio.sleep(0.01)
        return outputs
