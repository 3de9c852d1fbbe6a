"""The request book, decision by decision: who may start where and when, and what happens to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.request_book import RequestBook
from verl_rlhfless.live.samples import Rollout
from verl_rlhfless.live.tickets import Cut, Outcome, OutcomeKind, SampleKey, ServerLimits, Ticket
from verl_rlhfless.policy.snapshot import FINISHED, GONE, HELD, RUNNING, WAITING, Batch

POOL: Any = None  # the book passes it on
NO_LIMITS = ServerLimits()


def rollout(count: int, rank: list[int] | None = None, predicted: float = 100.0) -> Rollout:
    batch = Batch(1, tuple(f"p{i}" for i in range(count)), np.arange(count), np.full(count, 10), 1000)
    keys = tuple(SampleKey(f"p{i}", 0) for i in range(count))
    return Rollout(batch, keys, np.array(rank or range(count)), np.full(count, predicted), POOL)


def ticket(sample: int, turn: int = 0) -> Ticket:
    return Ticket(f"t{sample}-{turn}", "w", f"s{sample}", SampleKey(f"p{sample}", 0), 10)


def loose(name: str, session: str = "") -> Ticket:
    return Ticket(name, "w", session or name, None, 10)


def book(num_samples: int = 4, servers: int = 1, limits: ServerLimits = NO_LIMITS, **kwargs: Any) -> RequestBook:
    made = RequestBook()
    made.begin(rollout(num_samples, **kwargs))
    for index in range(servers):
        made.servers.add(f"s{index}", limits)
        made.add_replica(1, f"s{index}")
    return made


def all_on(made: RequestBook, replica: int, *samples: int) -> tuple[Cut, ...]:
    return made.place(np.array(samples), replica)


def started(made: RequestBook) -> list[tuple[str, str]]:
    return [(grant.ticket, grant.server) for grant in made.grants()]


def end(made: RequestBook, sample: int, kind: OutcomeKind = OutcomeKind.DONE, generated: int = 50, no: int = 1) -> None:
    made.finish(Outcome(f"t{sample}-0", f"t{sample}-0.{no}", kind, generated, "engine died"))


def test_an_announced_sample_starts_where_it_was_placed_and_not_before() -> None:
    made = book(2, servers=2)
    made.submit(ticket(0))
    assert started(made) == []
    all_on(made, 1, 0, 1)
    assert started(made) == [("t0-0", "s1")]
    assert made.view(0.0).state.tolist() == [RUNNING, WAITING]


def test_a_full_replica_starts_in_the_plans_order_even_when_prompts_arrive_in_another() -> None:
    made = book(4, limits=ServerLimits(max_num_seqs=2), rank=[3, 2, 1, 0])
    all_on(made, 0, 0, 1, 2, 3)
    for sample in (0, 1, 2):
        made.submit(ticket(sample))
    assert started(made) == []  # sample 3 comes first in the plan, and its prompt is on its way
    made.submit(ticket(3))
    assert started(made) == [("t3-0", "s0"), ("t2-0", "s0")]
    end(made, 3)
    assert started(made) == [("t1-0", "s0")]


def test_a_prompt_that_does_not_come_holds_nobody_up_once_the_rollout_is_settled() -> None:
    made = book(3, limits=ServerLimits(max_num_seqs=2))
    all_on(made, 0, 0, 1, 2)
    made.submit(ticket(1))
    assert started(made) == []
    made.settle()
    assert started(made) == [("t1-0", "s0")]


def test_where_all_fit_a_prompt_starts_as_soon_as_it_is_there() -> None:
    made = book(3, limits=ServerLimits(max_num_seqs=3))
    all_on(made, 0, 0, 1, 2)
    made.submit(ticket(2))
    assert started(made) == [("t2-0", "s0")]


def test_predicted_keys_and_values_limit_admission_and_an_underestimate_counts_as_what_it_is() -> None:
    made = book(4, limits=ServerLimits(kv_tokens=250), predicted=100.0)
    all_on(made, 0, *range(4))
    for sample in range(4):
        made.submit(ticket(sample))
    assert len(started(made)) == 2  # 110 tokens each
    made.progress("t0-0.1", 130)
    end(made, 1)
    assert len(started(made)) == 1  # 140 + 110 fit, no more
    end(made, 0)
    assert len(started(made)) == 1


def test_an_empty_replica_takes_even_a_sample_that_is_too_big() -> None:
    made = book(1, limits=ServerLimits(kv_tokens=50))
    all_on(made, 0, 0)
    made.submit(ticket(0))
    assert started(made) == [("t0-0", "s0")]


def test_a_cut_sample_goes_first_on_its_new_replica_and_keeps_its_tokens() -> None:
    made = book(3, servers=2, limits=ServerLimits(max_num_seqs=1))
    all_on(made, 0, 0)
    all_on(made, 1, 1, 2)
    for sample in range(3):
        made.submit(ticket(sample))
    assert len(started(made)) == 2
    assert all_on(made, 1, 0) == (Cut("s0", ("t0-0.1",)),)
    assert all_on(made, 1, 0) == ()  # asked once
    end(made, 0, OutcomeKind.CUT, generated=7)
    assert made.view(0.0).generated.tolist() == [7, 0, 0]
    end(made, 1)
    assert started(made) == [("t0-0", "s1")]


def test_a_sample_that_completes_before_its_cut_is_complete() -> None:
    made = book(1, servers=2)
    all_on(made, 0, 0)
    made.submit(ticket(0))
    started(made)
    all_on(made, 1, 0)
    end(made, 0)
    made.end(SampleKey("p0", 0))
    assert (made.is_done, started(made)) == (True, [])


def test_samples_of_a_lost_replica_are_held_until_they_are_placed_and_reported() -> None:
    made = book(2, servers=2)
    all_on(made, 0, 0, 1)
    made.submit(ticket(0))
    started(made)
    made.progress("t0-0.1", 20)
    made.lose_server("s0")
    view = made.view(0.0)
    assert (view.state.tolist(), view.replica_of.tolist(), view.generated[0]) == ([HELD, HELD], [-1, -1], 20)
    assert [entry.state for entry in view.replicas] == [GONE, "ready"]
    all_on(made, 1, 0, 1)
    assert started(made) == []  # its client still waits for the dead server
    end(made, 0, OutcomeKind.LOST, generated=18)
    assert started(made) == [("t0-0", "s1")]


def test_the_last_answer_of_a_lost_replica_counts_and_a_second_one_does_not() -> None:
    made = book(1)
    all_on(made, 0, 0)
    made.submit(ticket(0))
    started(made)
    made.lose_server("s0")
    end(made, 0)
    made.end(SampleKey("p0", 0))
    end(made, 0)
    made.end(SampleKey("p0", 0))
    assert (made.is_done, made.num_late) == (True, 2)


def test_a_sample_on_its_way_to_a_replica_that_dies_stays_where_it_is() -> None:
    made = book(1, servers=2)
    all_on(made, 0, 0)
    made.submit(ticket(0))
    started(made)
    all_on(made, 1, 0)
    made.lose_replica(1)
    assert made.view(0.0).replica_of.tolist() == [0]
    end(made, 0, OutcomeKind.CUT, generated=5)
    assert started(made) == [("t0-0", "s0")]


def test_draining_gives_away_what_waits_and_lets_finish_what_runs() -> None:
    made = book(2, servers=2, limits=ServerLimits(max_num_seqs=1))
    all_on(made, 0, 0, 1)
    for sample in (0, 1):
        made.submit(ticket(sample))
    started(made)
    made.drain_replica(0)
    assert made.view(0.0).state.tolist() == [RUNNING, HELD]
    assert "s0" in made.servers.loads
    all_on(made, 1, 1)
    assert started(made) == [("t1-0", "s1")]
    end(made, 0)
    assert "s0" not in made.servers.loads


def test_only_unplanned_ends_count_against_the_bound_and_the_last_one_is_told() -> None:
    made = book(1, servers=2)
    all_on(made, 0, 0)
    made.submit(ticket(0))
    for no in range(1, 9):
        started(made)
        all_on(made, no % 2, 0)
        end(made, 0, OutcomeKind.CUT, generated=no, no=no)
    assert made.take_refusals() == []
    for no in range(9, 13):
        started(made)
        end(made, 0, OutcomeKind.LOST, generated=no, no=no)
    (refusal,) = made.take_refusals()
    assert "p0" in refusal.reason and "max_retries=3" in refusal.reason and "engine died" in refusal.reason
    assert made.take_refusals() == [] and started(made) == []


def test_a_server_that_is_out_of_reach_again_and_again_costs_no_sample_that_gains_tokens() -> None:
    made = book(1)
    all_on(made, 0, 0)
    made.submit(ticket(0))
    for no in range(1, 9):
        assert started(made) == [("t0-0", "s0")]
        end(made, 0, OutcomeKind.AWAY, generated=no, no=no)
    for no in range(9, 13):
        assert not made.take_refusals()
        started(made)
        end(made, 0, OutcomeKind.AWAY, generated=8, no=no)
    assert len(made.take_refusals()) == 1, "one that gains none is not tried for ever"


@pytest.mark.parametrize("ends", ["cut", "drained"])
def test_an_engine_that_dies_under_what_was_leaving_it_is_no_fault_of_the_request(ends: str) -> None:
    made = book(1, servers=2)
    made.max_retries = 0
    all_on(made, 0, 0)
    made.submit(ticket(0))
    started(made)
    if ends == "cut":
        all_on(made, 1, 0)
    else:
        made.drain_server("s0")
    made.lose_server("s0")
    end(made, 0, OutcomeKind.LOST, generated=5)
    all_on(made, 1, 0)
    assert started(made) == [("t0-0", "s1")] and not made.take_refusals()


def test_a_session_holds_no_replica_between_its_turns_and_prefers_its_last_one() -> None:
    made = book(2, servers=2, limits=ServerLimits(max_num_seqs=1))
    all_on(made, 0, 0)
    all_on(made, 0, 1)
    made.submit(ticket(0))
    made.submit(ticket(1))
    started(made)
    end(made, 0, generated=9)
    assert started(made) == [("t1-0", "s0")]
    assert made.view(0.0).state.tolist() == [WAITING, RUNNING]
    all_on(made, 1, 0)  # free: it holds nothing
    made.submit(ticket(0, turn=1))
    assert started(made) == [("t0-1", "s1")]
    made.progress("t0-1.1", 4)
    assert made.view(0.0).generated.tolist() == [13, 0]


def test_a_drain_does_not_wait_for_a_session_that_waits_for_a_tool() -> None:
    made = book(1)
    all_on(made, 0, 0)
    made.submit(ticket(0))
    started(made)
    end(made, 0)
    made.drain_replica(0)
    assert not made.servers.loads and made.view(0.0).state.tolist() == [HELD]


def test_two_turns_of_one_session_at_a_time_both_get_an_answer() -> None:
    made = book(1)
    all_on(made, 0, 0)
    made.submit(ticket(0, turn=0))
    made.submit(ticket(0, turn=1))
    assert started(made) == [("t0-0", "s0"), ("t0-1", "s0")]


def test_what_nobody_announced_goes_to_the_fewest_requests_and_sessions_return() -> None:
    made = book(0, servers=2, limits=ServerLimits(max_num_seqs=2))
    for name in "abcde":
        made.submit(loose(name))
    assert [server for _, server in started(made)] == ["s0", "s1", "s0", "s1"]
    made.finish(Outcome("b", "b.1", OutcomeKind.DONE, 5))
    assert started(made) == [("e", "s1")]  # where a place is free
    made.finish(Outcome("c", "c.1", OutcomeKind.DONE, 5))
    made.finish(Outcome("d", "d.1", OutcomeKind.DONE, 5))
    made.submit(loose("f", session="b"))
    assert started(made) == [("f", "s1")]  # b's earlier turn left its prefix there
    assert (made.servers.acquire("g"), made.servers.acquire("g")) == ("s0", "s0")


def test_without_a_server_requests_wait_and_are_given_up_together() -> None:
    made = RequestBook()
    made.submit(loose("a"))
    assert made.is_stranded and started(made) == []
    made.refuse_waiting("no replica")
    assert [refusal.ticket for refusal in made.take_refusals()] == ["a"]
    assert not made.is_stranded


def test_a_replica_that_starts_is_hope() -> None:
    made = book(1, servers=0)
    replica = made.add_replica(1)
    made.submit(ticket(0))
    all_on(made, replica, 0)
    assert not made.is_stranded
    made.lose_replica(replica)
    assert made.is_stranded


def test_a_replica_that_a_rollout_did_not_wait_for_is_no_hope_for_what_comes_after_it() -> None:
    made = book(1)
    made.add_replica(1)
    made.end(SampleKey("p0", 0))
    made.lose_server("s0")
    made.submit(loose("validation"))
    assert made.is_stranded


def test_a_dry_replica_is_seen_only_when_there_is_work_for_it() -> None:
    made = book(3, servers=2, limits=ServerLimits(max_num_seqs=1))
    all_on(made, 0, 0, 1)
    all_on(made, 1, 2)
    for sample in range(3):
        made.submit(ticket(sample))
    started(made)
    assert not made.has_dry_replica()
    end(made, 2)
    made.end(SampleKey("p2", 0))
    assert made.has_dry_replica()
    all_on(made, 1, 1)
    started(made)
    assert not made.has_dry_replica()


def test_a_second_rollout_is_refused_while_one_runs() -> None:
    made = book(1)
    with pytest.raises(ReplicaError, match="step 1: 1 samples of step 1 are not complete"):
        made.begin(rollout(1))
    made.end(SampleKey("p0", 0))
    made.begin(rollout(1))
    assert made.view(0.0).state.tolist() == [HELD] and made.view(0.0).state[0] != FINISHED
