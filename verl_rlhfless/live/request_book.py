"""Every request of the router: who waits, who may start where, who runs, and what has to start again.

No clock, no Ray: time is passed in, and whatever the world must do is returned.

Invariants: a sample is finished exactly once, whatever is cut, lost or reported late; a ticket has at most one attempt
at a time; a server never runs more announced requests than it admits, unless a prediction was too short; while a
replica is open, no ticket that has a place waits for ever.
"""

from __future__ import annotations

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.admission import ServerLoad, ServerPool
from verl_rlhfless.live.samples import Replica, Rollout, SampleTable, Turn
from verl_rlhfless.live.tickets import Cut, Grant, Outcome, OutcomeKind, Refusal, SampleKey, Ticket
from verl_rlhfless.policy.snapshot import FINISHED, GONE, READY, RUNNING, STARTING, IntArray, RolloutView


class RequestBook:
    """The state of all requests. After each change, ``grants`` tells which attempts may start now.

    Others may read ``servers``, and change it by ``add``, ``acquire`` and ``release`` alone.

    Args:
        max_retries: How often a turn survives the death of its engine or server.
    """

    def __init__(self, max_retries: int = 3) -> None:
        self.max_retries = max_retries
        self.num_granted = self.num_late = 0
        self.servers = ServerPool()
        self._turns: dict[str, Turn] = {}
        self._attempts: dict[str, Turn] = {}
        self._loose: dict[str, Turn] = {}
        self._refusals: list[Refusal] = []
        self._table: SampleTable | None = None

    # ---- the rollout

    def begin(self, rollout: Rollout) -> None:
        """Announce the samples of a step: all are held until they are placed.

        Raises:
            ReplicaError: The rollout before is not complete.
        """
        if self._table is not None and self._table.num_left:
            raise ReplicaError(
                f"step {rollout.batch.step}: {self._table.num_left} samples of step {self._table.rollout.batch.step} "
                "are not complete, and a router serves one announced rollout at a time."
            )
        self._table = SampleTable(rollout)

    def settle(self) -> None:
        """Stop waiting for prompts that come first in the plan and were not submitted yet."""
        if self._table is not None:
            self._table.is_settled = True

    @property
    def is_done(self) -> bool:
        """Whether every announced sample is complete."""
        return self._table is None or not self._table.num_left

    def view(self, now_s: float, free_gpus: int = 0) -> RolloutView:
        """Return the announced rollout as policies see it. A replica that drains counts as gone."""
        return self._announced().view(now_s, free_gpus, self.servers.loads)

    def place(self, samples: IntArray, replica: int) -> tuple[Cut, ...]:
        """Send samples to a replica: waiting ones for free, running ones by the cuts that are returned."""
        table = self._announced()
        target = table.replicas[replica]
        cuts: dict[str, list[str]] = {}
        for sample in samples.tolist():
            turn = table.turn_of[sample]
            if table.state[sample] == RUNNING:
                assert turn is not None and turn.server is not None
                table.replica_of[sample] = replica
                if turn.server != target.server and not turn.is_cut:
                    turn.is_cut = True
                    cuts.setdefault(turn.server, []).append(turn.attempt)
            elif table.state[sample] != FINISHED:
                table.move(sample, replica)
        return tuple(Cut(server, tuple(attempts)) for server, attempts in cuts.items())

    def has_dry_replica(self) -> bool:
        """Return whether a ready replica has nothing to do while samples wait for another one."""
        table = self._announced()
        ready = [r for r in table.replicas if r.state == READY]
        has_dry = any(table.head(r) is None and not self._load(r).num_requests for r in ready)
        return has_dry and any(table.head(r) is not None for r in table.replicas)

    def num_idle_replicas(self) -> int:
        """Return how many ready replicas have nothing running and nothing waiting."""
        ready = [r for r in self._announced().replicas if r.state == READY]
        return sum(not r.num_waiting and not self._load(r).num_requests for r in ready)

    # ---- replicas and servers

    def spare_servers(self) -> list[str]:
        """Return the servers that take work and are no replica's of the rollout."""
        bound = {replica.server for replica in self._announced().replicas}
        return [name for name, load in self.servers.loads.items() if load.is_open and name not in bound]

    def serves(self, server: str) -> bool:
        """Return whether a server is a ready replica's."""
        return any(replica.server == server and replica.state == READY for replica in self._announced().replicas)

    def is_starting(self, replica: int) -> bool:
        """Return whether a replica waits for its server."""
        return self._announced().replicas[replica].state == STARTING

    def num_starting(self, tp: int) -> int:
        """Return how many replicas of this size wait for their server."""
        return sum(replica.state == STARTING and replica.tp == tp for replica in self._announced().replicas)

    def add_replica(self, tp: int, server: str | None = None) -> int:
        """Add a replica to the rollout and return its number; without a server it is still starting."""
        replicas = self._announced().replicas
        replicas.append(Replica(len(replicas), tp, READY if server else STARTING, server))
        return len(replicas) - 1

    def replica_ready(self, replica: int, server: str) -> None:
        """Name the server of a replica that has started."""
        entry = self._announced().replicas[replica]
        assert entry.state == STARTING and server in self.servers.loads, (entry.state, server)
        entry.state, entry.server = READY, server

    def drain_replica(self, replica: int) -> str | None:
        """Give a replica no more work, and return its server if it has one.

        What waits there is held, what runs there goes on.
        """
        entry = self._announced().replicas[replica]
        if entry.server is not None:
            self.drain_server(entry.server)
        else:
            self._announced().retire(entry)
        return entry.server

    def lose_replica(self, replica: int) -> None:
        """Note that a replica is dead: its samples are held, and their clients will report."""
        entry = self._announced().replicas[replica]
        if entry.server is not None:
            self.lose_server(entry.server)
        else:
            self._announced().retire(entry)

    def drain_server(self, server: str) -> None:
        """Give a server no more work; it is forgotten with its last request."""
        load = self.servers.loads.get(server)
        if load is not None:
            load.is_open = False
            self._retire(server)
            self.servers.forget_if_done(load.name)

    def lose_server(self, server: str) -> None:
        """Note that a server is dead."""
        load = self.servers.loads.pop(server, None)
        if load is None:
            return
        for turn in self._attempts.values():
            if turn.server != server:
                continue
            turn.server = None
            turn.is_cut = turn.is_cut or not load.is_open
            if turn.sample >= 0:
                self._lose_place(turn.sample, server)
        self._retire(server)

    # ---- requests

    def submit(self, ticket: Ticket) -> None:
        """Queue a turn. One that nobody announced goes to the server with the fewest requests that has room."""
        if ticket.id in self._turns:
            self.num_late += 1
            return
        sample = self._table.find(ticket.sample) if self._table is not None else -1
        if sample >= 0 and self._announced().turn_of[sample] is not None:
            sample = -1  # a second turn of the same session at the same time
        turn = self._turns[ticket.id] = Turn(ticket, sample)
        if sample >= 0:
            self._announced().open_turn(turn)
        else:
            self._loose[ticket.id] = turn

    def grants(self) -> list[Grant]:
        """Return every attempt that may start now, in the order in which they should."""
        granted = []
        for replica in self._table.replicas if self._table is not None else ():
            while replica.state == READY and (turn := self._announced().head(replica)) is not None:
                if not self._admits(replica, turn):
                    break
                self._announced().run(replica, turn)
                granted.append(self._grant(turn, self._load(replica), self._announced().predicted_tokens(turn)))
        for turn in list(self._loose.values()):
            home = self.servers.home(turn.ticket.session, needs_room=True)
            if home is None:
                break
            del self._loose[turn.ticket.id]
            granted.append(self._grant(turn, home, turn.ticket.prompt_tokens + turn.generated))
        return granted

    def progress(self, attempt: str, num_tokens: int) -> None:
        """Note how many tokens an attempt has so far."""
        turn = self._attempts.get(attempt)
        if turn is None or turn.server is None:
            return
        tokens = turn.generated + num_tokens
        self.servers.loads[turn.server].grow(attempt, turn.ticket.prompt_tokens + tokens)
        if turn.sample >= 0:
            self._announced().grow(turn, tokens)

    def finish(self, outcome: Outcome) -> None:
        """Take the end of an attempt; after a cut or a loss the turn waits again. Late and double ones are dropped."""
        turn = self._turns.get(outcome.ticket)
        if turn is None or turn.attempt != outcome.attempt:
            self.num_late += outcome.kind is not OutcomeKind.FAILED  # a client that gives up may cross a grant
            return
        is_planned = turn.is_cut or (turn.server is not None and not self.servers.loads[turn.server].is_open)
        is_hiccup = outcome.kind is OutcomeKind.AWAY and outcome.generated > turn.generated
        self._end_attempt(turn)
        turn.generated = outcome.generated
        if outcome.kind in (OutcomeKind.DONE, OutcomeKind.FAILED):
            self._close(turn)
            return
        turn.num_faults += not is_planned and not is_hiccup
        if turn.num_faults > self.max_retries:
            self._refuse(
                turn,
                f"its engine or server died {turn.num_faults} times (rlhfless.migration.max_retries="
                f"{self.max_retries}); the last time: {outcome.detail}",
            )
        elif turn.sample >= 0:
            self._announced().grow(turn, turn.generated)
            self._announced().wait_again(turn.sample)
        else:
            self._loose[turn.ticket.id] = turn

    def end(self, key: SampleKey) -> None:
        """Note that a sample gets no further turn: it is complete. Asking twice is one completion."""
        sample = self._table.find(key) if self._table is not None else -1
        if sample < 0:
            self.num_late += 1
            return
        turn = self._announced().turn_of[sample]
        if turn is not None:
            self._end_attempt(turn)
            self._close(turn)
        self._announced().finish(sample)

    def server_of(self, attempt: str) -> str | None:
        """Return where an attempt runs; ``None`` when it was reported, or its server is known to be gone."""
        turn = self._attempts.get(attempt)
        return turn.server if turn is not None else None

    @property
    def has_requests(self) -> bool:
        """Whether any ticket waits or runs."""
        return bool(self._turns)

    @property
    def is_stranded(self) -> bool:
        """Whether a ticket waits, and no server is open and none is starting."""
        replicas = self._table.replicas if self._table is not None and not self.is_done else []
        has_hope = self.servers.has_open or any(r.state == STARTING for r in replicas)
        return not has_hope and any(not turn.attempt for turn in self._turns.values())

    def refuse_waiting(self, reason: str) -> None:
        """Give up every ticket that waits."""
        for turn in [turn for turn in self._turns.values() if not turn.attempt]:
            self._refuse(turn, reason)

    def take_refusals(self) -> list[Refusal]:
        """Return the tickets that were given up since the last call."""
        taken, self._refusals = self._refusals, []
        return taken

    # ---- inside

    def _announced(self) -> SampleTable:
        assert self._table is not None, "no rollout was announced"
        return self._table

    def _load(self, replica: Replica) -> ServerLoad:
        assert replica.server is not None
        return self.servers.loads[replica.server]

    def _admits(self, replica: Replica, turn: Turn) -> bool:
        table, load = self._announced(), self._load(replica)
        is_early = not load.has_room_for(replica.num_waiting) and table.is_early(replica)
        return not is_early and load.admits(table.predicted_tokens(turn))

    def _grant(self, turn: Turn, load: ServerLoad, tokens: int) -> Grant:
        self.num_granted += 1
        turn.num_attempts += 1
        turn.attempt, turn.server = f"{turn.ticket.id}.{turn.num_attempts}", load.name
        self._attempts[turn.attempt] = turn
        load.enter(turn.attempt, turn.ticket.prompt_tokens + turn.generated, tokens)
        return Grant(turn.ticket.id, turn.ticket.worker, turn.attempt, load.name)

    def _end_attempt(self, turn: Turn) -> None:
        self._attempts.pop(turn.attempt, None)
        load = self.servers.loads.get(turn.server) if turn.server is not None else None
        if load is not None:
            load.leave(turn.attempt)
            self.servers.forget_if_done(load.name)
        turn.attempt, turn.server, turn.is_cut = "", None, False

    def _close(self, turn: Turn) -> None:
        del self._turns[turn.ticket.id]
        self._loose.pop(turn.ticket.id, None)
        if turn.sample >= 0:
            self._announced().close_turn(turn)

    def _refuse(self, turn: Turn, reason: str) -> None:
        who = turn.ticket.sample or f"request {turn.ticket.session}"
        self._refusals.append(Refusal(turn.ticket.id, turn.ticket.worker, f"{who}: {reason}"))
        self._close(turn)

    def _lose_place(self, sample: int, server: str) -> None:
        """Hold a sample whose server died, unless it was being moved to another replica."""
        table = self._announced()
        target = table.replicas[table.replica_of[sample]]
        if target.server == server:
            table.hold(sample)
        else:
            table.move(sample, target.index)

    def _retire(self, server: str) -> None:
        for replica in self._table.replicas if self._table is not None else ():
            if replica.server == server and replica.state != GONE:
                self._announced().retire(replica)
