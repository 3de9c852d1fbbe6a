"""What travels between agent-loop workers, the router and the servers.

A *ticket* is one turn of one session that wants tokens. Each *attempt* at it runs on one server under an id of its
own, so that a late word about an old attempt is never taken for news. Light to import: every process loads it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

ENGINE_DEAD = "engine_dead"
"""Extra field of a server's output that ended because the engine died."""


class SampleKey(NamedTuple):
    """One of the ``n`` responses to a prompt: verl's ``uid`` of the prompt and its session number."""

    uid: str
    session: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request for one turn.

    Attributes:
        id: Unique among the open tickets.
        worker: Process that waits for the grant.
        session: Id that all turns of one conversation share.
        sample: Which sample of the announced rollout this is; ``None`` for anything else, validation for instance.
        prompt_tokens: Length of what the turn starts from, earlier turns included.
    """

    id: str
    worker: str
    session: str
    sample: SampleKey | None
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to start an attempt; ``attempt`` is also the request's id in the engine."""

    ticket: str
    worker: str
    attempt: str
    server: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket that will never be granted, and why."""

    ticket: str
    worker: str
    reason: str


class OutcomeKind(str, enum.Enum):
    """How an attempt ended.

    ``CUT``: the engine aborted it, tokens so far are kept. ``AWAY``: its server was out of reach and answers again.
    ``LOST``: its engine or server died. ``FAILED``: the request's own fault, or nobody wants it any more.
    """

    DONE = "done"
    CUT = "cut"
    AWAY = "away"
    LOST = "lost"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker reports about an attempt.

    Attributes:
        ticket: The turn.
        attempt: The attempt that ended; empty when none was granted.
        kind: How it ended. After ``CUT``, ``AWAY`` and ``LOST`` the ticket waits again at once.
        generated: Tokens of this turn so far, all attempts together.
        detail: What is known about a failure.
    """

    ticket: str
    attempt: str
    kind: OutcomeKind
    generated: int
    detail: str = ""


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """The last word about a sample: no further turn comes."""

    sample: SampleKey


Message = Ticket | Outcome | SessionEnd


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a worker may start and must give up, since its last call that says it has come.

    Attributes:
        first: Number of the first item.
        items: In order; a grant comes with the handle of its server.
    """

    first: int
    items: tuple[tuple[Grant | Refusal, Any], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """New tokens of one attempt.

    Attributes:
        attempt: Which attempt.
        start: How many tokens of the attempt came before these.
        tokens: Token ids.
        log_probs: One for each token; empty when the request did not ask for them.
    """

    attempt: str
    start: int
    tokens: list[int]
    log_probs: list[float]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one server generated since its last report.

    Attributes:
        parts: New tokens of each running attempt that has any.
        version: Weight version that they come from.
        is_dead: The engine died; nothing more will come.
    """

    parts: tuple[Part, ...]
    version: int | None
    is_dead: bool = False


@dataclass(slots=True)
class Progress:
    """What the journal holds of an attempt: tokens, their log-probs (if asked for), and the weight version."""

    tokens: list[int]
    log_probs: list[float]
    version: int | None


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one server runs at once: requests, and tokens of keys and values; ``None`` = not known, no limit."""

    max_num_seqs: int | None = None
    kv_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Attempts that a server must abort, so that they continue elsewhere."""

    server: str
    attempts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What a run tells its router.

    Attributes:
        progress_interval_s: Time between two reports of a replica.
        max_retries: How often a turn survives the death of its engine or server.
        stranded_timeout_s: How long a request waits while no replica is up or starting.
        is_deterministic: The recipe sets ``rollout.full_determinism``.
    """

    progress_interval_s: float = 0.5
    max_retries: int = 3
    stranded_timeout_s: float = 60.0
    is_deterministic: bool = False
