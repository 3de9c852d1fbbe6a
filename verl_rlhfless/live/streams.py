"""The token streams of one engine: what each running request has so far, cuts, and the engine's death.

Invariants: what is reported of a request never includes its end, so that an end that did not get through is sampled
again rather than continued past; a stream always ends with an output, also when its engine dies.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.exceptions import EngineDeadError

from verl_rlhfless.live.tickets import Delta, Part

_MAX_EARLY_CUTS = 100_000


@dataclass(slots=True)
class _Stream:
    """A running request: its latest output, the tokens in it, and how many of them were reported."""

    latest: RequestOutput | None = None
    num_tokens: int = 0
    num_reported: int = 0
    is_cut: bool = False


class EngineStreams:
    """Stands in front of ``AsyncLLM.generate``.

    Args:
        engine: A vLLM engine; its ``generate`` is replaced.
    """

    def __init__(self, engine: Any) -> None:
        self.is_dead = False
        self._engine = engine
        self._generate = engine.generate
        self._running: dict[str, _Stream] = {}
        self._early_cuts: OrderedDict[str, None] = OrderedDict()
        engine.generate = self.generate

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yield the engine's outputs; after a cut or the engine's death the last one has finish reason ``abort``.

        Callers: verl's server, and vLLM's HTTP endpoints, which name no argument of the first three.
        """
        stream = _Stream()
        if request_id in self._early_cuts:
            del self._early_cuts[request_id]
            yield _aborted(request_id, stream)
            return
        self._running[request_id] = stream
        try:
            async for output in self._generate(prompt, sampling_params, request_id, **kwargs):
                if not output.finished:
                    stream.latest, stream.num_tokens = output, len(output.outputs[0].token_ids)
                yield output
                if stream.is_cut and not output.finished:
                    await self._engine.abort([request_id])  # the first call came before the engine knew the request
        except EngineDeadError:
            self.is_dead = True
            yield _aborted(request_id, stream)
        finally:
            del self._running[request_id]

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End requests with what they have; one that is not here yet ends as soon as it comes."""
        known = []
        for request_id in request_ids:
            stream = self._running.get(request_id)
            if stream is not None:
                stream.is_cut = True
                known.append(request_id)
            else:
                self._early_cuts[request_id] = None
                if len(self._early_cuts) > _MAX_EARLY_CUTS:
                    self._early_cuts.popitem(last=False)
        if known and not self._engine.errored:
            await self._engine.abort(known)

    async def abort_all(self) -> None:
        """End every request with what it has."""
        await self.abort(list(self._running))

    def take(self, version: int | None) -> Delta:
        """Return what was generated since the last call."""
        parts = [self._take(request_id, stream) for request_id, stream in self._running.items()]
        is_dead = self.is_dead or self._engine.errored
        return Delta(tuple(part for part in parts if part.tokens), version, is_dead)

    def put_back(self, delta: Delta) -> None:
        """Report again what did not get through: what comes after a gap is of no use to anyone."""
        for part in delta.parts:
            stream = self._running.get(part.attempt)
            if stream is not None:
                stream.num_reported = part.start

    def _take(self, request_id: str, stream: _Stream) -> Part:
        if stream.latest is None:
            return Part(request_id, 0, [], [])
        new = slice(stream.num_reported, stream.num_tokens)
        completion = stream.latest.outputs[0]
        tokens = list(completion.token_ids[new])
        log_probs = [
            entry[token].logprob for entry, token in zip((completion.logprobs or [])[new], tokens, strict=False)
        ]
        part = Part(request_id, stream.num_reported, tokens, log_probs)
        stream.num_reported = stream.num_tokens
        return part


def _aborted(request_id: str, stream: _Stream) -> RequestOutput:
    """Return the output of a request that ends with what it yielded so far; vLLM's own lists may be ahead of that."""
    outputs, latest = [], stream.latest
    if latest is not None:
        tokens, log_probs = latest.outputs[0].token_ids, latest.outputs[0].logprobs
        kept = slice(stream.num_tokens)
        log_probs = log_probs[kept] if log_probs is not None else None
        ended = dataclasses.replace(latest.outputs[0], token_ids=list(tokens[kept]), logprobs=log_probs)
        ended.finish_reason = "abort"
        outputs.append(ended)
    cached = latest.num_cached_tokens if latest is not None else None
    return RequestOutput(request_id, None, [], None, outputs, finished=True, num_cached_tokens=cached)
