"""What an error of a call says about its server, and what becomes of a response whose server is away for a moment."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("verl", reason="needs verl")

from omegaconf import OmegaConf
from ray import exceptions
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live import client as client_module
from verl_rlhfless.live import retry as retry_module
from verl_rlhfless.live.client import ElasticClient, _end_by, serving
from verl_rlhfless.live.sampling import GENERATED, lost_by_a_cut
from verl_rlhfless.live.tickets import Grant, Outcome, OutcomeKind, Progress, SampleKey, Ticket

AWAY = exceptions.ActorUnavailableError("not now", b"0" * 16)


class EngineDeadError(Exception):
    """Named as vLLM's."""


def task_error(cause: Exception) -> exceptions.RayTaskError:
    return exceptions.RayTaskError("generate", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (exceptions.ActorDiedError(), OutcomeKind.LOST),
        (exceptions.OutOfMemoryError("the node ran low on memory"), OutcomeKind.LOST),
        (exceptions.NodeDiedError("gone"), OutcomeKind.LOST),
        (exceptions.WorkerCrashedError(), OutcomeKind.LOST),
        (task_error(EngineDeadError()), OutcomeKind.LOST),
        (AWAY, OutcomeKind.AWAY),
        (exceptions.OwnerDiedError("0" * 56, "", "stack"), OutcomeKind.CUT),
        (task_error(ValueError("too long")), OutcomeKind.FAILED),
        (task_error(MemoryError()), OutcomeKind.FAILED),
        (exceptions.TaskCancelledError(), OutcomeKind.FAILED),
    ],
)
def test_only_a_death_is_tried_again(error: Exception, kind: OutcomeKind) -> None:
    assert _end_by(error) is kind


class Mailbox:
    """Grants everything on one server, and holds two tokens of an attempt that broke off."""

    worker = "w"

    def __init__(self, server: Any) -> None:
        self.posted: list[Any] = []
        self._server = server

    def post(self, message: Any) -> None:
        self.posted.append(message)

    async def grant(self, message: Ticket | Outcome) -> tuple[Grant, Any]:
        self.post(message)
        return Grant("t", self.worker, f"t.{len(self.posted)}", "host:0"), self._server

    async def recover(self, attempt: str) -> Progress:
        return Progress([1, 2], [], 7)


def new_client(server: Any = None, **kwargs: Any) -> tuple[ElasticClient, Mailbox]:
    rollout = {"name": "vllm", "prompt_length": 8, "response_length": 4, "max_model_len": None}
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": rollout | {"enable_rollout_routing_replay": False}}})
    client = ElasticClient(config=config, load_balancer_handle=None, **kwargs)
    box = client._box = Mailbox(server)  # type: ignore[assignment]
    client._granted = {}
    return client, box  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("num_silent", "patience_s", "kind"),
    [(0, 60, OutcomeKind.AWAY), (2, 60, OutcomeKind.AWAY), (9, 60, OutcomeKind.LOST), (1, 0, OutcomeKind.LOST)],
)
def test_a_response_goes_on_with_what_it_had_once_its_server_answers_again_or_is_given_up(
    num_silent: int, patience_s: float, kind: OutcomeKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    silences, aborted = iter([True] * num_silent), list[str]()
    calls = iter([AWAY, TokenOutput(token_ids=[3, 4], log_probs=None, stop_reason="length")])

    async def abort(attempts: list[str]) -> None:
        if next(silences, False):
            raise AWAY
        aborted.extend(attempts)

    async def generate(*_: Any, **__: Any) -> TokenOutput:
        if isinstance(outcome := next(calls), Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(retry_module, "_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(client_module, "_BACK_WITHIN_S", patience_s)
    monkeypatch.setattr(LLMServerClient, "generate", generate)
    client, box = new_client(SimpleNamespace(abort=SimpleNamespace(remote=abort)))
    output = asyncio.run(client.generate("r", prompt_ids=[0], sampling_params={}))
    assert output.token_ids == [1, 2, 3, 4]
    assert [message.kind for message in box.posted[1:]] == [kind, OutcomeKind.DONE]
    assert aborted == (["t.1"] if kind is OutcomeKind.AWAY else []), "it is not generated twice at once"


def lost_once(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let the first server die after two tokens; return what every attempt is asked."""
    asked: list[dict[str, Any]] = []

    async def generate(*_: Any, **request: Any) -> TokenOutput:
        asked.append(request)
        if len(asked) == 1:
            raise exceptions.ActorDiedError()
        return TokenOutput(token_ids=[3, 4], log_probs=None, stop_reason="length")

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    return asked


def test_limits_and_stop_strings_hold_for_all_attempts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = lost_once(monkeypatch)
    params = {"min_tokens": 3, "max_new_tokens": 4, "stop": ["</s>"], "top_p": 0.9}
    client, _ = new_client()
    assert asyncio.run(client.generate("r", prompt_ids=[0], sampling_params=params)).token_ids == [1, 2, 3, 4]
    first, second = [request["sampling_params"] for request in asked]
    assert first == {"min_tokens": 3, "max_tokens": 4, "stop": ["</s>"], "top_p": 0.9}
    assert second == first | {"min_tokens": 1, "max_tokens": 2, "extra_args": {GENERATED: 2}}
    assert params["min_tokens"] == 3, "an agent loop uses its parameters for every turn"


@pytest.mark.parametrize("params", [{"seed": 0}, {"presence_penalty": 0.5}, {"structured_outputs": {"regex": "a*"}}])
def test_what_a_cut_would_lose_is_refused_and_begins_anew_after_a_loss(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lost_once(monkeypatch)
    client, _ = new_client()
    (name,) = params

    async def of_a_rollout() -> Any:
        with serving(SampleKey("g", 0)):
            return await client.generate("r", prompt_ids=[0], sampling_params=params)

    with pytest.raises(UnsupportedError, match=f"{name}=.*rlhfless/migration=off"):
        asyncio.run(of_a_rollout())
    assert not asked
    client, box = new_client(cuts=False)
    assert asyncio.run(of_a_rollout()).token_ids == [3, 4]
    assert [request["prompt_ids"] for request in asked] == [[0], [0]]
    assert [outcome.generated for outcome in box.posted[1:]] == [0, 2]


def test_parameters_that_are_not_set_lose_nothing() -> None:
    assert lost_by_a_cut({"presence_penalty": 0.0, "seed": None, "bad_words": [], "extra_args": None}) is None
