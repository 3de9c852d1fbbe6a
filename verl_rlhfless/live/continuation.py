"""One response out of several attempts: tokens and log-probs one after the other, and the budget that is left.

Invariant: ``len(tokens) == len(log_probs) <= budget`` where log-probs were asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from verl.workers.rollout.replica import TokenOutput

from verl_rlhfless.errors import ReplicaError

_COUNTS = ("spec_num_draft_tokens", "spec_num_accepted_tokens", "spec_num_verify_steps")  # verl's, of a drafter


class Continuation:
    """Collects the outputs of a turn.

    Args:
        budget: Most tokens of the turn, all attempts together.
        has_log_probs: The request asks for the log-prob of each token.

    Attributes:
        is_resumable: What an attempt that ended early generated is kept; else the next one begins anew.
    """

    def __init__(self, budget: int, has_log_probs: bool) -> None:
        self.tokens: list[int] = []
        self.is_resumable = True
        self._budget = budget
        self._log_probs: list[float] | None = [] if has_log_probs else None
        self._experts: Any = None
        self._num_preempted: int | None = None
        self._versions: list[int] = []
        self._fields: dict[str, Any] = {}

    @property
    def budget_left(self) -> int:
        """Tokens that the turn may still have."""
        return self._budget - len(self.tokens)

    def add(self, output: TokenOutput) -> None:
        """Append what one attempt generated.

        Raises:
            ReplicaError: It breaks the invariant.
        """
        tokens, log_probs = list(output.token_ids), list(output.log_probs or [])
        if self._log_probs is not None:
            self._log_probs += log_probs
        self.tokens += tokens
        if len(self.tokens) > self._budget or (
            self._log_probs is not None and len(self._log_probs) != len(self.tokens)
        ):
            raise ReplicaError(
                f"a server returned {len(tokens)} tokens and {len(log_probs)} log-probs, and the response then has "
                f"{len(self.tokens)} of at most {self._budget} tokens. This is a fault of the server."
            )
        self._add_experts(output.routed_experts, len(tokens))
        if output.num_preempted is not None:
            self._num_preempted = (self._num_preempted or 0) + output.num_preempted
        fields = dict(output.extra_fields)
        version = fields.pop("global_steps", None)
        if version is not None:
            self._versions.append(version)
        # the first prefill is the prompt's, a drafter's counts add up; what follows describes the last attempt
        first = {key: self._fields[key] for key in ("num_cached_tokens",) if key in self._fields}
        counted = {
            key: fields.get(key, 0) + self._fields.get(key, 0) for key in _COUNTS if key in fields | self._fields
        }
        self._fields = {**fields, **first, **counted}

    def result(self, stop_reason: str | None) -> TokenOutput:
        """Return the whole response."""
        first, last = (min(self._versions), max(self._versions)) if self._versions else (None, None)
        return TokenOutput(
            token_ids=self.tokens,
            log_probs=self._log_probs,
            routed_experts=self._experts,
            stop_reason=stop_reason,
            num_preempted=self._num_preempted,
            extra_fields={
                **self._fields,
                "global_steps": last,
                "min_global_steps": first,
                "max_global_steps": last,
            },
        )

    def _add_experts(self, experts: Any, num_tokens: int) -> None:
        """Append the routing of new tokens; an attempt's routing covers its prompt too."""
        if experts is None or not num_tokens:
            return
        self._experts = experts if self._experts is None else np.concatenate([self._experts, experts[-num_tokens:]])
