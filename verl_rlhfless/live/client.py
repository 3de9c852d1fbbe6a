"""The client in every agent-loop worker: a request that survives cuts, drains and the death of its replica.

A turn holds a ticket at the router. Each time it is granted it runs on one server; when that attempt ends early, for
whatever reason, prompt and tokens so far continue elsewhere at once with the budget that is left. To the agent loop it
is one call, as verl's client makes it.

Invariants: only the death of an engine or server is tried again, as often as the router allows, and what ends because
a server is out of reach for a moment; an error of the request itself is raised as it is; every token is asked for once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import ray
from verl.utils import normalize_token_ids
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_rlhfless.errors import UnsupportedError
from verl_rlhfless.live.continuation import Continuation
from verl_rlhfless.live.mailbox import Mailbox
from verl_rlhfless.live.retry import retry_async
from verl_rlhfless.live.sampling import lost_by_a_cut, params_of_attempt
from verl_rlhfless.live.tickets import ENGINE_DEAD, Grant, Outcome, OutcomeKind, SampleKey, SessionEnd, Ticket

_ABORTED = ("aborted", "abort")
_sample: ContextVar[SampleKey | None] = ContextVar("rlhfless_sample", default=None)


@contextlib.contextmanager
def serving(sample: SampleKey | None) -> Iterator[None]:
    """Tell the client that every turn inside belongs to ``sample`` of the announced rollout; ``None`` = to none."""
    token = _sample.set(sample)
    try:
        yield
    finally:
        _sample.reset(token)


class ElasticClient(LLMServerClient):
    """verl's client with continuation; one object is pickled into every agent-loop worker."""

    _box: Mailbox | None = None

    def __init__(self, *args: Any, cuts: bool = True, **kwargs: Any) -> None:
        """Take verl's arguments, and whether running samples of an announced rollout may be cut."""
        super().__init__(*args, **kwargs)
        self._cuts = cuts

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_box", "_granted")}

    @property
    def _mailbox(self) -> Mailbox:
        if self._box is None:
            self._box = Mailbox(self._load_balancer)
            self._granted: dict[str, tuple[str, Any]] = {}
        return self._box

    def end_session(self, sample: SampleKey) -> None:
        """Tell the router that a sample has all its tokens, or failed: no further turn comes. May be called twice."""
        self._mailbox.post(SessionEnd(sample))

    async def generate(
        self, request_id: str, *, prompt_ids: Any, sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """Return the whole response to a prompt, wherever its parts were generated.

        Args:
            request_id: Id of the conversation, the same for all its turns.
            prompt_ids: Token ids that the turn starts from.
            sampling_params: As verl's client takes them; not changed.
            kwargs: As verl's client takes them.

        Raises:
            ReplicaError: Its replicas died too often, or none is left.
            UnsupportedError: The sample may be cut, and would lose one of the parameters.
        """
        prompt = normalize_token_ids(prompt_ids)
        response = Continuation(self._budget(len(prompt), sampling_params), bool(sampling_params.get("logprobs")))
        response.is_resumable = self._keeps(sampling_params)
        ticket = Ticket(
            super()._vllm_request_id(request_id), self._mailbox.worker, request_id, _sample.get(), len(prompt)
        )
        message: Ticket | Outcome = ticket
        attempt = ""
        try:
            while True:
                grant, server = await self._mailbox.grant(message)
                attempt = grant.attempt
                params = params_of_attempt(sampling_params, len(response.tokens), response.budget_left)
                outcome, stop_reason = await self._attempt(
                    (grant, server), response, prompt_ids=prompt + response.tokens, sampling_params=params, **kwargs
                )
                message, attempt = outcome, ""
                if outcome.kind is OutcomeKind.DONE:
                    self._mailbox.post(outcome)
                    return response.result(stop_reason)
        except BaseException as error:
            self._mailbox.post(Outcome(ticket.id, attempt, OutcomeKind.FAILED, len(response.tokens), repr(error)))
            raise

    async def _attempt(
        self, granted: tuple[Grant, Any], response: Continuation, **request: Any
    ) -> tuple[Outcome, str | None]:
        """Run one attempt, append what it generated, and return how it ended."""
        grant, server = granted
        kind, detail, stop_reason = OutcomeKind.CUT, "", "completed"
        self._granted[grant.attempt] = grant.server, server
        try:
            output = await super().generate(grant.attempt, **request)
        except ray.exceptions.RayError as error:
            kind, detail = _end_by(error), f"{grant.server}: {type(error).__name__}"
            if kind is OutcomeKind.FAILED:
                raise
            if kind is OutcomeKind.AWAY and not await _is_back(server, grant.attempt):
                kind = OutcomeKind.LOST
            output = await self._recovered(grant.attempt)
        else:
            if output.extra_fields.pop(ENGINE_DEAD, False):
                kind, detail = OutcomeKind.LOST, f"{grant.server}: its engine died"
            elif output.stop_reason not in _ABORTED:
                kind, stop_reason = OutcomeKind.DONE, output.stop_reason
        if kind is OutcomeKind.DONE or (response.is_resumable and self._is_whole(output)):
            response.add(output)
        if not response.budget_left:
            kind = OutcomeKind.DONE
        return Outcome(grant.ticket, grant.attempt, kind, len(response.tokens), detail), stop_reason

    async def _recovered(self, attempt: str) -> TokenOutput:
        """Return what is safe of an attempt whose server can't answer any more."""
        progress = await self._mailbox.recover(attempt)
        return TokenOutput(
            token_ids=progress.tokens,
            log_probs=progress.log_probs,
            extra_fields={"global_steps": progress.version} if progress.tokens else {},
        )

    def _is_whole(self, output: TokenOutput) -> bool:
        """Return whether a part can be continued: with routing replay, only if its experts came with it."""
        return output.routed_experts is not None or not self._rollout.enable_rollout_routing_replay

    def _keeps(self, sampling_params: dict[str, Any]) -> bool:
        """Return whether a response can be continued under these parameters; one that can't begins anew after a loss.

        Raises:
            UnsupportedError: It can't, and it may be cut: its sample would be drawn again because it is long.
        """
        lost = lost_by_a_cut(sampling_params)
        if lost is not None and self._cuts and _sample.get() is not None:
            raise UnsupportedError(
                f"sampling parameter {lost}={sampling_params[lost]!r}: a sample that is cut would lose it, because "
                "vLLM applies it to what one engine generates. Set rlhfless/migration=off, or leave it out."
            )
        return lost is None

    def _budget(self, prompt_tokens: int, sampling_params: dict[str, Any]) -> int:
        """Return how many tokens a turn may have: the rule of verl's server, applied once for all attempts."""
        rollout = self._rollout
        limit = sampling_params.get("max_tokens", sampling_params.get("max_new_tokens"))
        if limit is None:
            limit = min(rollout.response_length, rollout.prompt_length + rollout.response_length - prompt_tokens)
        if rollout.max_model_len is not None:
            limit = min(limit, rollout.max_model_len - prompt_tokens)
        return max(1, int(limit))

    @property
    def _rollout(self) -> Any:
        return self.config.actor_rollout_ref.rollout

    # ---- what verl's client calls in an attempt; its request id is the attempt's

    async def _acquire_server(self, request_id: str, **_: Any) -> tuple[str, Any]:
        return self._granted.pop(request_id)

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        """Do nothing: the outcome says it."""

    def _vllm_request_id(self, request_id: str) -> str:
        return request_id


_BACK_WITHIN_S = 2.0  # longer, a lost replica would cost its samples more than one that starts or has room for them
_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.OutOfMemoryError,  # Ray's memory monitor chose the server
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
)


def _end_by(error: ray.exceptions.RayError) -> OutcomeKind:
    """Return what an error of a call says: server dead or away, only this answer lost, or the request wrong."""
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return OutcomeKind.AWAY
    if isinstance(error, ray.exceptions.ObjectLostError):
        return OutcomeKind.CUT
    # by name: agent-loop workers don't import vLLM
    is_engine = isinstance(error, ray.exceptions.RayTaskError) and type(error.cause).__name__ == "EngineDeadError"
    return OutcomeKind.LOST if is_engine or isinstance(error, _DEATHS) else OutcomeKind.FAILED


async def _is_back(server: Any, attempt: str) -> bool:
    """Return whether a server that was out of reach soon answers again; what it still generates of the attempt ends.

    Of a node that is gone Ray says for half a minute that its actors are out of reach.
    """
    try:
        await asyncio.wait_for(retry_async(lambda: server.abort.remote([attempt])), _BACK_WITHIN_S)
    except (ray.exceptions.RayError, asyncio.TimeoutError):
        return False
    return True
