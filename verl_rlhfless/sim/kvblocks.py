"""KV memory of one simulated engine in blocks of 16 tokens.

Every decoding request grows by one token an iteration; how many blocks that takes follows from how many requests
stand at each of the 16 places inside a block, so that no request has to be visited. Blocks are counted as if every
layer kept all of them; how many of these an engine holds depends on the requests, where layers keep windows or states.

Invariant: blocks in use never exceed the capacity when iterations stay within ``sure_iterations``.
"""

from __future__ import annotations

from collections.abc import Callable

from verl_rlhfless.policy.perf import BLOCK_TOKENS
from verl_rlhfless.sim.prefixcache import PrefixCache


class KvBlocks:
    """Blocks of the decoding requests, and those reserved for requests in prefill.

    Attributes:
        context_tokens: Summed context of the decoding requests.
    """

    def __init__(self, capacity: Callable[[int], int], prefixes: PrefixCache) -> None:
        """Begin empty; ``capacity`` returns the blocks that so many requests may have together."""
        self.context_tokens = 0
        self._capacity = capacity
        self._prefixes = prefixes
        self._count = 0
        self._iteration = 0
        self._phases = [0] * BLOCK_TOKENS  # requests by (context - iteration) modulo the block
        self._used: int | None = 0  # blocks of decoding requests; None = to be counted again
        self._reserved = self._num_reserved = 0

    # ---- decoding requests ----

    def add(self, context: int) -> None:
        """A request begins to decode with ``context`` tokens."""
        self._change(context, 1)

    def remove(self, context: int) -> None:
        """A decoding request leaves with ``context`` tokens."""
        self._change(context, -1)

    def _change(self, context: int, sign: int) -> None:
        self._count += sign
        self.context_tokens += sign * context
        self._phases[(context - self._iteration) % BLOCK_TOKENS] += sign
        if self._used is not None:
            self._used += sign * _blocks(context)

    def advance(self, iterations: int) -> None:
        """Every decoding request grows by ``iterations`` tokens."""
        self._used = self._used + self._at_boundary() if iterations == 1 and self._used is not None else None
        self._iteration += iterations
        self.context_tokens += iterations * self._count

    # ---- requests in prefill ----

    def reserve(self, context: int, in_use: int) -> bool:
        """Hold the blocks of a request and of its next token, ``in_use`` of which others hold already.

        Returns:
            Whether they fit beside one more token of every decoding request.
        """
        need = _blocks(context + 1)
        self._num_reserved += 1
        if need - in_use > self._free_at_least() and need - in_use > self._free():
            self._num_reserved -= 1
            return False
        self._reserved += need
        return True

    def unreserve(self, context: int) -> None:
        """Give up what ``reserve`` holds for a request of ``context`` tokens."""
        self._reserved -= _blocks(context + 1)
        self._num_reserved -= 1

    def evict(self) -> None:
        """Let idle prefixes go that the requests leave no room for."""
        if self._prefixes.idle_blocks and self._prefixes.idle_blocks > self._free_at_least():
            self._prefixes.evict(self._free())

    # ---- capacity ----

    @property
    def _held(self) -> int:
        """Blocks that the requests may have together."""
        return self._capacity(self._count + self._num_reserved)

    def in_use(self) -> int:
        """Return the blocks that the decoding requests hold."""
        if self._used is None:
            slack = sum(n * (-(phase + self._iteration) % BLOCK_TOKENS) for phase, n in enumerate(self._phases) if n)
            self._used = (self.context_tokens + slack) // BLOCK_TOKENS
        return self._used - self._prefixes.shared_blocks

    def _at_boundary(self) -> int:
        """Return how many requests need a new block for their next token."""
        return self._phases[-self._iteration % BLOCK_TOKENS]

    def sure_iterations(self) -> int:
        """Return how many decode iterations surely fit; 0 when not even one does."""
        free_tokens = (self._held - self._reserved + self._prefixes.shared_blocks) * BLOCK_TOKENS
        sure = (free_tokens - self.context_tokens) // self._count - (BLOCK_TOKENS - 1)
        return sure if sure >= 1 else int(self._free() >= 0)

    def _free(self) -> int:
        """Return the blocks that are free after one more iteration (idle prefixes count as free)."""
        return self._held - self.in_use() - self._at_boundary() - self._reserved

    def _free_at_least(self) -> int:
        """Return a lower bound of ``_free`` that needs no sum: every last block full but for one token."""
        most = (self.context_tokens + BLOCK_TOKENS * self._count) // BLOCK_TOKENS - self._prefixes.shared_blocks
        return self._held - most - self._reserved


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
