"""The prefix cache of one simulated engine: whose KV blocks are in memory, in use or only kept until they are needed.

A prompt is a chain of spans (nodes of the batch's prefix tree); a finished turn leaves its session's blocks behind.

Invariants: a span in use is never evicted; spans that nobody uses leave in the order of their last use, the end of a
chain before its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from verl_rlhfless.policy.perf import BLOCK_TOKENS


class Cached(Protocol):
    """What the cache asks of a request."""

    sample: int
    chain: tuple[tuple[int, int], ...]

    @property
    def context_tokens(self) -> int:
        """Prompt and generated tokens."""


class PrefixCache:
    """Full blocks by span.

    Attributes:
        shared_blocks: Blocks that are counted once for each request that uses them, beyond the first.
        idle_blocks: Blocks that no request uses.
    """

    def __init__(self) -> None:
        self.shared_blocks = 0
        self.idle_blocks = 0
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, int] = OrderedDict()

    def find(self, request: Cached) -> tuple[int, int]:
        """Return the tokens of a request that are in memory, and the blocks among them that others use now."""
        found = used = 0
        for span, blocks in request.chain:
            if span in self._users:
                used += blocks
            elif span not in self._idle:
                return found * BLOCK_TOKENS, used
            found += blocks
        if _session(request) in self._idle:
            return request.context_tokens // BLOCK_TOKENS * BLOCK_TOKENS, used
        return found * BLOCK_TOKENS, used

    def hold(self, request: Cached) -> None:
        """Note that an admitted request uses its chain."""
        for span, blocks in request.chain:
            users = self._users.get(span, 0)
            if users:
                self.shared_blocks += blocks
            else:
                self._wake(span)
            self._users[span] = users + 1
        self._wake(_session(request))

    def drop(self, request: Cached, *, keeps_session: bool = False) -> None:
        """Note that a request has left; with ``keeps_session`` what it generated stays for its next turn."""
        if keeps_session:
            prompt = sum(blocks for _, blocks in request.chain)
            self._rest(_session(request), request.context_tokens // BLOCK_TOKENS - prompt)
        for span, blocks in reversed(request.chain):
            users = self._users[span] - 1
            if users:
                self._users[span] = users
                self.shared_blocks -= blocks
            else:
                del self._users[span]
                self._rest(span, blocks)

    def evict(self, limit_blocks: int) -> None:
        """Forget idle spans until at most ``limit_blocks`` are left."""
        while self._idle and self.idle_blocks > limit_blocks:
            self.idle_blocks -= self._idle.popitem(last=False)[1]

    def _rest(self, span: int, blocks: int) -> None:
        self._idle[span] = blocks
        self.idle_blocks += blocks

    def _wake(self, span: int) -> None:
        if span in self._idle:
            self.idle_blocks -= self._idle.pop(span)


def _session(request: Cached) -> int:
    """Return the span of what a sample has generated; prompt spans are not negative."""
    return ~request.sample
