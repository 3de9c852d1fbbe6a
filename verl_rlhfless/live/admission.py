"""What runs on one server, and what more fits: admission by running requests and by predicted keys and values."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from verl_rlhfless.live.tickets import ServerLimits

_MAX_SESSIONS = 10_000


@dataclass(slots=True, eq=False)
class ServerLoad:
    """The requests of one server.

    Attributes:
        name: The server's id in the router.
        limits: What fits at once.
        num_foreign: Requests of clients that only acquire and release, as stock's do.
        is_open: Whether it takes new work; a server that drains does not.
    """

    name: str
    limits: ServerLimits
    num_foreign: int = 0
    is_open: bool = True
    _reserved: dict[str, int] = field(default_factory=dict)
    _context: dict[str, int] = field(default_factory=dict)
    _reserved_tokens: int = 0
    _context_tokens: int = 0

    @property
    def num_requests(self) -> int:
        """Requests on the server."""
        return len(self._reserved) + self.num_foreign

    @property
    def context_tokens(self) -> int:
        """Tokens that the known requests hold now."""
        return self._context_tokens

    def admits(self, tokens: int) -> bool:
        """Return whether a request that will hold ``tokens`` in the end fits; an empty server takes any."""
        if not self._reserved:
            return True
        most, room = self.limits.max_num_seqs, self.limits.kv_tokens
        return (most is None or len(self._reserved) < most) and (room is None or self._reserved_tokens + tokens <= room)

    def has_room_for(self, num_requests: int) -> bool:
        """Return whether so many more may run at once, whatever their length."""
        most = self.limits.max_num_seqs
        return most is None or len(self._reserved) + num_requests <= most

    def enter(self, attempt: str, context: int, tokens: int) -> None:
        """Add an attempt that holds ``context`` tokens now and is expected to hold ``tokens`` in the end."""
        self._reserved[attempt], self._context[attempt] = tokens, context
        self._reserved_tokens += tokens
        self._context_tokens += context

    def grow(self, attempt: str, context: int) -> None:
        """Note what an attempt holds now; one that outgrows its prediction reserves what it has."""
        self._context_tokens += context - self._context[attempt]
        self._context[attempt] = context
        beyond = max(0, context - self._reserved[attempt])
        self._reserved[attempt] += beyond
        self._reserved_tokens += beyond

    def leave(self, attempt: str) -> None:
        """Remove an attempt."""
        self._reserved_tokens -= self._reserved.pop(attempt)
        self._context_tokens -= self._context.pop(attempt)


class ServerPool:
    """All servers that take requests, and those that only finish theirs."""

    def __init__(self) -> None:
        self.loads: dict[str, ServerLoad] = {}
        self._homes: OrderedDict[str, str] = OrderedDict()

    @property
    def has_open(self) -> bool:
        """Whether any server takes new work."""
        return any(load.is_open for load in self.loads.values())

    def add(self, name: str, limits: ServerLimits) -> None:
        """Let a server take requests; one that is known keeps those that it has."""
        load = self.loads.setdefault(name, ServerLoad(name, limits))
        load.limits, load.is_open = limits, True

    def forget_if_done(self, name: str) -> None:
        """Forget a server that drains and has no request left."""
        load = self.loads.get(name)
        if load is not None and not load.is_open and not load.num_requests:
            del self.loads[name]

    def home(self, session: str, needs_room: bool) -> ServerLoad | None:
        """Return the server of the session's last turn if that one is a choice, else the one with the fewest requests.

        The choice is among open servers; with ``needs_room`` among those that can run one more request now. Ties go by
        name; ``None`` where there is no choice.
        """
        may_go = [x for x in self.loads.values() if x.is_open and (x.has_room_for(1) or not needs_room)]
        if not may_go:
            return None
        last = self.loads.get(self._homes.pop(session, ""))
        load = last if last in may_go else min(may_go, key=lambda x: (x.num_requests, x.name))
        self._homes[session] = load.name
        if len(self._homes) > _MAX_SESSIONS:
            self._homes.popitem(last=False)
        return load

    def acquire(self, session: str) -> str | None:
        """Return the server for one more request of a client that tells no more; ``None`` while there is none."""
        load = self.home(session, needs_room=False)
        if load is None:
            return None
        load.num_foreign += 1
        return load.name

    def release(self, name: str) -> None:
        """End a request that was acquired."""
        load = self.loads.get(name)
        if load is not None and load.num_foreign:
            load.num_foreign -= 1
            self.forget_if_done(name)

    def forget_sessions(self) -> int:
        """Let every session choose its server anew; return how many there were."""
        count = len(self._homes)
        self._homes.clear()
        return count
