"""One sample on its way through simulated engines.

Invariant: ``generated <= target``; a request is on at most one engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_rlhfless.policy.perf import BLOCK_TOKENS


@dataclass(slots=True, eq=False)
class Request:
    """One sample on its way through engines.

    Attributes:
        sample: Id of the sample.
        prompt_tokens: Length of its prompt.
        target: Tokens after which it leaves; known to the engine only (when end-of-sequence or a tool call comes).
        chain: Spans of its prompt, ``(node of the prefix tree, full blocks)`` from the root down.
        is_last_turn: Whether it is complete then; else it comes back for another turn.
        generated: Tokens so far.
        has_kv: Its keys and values came from a pool or over the network and need no recomputation.
        due_iteration: While it decodes, the iteration of its engine that ends its turn.
        to_compute: While it is in prefill, tokens that are left to compute.
        start_context: Tokens of its context before these.
    """

    sample: int
    prompt_tokens: int
    target: int
    chain: tuple[tuple[int, int], ...]
    is_last_turn: bool = True
    generated: int = 0
    has_kv: bool = False
    due_iteration: int = 0
    to_compute: int = 0
    start_context: int = 0

    @property
    def context_tokens(self) -> int:
        """Prompt and generated tokens."""
        return self.prompt_tokens + self.generated

    def take(self, budget: int) -> tuple[int, int]:
        """Compute up to ``budget`` tokens next; return how many, and the summed context they attend to."""
        chunk, start = min(self.to_compute, budget), self.start_context
        self.to_compute -= chunk
        self.start_context += chunk
        return chunk, chunk * start + chunk * (chunk + 1) // 2


def chain_of(ends: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return a request's chain in full blocks from ``(node, tokens at its end)`` pairs, root first."""
    full = [end // BLOCK_TOKENS for _, end in ends]
    return tuple((node, upto - before) for (node, _), upto, before in zip(ends, full, [0, *full[:-1]], strict=True))
