"""Times are multiples of 1/8 s, which doubles add without rounding, so that every law must hold exactly."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.ledger import account, whole_run
from verl_rlhfless.types import BusySpan, GpuSeconds, LeaseSpan, Window

END_S = 100.0
seconds = st.integers(0, int(END_S * 8)).map(lambda eighths: eighths / 8)
spans = st.tuples(seconds, seconds).map(sorted)


@st.composite
def leases(draw, max_size=6):
    found = []
    for number in range(draw(st.integers(0, max_size))):
        granted_s, released_s = draw(spans)
        found.append(
            LeaseSpan(
                lease_id=f"lease-{number}",
                role=draw(st.sampled_from(["trainer", "replica"])),
                num_gpus=draw(st.integers(1, 8)),
                granted_s=granted_s,
                usable_s=draw(st.none() | seconds),
                released_s=draw(st.sampled_from([released_s, None])),
            )
        )
    return found


@st.composite
def runs(draw):
    held = draw(leases())
    work = []
    if held:
        ids = st.sampled_from([lease.lease_id for lease in held])
        for lease_id, gpus, (start_s, end_s) in draw(st.lists(st.tuples(ids, st.integers(1, 8), spans), max_size=12)):
            work.append(BusySpan(lease_id, gpus, start_s, end_s))
    return held, work


windows = spans.map(lambda span: Window(*span))


@given(runs(), windows)
def test_every_leased_gpu_second_has_one_state(run, window):
    result = account(*run, window)
    assert result.busy + result.idle + result.startup == result.allocated
    assert min(result.busy, result.idle, result.startup) >= 0


@given(runs(), st.lists(seconds, max_size=6))
def test_windows_add_up_to_the_run_they_cover(run, cuts):
    held, work = run
    total = account(held, work, Window(0, END_S))
    edges = [0.0, *sorted(cuts), END_S]
    parts = [account(held, work, Window(a, b)) for a, b in pairwise(edges)]
    for state in ("allocated", "busy", "idle", "startup"):
        assert sum(getattr(part, state) for part in parts) == getattr(total, state)
    assert max(part.max_gpus for part in parts) == total.max_gpus


@given(runs(), st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(run, random):
    held, work = run
    shuffled_leases, shuffled_work = random.sample(held, len(held)), random.sample(work, len(work))
    assert account(shuffled_leases, shuffled_work, Window(0, END_S)) == account(held, work, Window(0, END_S))


@given(runs(), leases(max_size=1))
def test_another_lease_never_makes_a_run_cheaper(run, more):
    held, work = run
    before = account(held, work, Window(0, END_S))
    after = account([*held, *(replace(lease, lease_id="more") for lease in more)], work, Window(0, END_S))
    for field in ("allocated", "busy", "idle", "startup", "max_gpus"):
        assert getattr(after, field) >= getattr(before, field)


@given(runs())
def test_more_work_moves_idle_time_to_busy_and_nothing_else(run):
    held, work = run
    before = account(held, work, Window(0, END_S))
    after = account(held, [*work, *(BusySpan(lease.lease_id, 1, 0, END_S) for lease in held)], Window(0, END_S))
    assert after.busy >= before.busy
    assert (after.allocated, after.startup, after.max_gpus) == (before.allocated, before.startup, before.max_gpus)


@given(runs(), seconds)
def test_a_lease_cut_in_two_costs_what_it_cost_in_one(run, cut_s):
    held, work = run
    halves = []
    for lease in held:
        end_s = END_S if lease.released_s is None else lease.released_s
        middle_s = min(max(cut_s, lease.granted_s), end_s)
        halves += [replace(lease, released_s=middle_s), replace(lease, granted_s=middle_s)]
    assert account(halves, work, Window(0, END_S)) == account(held, work, Window(0, END_S))


@given(leases())
def test_the_whole_run_leaves_no_lease_out(held):
    everything = account(held, [], Window(0, END_S))
    assert account(held, [], whole_run(held, END_S)) == everything
    if not held:
        assert everything == GpuSeconds(0, 0, 0, 0, 0)
