"""Tokens and log-probs so far of every running request, kept outside the replica that makes them.

Invariants: an entry exists from the grant of an attempt to its report, so memory is bounded by what runs; tokens are
taken in order and once, so a report that comes twice changes nothing; what is held is always a prefix of what the
engine sampled.
"""

from __future__ import annotations

from verl_rlhfless.live.tickets import Delta, Part, Progress


class Journal:
    """What is safe of each running attempt."""

    def __init__(self) -> None:
        self._entries: dict[str, Progress] = {}

    def open(self, attempt: str) -> None:
        """Begin to keep what an attempt generates."""
        self._entries[attempt] = Progress([], [], None)

    def close(self, attempt: str) -> None:
        """Drop what is held of an attempt; reports that are still on their way are ignored from now on."""
        self._entries.pop(attempt, None)

    def add(self, delta: Delta) -> dict[str, int]:
        """Take a server's report, and return how many tokens each attempt in it has by now."""
        return {part.attempt: num for part in delta.parts if (num := self._extend(part, delta.version)) is not None}

    def read(self, attempt: str) -> Progress:
        """Return what is held of an attempt; nothing of one that is unknown."""
        return self._entries.get(attempt, Progress([], [], None))

    def __len__(self) -> int:
        return len(self._entries)

    def _extend(self, part: Part, version: int | None) -> int | None:
        entry = self._entries.get(part.attempt)
        if entry is None or part.start > len(entry.tokens):
            return None
        known = len(entry.tokens) - part.start
        entry.tokens.extend(part.tokens[known:])
        entry.log_probs.extend(part.log_probs[known:])
        entry.version = version
        return len(entry.tokens)
