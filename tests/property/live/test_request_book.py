"""Promise 1 of the request book: whatever is cut, drained, lost or reported twice, every sample completes once.

The machine plays the world: clients that submit turns and report, servers that generate, and a control loop that
places samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from verl_rlhfless.live.request_book import RequestBook
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.tickets import Grant, Outcome, OutcomeKind, SampleKey, ServerLimits, Ticket
from verl_rlhfless.policy.snapshot import FINISHED, GONE, HELD, READY, Batch

MAX_SEQS, KV_TOKENS, PROMPT_TOKENS, MAX_TOKENS = 3, 60, 5, 12


@dataclass
class Session:
    """One sample's client: its turns, and what it holds of the present one."""

    key: SampleKey
    targets: list[int]
    ticket: str = ""
    tokens: list[int] = field(default_factory=list)
    is_over: bool = False


@dataclass
class Attempt:
    """A request in an engine: ``base`` tokens came with it, ``made`` are new, ``journaled`` of them are safe."""

    session: Session
    grant: Grant
    base: int
    made: int = 0
    journaled: int = 0
    is_cut: bool = False


class Requests(RuleBasedStateMachine):
    @initialize(groups=st.integers(1, 4), n=st.integers(1, 4), turns=st.integers(1, 3), data=st.data())
    def begin(self, groups: int, n: int, turns: int, data: Any) -> None:
        self.book = RequestBook(max_retries=10**6)
        count = groups * n
        keys = tuple(SampleKey(f"g{i // n}", i % n) for i in range(count))
        targets = data.draw(st.lists(st.integers(1, MAX_TOKENS), min_size=count * turns, max_size=count * turns))
        self.sessions = [Session(key, targets[i * turns : (i + 1) * turns]) for i, key in enumerate(keys)]
        batch = Batch(
            step=1,
            prompt_ids=tuple(f"g{i}" for i in range(groups)),
            group_of=np.arange(count) // n,
            prompt_tokens=np.full(count, PROMPT_TOKENS),
            max_response_tokens=MAX_TOKENS,
        )
        rank = np.array(data.draw(st.permutations(range(count))))
        pool: Any = None  # nothing here asks for it
        self.book.begin(Rollout(batch, keys, rank, np.full(count, float(MAX_TOKENS)), pool))
        self.attempts: dict[str, Attempt] = {}
        self.over: list[Outcome] = []
        self.stray: list[Attempt] = []  # running on a server that is declared dead
        self.num_servers = self.num_tickets = 0
        self.add_server()

    # ---- replicas

    def add_server(self) -> int:
        """A new replica that is up; return its number."""
        self.num_servers += 1
        name = f"s{self.num_servers}"
        self.book.servers.add(name, ServerLimits(MAX_SEQS, KV_TOKENS))
        return self.book.add_replica(1, name)

    @precondition(lambda self: self.num_servers < 5)
    @rule()
    def scale_up(self) -> None:
        self.add_server()

    @rule(data=st.data())
    def starting_replica_comes_up_or_fails(self, data: Any) -> None:
        replica = self.book.add_replica(1)
        waiting = np.flatnonzero(self.book.view(0.0).state == HELD)
        self.book.place(waiting, replica)
        if data.draw(st.booleans()):
            self.book.lose_replica(replica)
        else:
            self.num_servers += 1
            self.book.servers.add(f"s{self.num_servers}", ServerLimits(MAX_SEQS, KV_TOKENS))
            self.book.replica_ready(replica, f"s{self.num_servers}")

    def replicas(self, *states: str) -> list[int]:
        return [entry.replica for entry in self.book.view(0.0).replicas if entry.state in states]

    @rule(data=st.data())
    def drain(self, data: Any) -> None:
        if ready := self.replicas(READY):
            self.book.drain_replica(data.draw(st.sampled_from(ready)))

    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        if every := self.replicas(READY, GONE):
            self.book.lose_replica(data.draw(st.sampled_from(every)))
            lost = [attempt for attempt in self.attempts.values() if self.book.server_of(attempt.grant.attempt) is None]
            for attempt in lost:
                del self.attempts[attempt.grant.attempt]
                self.stray.append(attempt)

    # ---- control

    @rule(data=st.data())
    def place(self, data: Any) -> None:
        view = self.book.view(0.0)
        if open_replicas := self.replicas(READY):
            samples = data.draw(st.lists(st.sampled_from(range(len(view.state))), unique=True))
            self.send(samples, data.draw(st.sampled_from(open_replicas)))

    def send(self, samples: list[int], replica: int) -> None:
        for cut in self.book.place(np.array(samples, dtype=np.int64), replica):
            for attempt in cut.attempts:
                assert self.attempts[attempt].grant.server == cut.server
                self.attempts[attempt].is_cut = True

    # ---- clients

    @rule(data=st.data(), num=st.integers(1, 6))
    def submit(self, data: Any, num: int) -> None:
        idle = [session for session in self.sessions if not session.ticket and not session.is_over]
        for session in idle[:num]:
            self.num_tickets += 1
            session.ticket, session.tokens = f"t{self.num_tickets}", []
            ticket = Ticket(session.ticket, "w", session.key.uid, session.key, PROMPT_TOKENS)
            self.book.submit(ticket)
            if data.draw(st.booleans()):
                self.book.submit(ticket)  # a repeated message

    @rule()
    def pump(self) -> None:
        for grant in self.book.grants():
            session = next(session for session in self.sessions if session.ticket == grant.ticket)
            assert grant.attempt not in self.attempts
            assert not any(a.grant.ticket == grant.ticket for a in self.attempts.values()), "two attempts at once"
            assert len(session.tokens) < session.targets[0], "no budget is left"
            self.attempts[grant.attempt] = Attempt(session, grant, len(session.tokens))

    @rule(data=st.data(), num=st.integers(1, 5), is_reported=st.booleans())
    def generate(self, data: Any, num: int, is_reported: bool) -> None:
        for attempt in list(self.attempts.values()):
            left = attempt.session.targets[0] - attempt.base - attempt.made
            attempt.made += min(num, left)
            if attempt.made and is_reported:
                attempt.journaled = attempt.made
                self.book.progress(attempt.grant.attempt, attempt.made)

    @rule(data=st.data())
    def answer(self, data: Any) -> None:
        """A server answers: with all tokens, or with those before the cut."""
        if not self.attempts:
            return
        attempt = self.attempts[data.draw(st.sampled_from(sorted(self.attempts)))]
        is_complete = attempt.base + attempt.made == attempt.session.targets[0]
        if is_complete or attempt.is_cut or data.draw(st.booleans()):
            del self.attempts[attempt.grant.attempt]
            self.report(attempt, OutcomeKind.DONE if is_complete else OutcomeKind.CUT, attempt.made)

    @rule(data=st.data())
    def client_of_lost_server_reports(self, data: Any) -> None:
        if self.stray:
            attempt = self.stray.pop(data.draw(st.integers(0, len(self.stray) - 1)))
            if attempt.base + attempt.made == attempt.session.targets[0] and data.draw(st.booleans()):
                self.report(attempt, OutcomeKind.DONE, attempt.made)  # its last answer got through
            else:
                made = attempt.made if data.draw(st.booleans()) else attempt.journaled
                self.report(attempt, OutcomeKind.LOST, made)

    def report(self, attempt: Attempt, kind: OutcomeKind, num: int) -> None:
        session = attempt.session
        session.tokens += [attempt.base + i for i in range(num)]
        assert session.tokens == list(range(len(session.tokens))), "a token twice, or one left out"
        if len(session.tokens) == session.targets[0]:
            kind = OutcomeKind.DONE  # the budget is used up: nothing is left to ask for
        outcome = Outcome(session.ticket, attempt.grant.attempt, kind, len(session.tokens))
        self.book.finish(outcome)
        self.over.append(outcome)
        if kind is OutcomeKind.DONE:
            session.targets.pop(0)
            session.ticket = ""
            if not session.targets:
                session.is_over = True
                self.book.end(session.key)

    @rule(data=st.data())
    def late_report(self, data: Any) -> None:
        if self.over:
            before = self.book.num_late
            self.book.finish(data.draw(st.sampled_from(self.over)))
            assert self.book.num_late == before + 1

    @rule(data=st.data())
    def session_ends_twice(self, data: Any) -> None:
        for session in self.sessions:
            if session.is_over and data.draw(st.booleans()):
                self.book.end(session.key)

    @rule(data=st.data())
    def agent_gives_up(self, data: Any) -> None:
        """An agent loop that fails ends its sample; whatever runs of it is nobody's any more."""
        session = data.draw(st.sampled_from(self.sessions))
        if not session.is_over and data.draw(st.integers(0, 4)) == 0:
            for attempts in (self.attempts, dict(enumerate(self.stray))):
                for attempt in [a for a in attempts.values() if a.session is session]:
                    self.attempts.pop(attempt.grant.attempt, None)
                    self.stray = [a for a in self.stray if a is not attempt]
            session.is_over = True
            self.book.end(session.key)

    # ---- what must hold

    @invariant()
    def admission_is_kept(self) -> None:
        for load in self.book.servers.loads.values():
            assert load.num_requests <= MAX_SEQS
            assert load.context_tokens <= KV_TOKENS or load.num_requests == 1

    @invariant()
    def the_view_agrees_with_the_world(self) -> None:
        view = self.book.view(0.0)
        for sample, session in enumerate(self.sessions):
            assert (view.state[sample] == FINISHED) == session.is_over
            is_placed = view.replica_of[sample] >= 0
            assert is_placed != (view.state[sample] == HELD) or session.is_over
        waiting = [sum((view.state == 1) & (view.replica_of == entry.replica)) for entry in view.replicas]
        assert waiting == [entry.num_waiting for entry in view.replicas]

    def teardown(self) -> None:
        """With one replica up, everything completes."""
        if not hasattr(self, "book"):
            return
        replica = self.add_server()
        for _ in range(40 * len(self.sessions)):
            held = np.flatnonzero(self.book.view(0.0).state == HELD)
            self.send(held.tolist(), replica)
            for attempt in self.stray:
                self.report(attempt, OutcomeKind.LOST, attempt.journaled)
            self.stray = []
            for session in self.sessions:
                if not session.ticket and not session.is_over:
                    self.num_tickets += 1
                    session.ticket, session.tokens = f"t{self.num_tickets}", []
                    self.book.submit(Ticket(session.ticket, "w", session.key.uid, session.key, PROMPT_TOKENS))
            self.pump()
            for attempt in list(self.attempts.values()):
                del self.attempts[attempt.grant.attempt]
                self.report(attempt, OutcomeKind.DONE, attempt.session.targets[0] - attempt.base)
            if self.book.is_done:
                return
        raise AssertionError("samples wait for ever while a replica is up")


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
