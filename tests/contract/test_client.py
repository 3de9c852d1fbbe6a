"""A response that was cut again and again keeps its budget: verl's resuming client and ours, on the same server.

The server grants tokens as verl's does, never ends by itself, and aborts each attempt after some tokens.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl")

from omegaconf import OmegaConf
from verl.workers.rollout import llm_server
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_rlhfless.live.client import ElasticClient
from verl_rlhfless.live.tickets import Grant, Outcome, Ticket

PROMPT_TOKENS, RESPONSE_TOKENS, MODEL_TOKENS = 512, 2048, 2561
ABORT_EVERY = 500


class AbortingServer:
    """Takes the place of ``LLMServerClient.generate``: one attempt on one server."""

    def __init__(self) -> None:
        self.grants: list[int] = []
        self.prompts: list[int] = []

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        limit = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens"))
        if limit is None:
            limit = min(RESPONSE_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS - len(prompt_ids))
        limit = max(1, min(limit, MODEL_TOKENS - len(prompt_ids)))
        self.grants.append(limit)
        self.prompts.append(len(prompt_ids))
        generated = min(limit, ABORT_EVERY)
        reason = "length" if generated == limit else "aborted"
        start = sum(min(grant, ABORT_EVERY) for grant in self.grants[:-1])
        return TokenOutput(token_ids=list(range(start, start + generated)), log_probs=None, stop_reason=reason)


class Mailbox:
    """A router that grants at once."""

    worker = "w"

    def __init__(self) -> None:
        self._attempts = itertools.count()

    def post(self, message: Any) -> None: ...

    async def grant(self, message: Ticket | Outcome) -> tuple[Grant, Any]:
        ticket = message.id if isinstance(message, Ticket) else message.ticket
        return Grant(ticket, self.worker, f"{ticket}/{next(self._attempts)}", "s"), object()


def verls(config: Any) -> Any:
    return FullyAsyncLLMServerClient(config=config, load_balancer_handle=None)


def ours(config: Any) -> Any:
    client = ElasticClient(config=config, load_balancer_handle=None)
    client._box, client._granted = Mailbox(), {}  # type: ignore[assignment]
    return client


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> AbortingServer:
    fake, sleep = AbortingServer(), asyncio.sleep
    monkeypatch.setattr(LLMServerClient, "generate", fake.generate)  # bound already: gets no second self
    monkeypatch.setattr(llm_server.asyncio, "sleep", lambda *_: sleep(0))  # verl waits a second between attempts
    return fake


@pytest.fixture(params=[verls, ours], ids=["verl", "ours"])
def generate(request: pytest.FixtureRequest, server: AbortingServer) -> Callable[..., TokenOutput]:
    rollout = {"name": "vllm", "prompt_length": PROMPT_TOKENS, "response_length": RESPONSE_TOKENS}
    rollout |= {"max_model_len": MODEL_TOKENS, "enable_rollout_routing_replay": False}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout}, "async_training": {"partial_rollout": True}})

    def generate(prompt_tokens: int, sampling_params: dict[str, Any]) -> TokenOutput:
        client = request.param(config)
        work = client.generate("r0", prompt_ids=list(range(prompt_tokens)), sampling_params=sampling_params)
        return asyncio.run(asyncio.wait_for(work, 30))

    return generate


@pytest.mark.parametrize("prompt_tokens", [92, 136, PROMPT_TOKENS])
def test_resumes_fill_the_response_and_never_exceed_it(
    generate: Callable[..., TokenOutput], server: AbortingServer, prompt_tokens: int
) -> None:
    output = generate(prompt_tokens, {"temperature": 1.0})
    assert output.token_ids == list(range(RESPONSE_TOKENS)), "every token once, in order"
    assert output.stop_reason == "length"
    assert server.grants == [RESPONSE_TOKENS - ABORT_EVERY * index for index in range(5)]
    assert server.prompts == [prompt_tokens + ABORT_EVERY * index for index in range(5)]


@pytest.mark.parametrize("key", ["max_tokens", "max_new_tokens"])
def test_the_callers_own_limit_holds_over_all_attempts(generate: Callable[..., TokenOutput], key: str) -> None:
    assert len(generate(136, {"temperature": 1.0, key: 1200}).token_ids) == 1200


def test_the_callers_parameters_are_not_changed(generate: Callable[..., TokenOutput]) -> None:
    params = {"temperature": 1.0, "top_p": 0.9}
    generate(136, params)
    assert params == {"temperature": 1.0, "top_p": 0.9}
