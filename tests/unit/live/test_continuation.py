"""A response out of several attempts, and the journal that saves one of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.errors import ReplicaError
from verl_rlhfless.live.journal import Journal
from verl_rlhfless.live.tickets import Delta, Part

TokenOutput = pytest.importorskip("verl.workers.rollout.replica", reason="needs verl").TokenOutput


def output(tokens: list[int], **fields: object) -> object:
    extra = {"global_steps": 4, **fields.pop("extra", {})}  # type: ignore[dict-item]
    return TokenOutput(token_ids=tokens, log_probs=[-float(t) for t in tokens], extra_fields=extra, **fields)


def continuation(budget: int = 10, has_log_probs: bool = True):  # type: ignore[no-untyped-def]
    from verl_rlhfless.live.continuation import Continuation

    return Continuation(budget, has_log_probs)


@given(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6), st.integers(1, 30))
def test_tokens_and_log_probs_follow_each_other_within_the_budget(attempts: list[list[int]], budget: int) -> None:
    response = continuation(budget)
    for attempt in attempts:
        response.add(output(attempt[: response.budget_left]))
    result = response.result("completed")
    assert result.token_ids == [token for attempt in attempts for token in attempt][:budget]
    assert result.log_probs == [-float(token) for token in result.token_ids]
    assert len(result.token_ids) + response.budget_left == budget


def test_figures_of_all_attempts_are_kept() -> None:
    response = continuation()
    response.add(output([1, 2], num_preempted=1, extra={"num_cached_tokens": 64}))
    response.add(output([]))
    response.add(output([3], num_preempted=2, extra={"num_cached_tokens": 2, "global_steps": 5}))
    result = response.result("completed")
    assert (result.num_preempted, result.stop_reason) == (3, "completed")
    assert result.extra_fields == {
        "num_cached_tokens": 64,  # of the prompt
        "global_steps": 5,
        "min_global_steps": 4,
        "max_global_steps": 5,
    }


def test_a_drafters_counts_add_up_and_are_not_lost_with_a_server() -> None:
    response = continuation()
    response.add(output([1, 2], extra={"spec_num_draft_tokens": 4, "spec_num_verify_steps": 1}))
    response.add(output([3], extra={"spec_num_draft_tokens": 2, "spec_num_verify_steps": 2}))
    response.add(output([4]))  # what the router held of a server that died
    fields = response.result("completed").extra_fields
    assert (fields["spec_num_draft_tokens"], fields["spec_num_verify_steps"]) == (6, 3)


def test_routed_experts_of_new_tokens_are_appended() -> None:
    response = continuation()
    response.add(output([1, 2], routed_experts=np.array([[0], [1], [2]])))  # a prompt of one token
    response.add(output([3], routed_experts=np.array([[7], [7], [7], [3]])))
    assert response.result(None).routed_experts.tolist() == [[0], [1], [2], [3]]


def test_a_response_without_log_probs_has_none() -> None:
    response = continuation(has_log_probs=False)
    response.add(TokenOutput(token_ids=[1], log_probs=None))
    assert response.result(None).log_probs is None


@pytest.mark.parametrize("wrong", [[1] * 11, [1]])
def test_a_server_that_breaks_the_budget_or_forgets_log_probs_is_found_out(wrong: list[int]) -> None:
    log_probs = [0.0] * len(wrong) if len(wrong) > 1 else []
    with pytest.raises(ReplicaError, match="This is a fault of the server"):
        continuation().add(TokenOutput(token_ids=wrong, log_probs=log_probs))


def part(attempt: str, start: int, num: int) -> Part:
    return Part(attempt, start, list(range(start, start + num)), [float(i) for i in range(start, start + num)])


def test_the_journal_keeps_each_token_once_and_in_order() -> None:
    journal = Journal()
    journal.open("a")
    assert journal.add(Delta((part("a", 0, 3),), 7)) == {"a": 3}
    assert journal.add(Delta((part("a", 1, 4),), 7)) == {"a": 5}  # a report that overlaps
    assert journal.add(Delta((part("a", 0, 3),), 7)) == {"a": 5}  # one that came twice
    assert journal.add(Delta((part("a", 9, 1),), 7)) == {}  # one with a gap
    progress = journal.read("a")
    assert (progress.tokens, progress.log_probs, progress.version) == ([*range(5)], [0.0, 1.0, 2.0, 3.0, 4.0], 7)


def test_the_journal_forgets_what_is_over_and_never_learns_what_it_was_not_told_of() -> None:
    journal = Journal()
    journal.open("a")
    journal.add(Delta((part("a", 0, 3), part("b", 0, 3)), 7))
    journal.close("a")
    journal.add(Delta((part("a", 3, 1),), 7))
    assert (len(journal), journal.read("a").tokens, journal.read("b").tokens) == (0, [], [])
