"""What one engine iteration computes, read from vLLM's scheduler output.

Invariant: over the life of a request its ``sampled_tokens`` add up to the tokens of its response, and it is counted as
finished exactly once. Speculative decoding is the exception: the scheduler output does not tell the accepted drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Iteration:
    """One call of the engine's workers.

    Attributes:
        num_requests: Requests that are computed; 0 when the call only reports finished ones.
        num_continued: Those of them that an earlier iteration already computed.
        num_running: Requests that started and have not finished, computed in this iteration or not.
        num_finished: Requests that ended since the last iteration, aborted ones included.
        prefill_tokens: Prompt tokens computed (after a preemption: recomputed tokens too).
        context_tokens: Tokens that attention reads, summed over the requests.
        sampled_tokens: Response tokens that come out, the first of each response included.
    """

    num_requests: int
    num_continued: int
    num_running: int
    num_finished: int
    prefill_tokens: int
    context_tokens: int
    sampled_tokens: int


class RequestTable:
    """The running requests of one engine, by the length of their prompts."""

    def __init__(self) -> None:
        self._prompt_tokens: dict[str, int] = {}

    def observe(self, scheduler_output: Any) -> Iteration:
        """Return what the iteration described by vLLM's ``SchedulerOutput`` computes, and remember its requests."""
        # First what ended: an id may be used again in the same output.
        ended = [self._prompt_tokens.pop(name, None) for name in scheduler_output.finished_req_ids]
        scheduled: dict[str, int] = scheduler_output.num_scheduled_tokens
        prefill_tokens = context_tokens = sampled_tokens = 0
        for request in scheduler_output.scheduled_new_reqs:
            num_tokens, computed = scheduled[request.req_id], request.num_computed_tokens
            self._prompt_tokens[request.req_id] = _prompt_length(request)
            prefill_tokens += num_tokens
            context_tokens += computed + num_tokens
            sampled_tokens += computed + num_tokens >= _known_length(request)
        cached = scheduler_output.scheduled_cached_reqs
        for name, computed, output_tokens in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            num_tokens = scheduled[name]
            known = self._prompt_tokens[name] + output_tokens
            is_decode = num_tokens == 1 and output_tokens > 0
            prefill_tokens += 0 if is_decode else num_tokens
            context_tokens += computed + num_tokens
            sampled_tokens += computed + num_tokens >= known
        return Iteration(
            num_requests=len(scheduled),
            num_continued=len(cached.req_ids),
            num_running=len(self._prompt_tokens),
            num_finished=len(ended) - ended.count(None),
            prefill_tokens=prefill_tokens,
            context_tokens=context_tokens,
            sampled_tokens=sampled_tokens,
        )


def _prompt_length(request: Any) -> int:
    """Return the prompt's tokens; a prompt given as embeddings has no token ids."""
    return len(request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids)


def _known_length(request: Any) -> int:
    """Return prompt plus response tokens so far; vLLM's second model runner sends a preempted request as a new one."""
    return _prompt_length(request) if request.prefill_token_ids is None else len(request.prefill_token_ids)
