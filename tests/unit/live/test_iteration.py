"""Token and request counts read from scheduler outputs are those of the real responses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from verl_rlhfless.live.iteration import Iteration, RequestTable


def new(name: str, prompt: int, computed: int = 0, known: int | None = None) -> Any:
    prefill = None if known is None else [0] * known
    return SimpleNamespace(
        req_id=name,
        prompt_token_ids=[0] * prompt,
        prompt_embeds=None,
        prefill_token_ids=prefill,
        num_computed_tokens=computed,
    )


def output(
    scheduled: dict[str, int],
    new_requests: tuple[Any, ...] = (),
    cached: tuple[tuple[str, int, int], ...] = (),
    finished: tuple[str, ...] = (),
) -> Any:
    """Build a scheduler output; ``cached`` holds (name, computed tokens, output tokens)."""
    names, computed, outputs = zip(*cached, strict=True) if cached else ((), (), ())
    return SimpleNamespace(
        scheduled_new_reqs=new_requests,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(names), num_computed_tokens=list(computed), num_output_tokens=list(outputs)
        ),
        num_scheduled_tokens=scheduled,
        finished_req_ids=set(finished),
    )


def test_a_response_of_three_tokens() -> None:
    table = RequestTable()

    prefill = table.observe(output({"a": 5}, (new("a", 5),)))
    second = table.observe(output({"a": 1}, cached=(("a", 5, 1),)))
    third = table.observe(output({"a": 1}, cached=(("a", 6, 2),)))
    done = table.observe(output({}, finished=("a",)))

    assert prefill == Iteration(1, 0, 1, 0, prefill_tokens=5, context_tokens=5, sampled_tokens=1)
    assert second == Iteration(1, 1, 1, 0, prefill_tokens=0, context_tokens=6, sampled_tokens=1)
    assert third == Iteration(1, 1, 1, 0, prefill_tokens=0, context_tokens=7, sampled_tokens=1)
    assert done == Iteration(0, 0, 0, 1, 0, 0, 0)


def test_a_chunked_prompt_samples_only_after_its_last_chunk() -> None:
    table = RequestTable()

    chunks = [
        table.observe(output({"a": 4}, (new("a", 9),))),
        table.observe(output({"a": 4}, cached=(("a", 4, 0),))),
        table.observe(output({"a": 1}, cached=(("a", 8, 0),))),
    ]

    assert [chunk.sampled_tokens for chunk in chunks] == [0, 0, 1]
    assert [chunk.prefill_tokens for chunk in chunks] == [4, 4, 1]


def test_a_cached_prefix_is_read_but_not_computed() -> None:
    seen = RequestTable().observe(output({"a": 1}, (new("a", 9, computed=8),)))

    assert (seen.prefill_tokens, seen.context_tokens, seen.sampled_tokens) == (1, 9, 1)


def test_recomputing_a_preempted_request_samples_one_token() -> None:
    table = RequestTable()
    table.observe(output({"a": 5}, (new("a", 5),)))

    resumed = table.observe(output({"a": 8}, cached=(("a", 0, 3),)))

    assert (resumed.prefill_tokens, resumed.sampled_tokens) == (8, 1)


def test_a_preempted_request_that_comes_back_as_new() -> None:
    table = RequestTable()
    table.observe(output({"a": 5}, (new("a", 5),)))

    part = table.observe(output({"a": 6}, (new("a", 5, known=8),)))
    rest = table.observe(output({"a": 2}, cached=(("a", 6, 3),)))

    assert (part.num_running, part.sampled_tokens) == (1, 0)
    assert (rest.num_running, rest.sampled_tokens) == (1, 1)


def test_only_requests_that_ran_count_as_finished() -> None:
    table = RequestTable()
    table.observe(output({"a": 5, "b": 5}, (new("a", 5), new("b", 5))))

    seen = table.observe(output({"b": 1}, cached=(("b", 5, 1),), finished=("a", "aborted while it waited")))

    assert (seen.num_finished, seen.num_running, seen.num_continued) == (1, 1, 1)
    assert table.observe(output({}, finished=("a",))).num_finished == 0


def test_an_id_may_be_used_again_at_once() -> None:
    table = RequestTable()
    table.observe(output({"a": 5}, (new("a", 5),)))

    seen = table.observe(output({"a": 3}, (new("a", 3),), finished=("a",)))

    assert (seen.num_finished, seen.num_running, seen.sampled_tokens) == (1, 1, 1)


def test_a_prompt_of_embeddings() -> None:
    request = new("a", 0)
    request.prompt_token_ids, request.prompt_embeds = None, [[0.0]] * 6

    assert RequestTable().observe(output({"a": 6}, (request,))).sampled_tokens == 1
