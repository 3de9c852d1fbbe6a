import pytest

from verl_rlhfless.errors import DataError
from verl_rlhfless.ledger import account, parked, usd, whole_run
from verl_rlhfless.types import BusySpan, GpuSeconds, LeaseSpan, ParkedSpan, ParkedUse, Window

HOUR = Window(0.0, 100.0)


def lease(granted_s, usable_s, released_s, num_gpus=2, lease_id="a"):
    return LeaseSpan(lease_id, "replica", num_gpus, granted_s, usable_s, released_s)


def test_a_lease_is_split_into_start_up_work_and_waiting():
    result = account([lease(10, 15, 40)], [BusySpan("a", 2, 20, 30)], HOUR)
    assert result == GpuSeconds(allocated=60, busy=20, idle=30, startup=10, max_gpus=2)


def test_work_before_the_lease_is_usable_stays_start_up():
    result = account([lease(0, 10, 20)], [BusySpan("a", 2, 5, 12)], HOUR)
    assert (result.startup, result.busy, result.idle) == (20, 4, 16)


def test_a_lease_that_never_became_usable_is_all_start_up():
    result = account([lease(0, None, 20)], [], HOUR)
    assert (result.startup, result.idle) == (40, 0)


def test_a_lease_that_is_still_held_ends_with_the_window():
    assert account([lease(90, 90, None)], [], HOUR).allocated == 20


def test_one_engine_of_four_keeps_one_gpu_of_the_shared_lease_busy():
    result = account([lease(0, 0, 10, num_gpus=4)], [BusySpan("a", 1, 0, 10)], HOUR)
    assert (result.busy, result.idle) == (10, 30)


def test_a_trainer_phase_beside_running_engines_never_counts_a_gpu_twice():
    engines = [BusySpan("a", 1, 0, 6), BusySpan("a", 1, 2, 6)]
    trainer = BusySpan("a", 2, 4, 8)
    result = account([lease(0, 0, 10)], [*engines, trainer], HOUR)
    assert result.busy == 2 * 1 + 2 * 2 + 2 * 2 + 2 * 2
    assert result.idle == 20 - result.busy


def test_work_outside_the_hold_is_not_counted():
    result = account([lease(10, 10, 20)], [BusySpan("a", 2, 0, 100)], HOUR)
    assert (result.busy, result.idle) == (20, 0)


def test_a_handover_at_one_instant_does_not_add_up():
    leases = [lease(0, 0, 10, num_gpus=3, lease_id="a"), lease(10, 10, 20, num_gpus=3, lease_id="b")]
    assert account(leases, [], HOUR).max_gpus == 3


def test_leases_held_together_add_up_even_for_an_instant():
    leases = [lease(0, 0, 10, num_gpus=3, lease_id="a"), lease(9.999, 9.999, 20, num_gpus=2, lease_id="b")]
    assert account(leases, [], HOUR).max_gpus == 5


def test_the_window_is_half_open():
    leases = [lease(0, 0, 10, lease_id="a"), lease(20, 20, 30, lease_id="b")]
    assert account(leases, [], Window(10, 20)) == GpuSeconds(0, 0, 0, 0, 0)


def test_start_up_that_began_before_the_window_goes_on_in_it():
    result = account([lease(0, 30, 60)], [], Window(20, 40))
    assert (result.startup, result.idle) == (20, 20)


def test_work_on_a_lease_that_nobody_was_granted_is_an_error_with_its_name():
    with pytest.raises(DataError, match="ghost"):
        account([lease(0, 0, 10)], [BusySpan("ghost", 1, 0, 1)], HOUR)


def test_the_whole_run_lasts_from_the_first_grant_to_the_last_release():
    leases = [lease(5, 6, 50), lease(3, 4, 20)]
    assert whole_run(leases, observed_until_s=80) == Window(3, 50)


def test_the_whole_run_lasts_as_long_as_it_was_watched_while_a_lease_is_held():
    assert whole_run([lease(5, 6, None)], observed_until_s=80) == Window(5, 80)


def test_an_hour_of_two_gpus_costs_twice_the_price_of_an_hour():
    assert usd(2 * 3600, 2.5) == 5.0


def parked_engine(start_s, end_s, num_gpus=1, device_bytes=0):
    return ParkedSpan(num_gpus, device_bytes, start_s, end_s)


def test_parked_engines_count_apart_and_only_inside_the_window():
    spans = [parked_engine(-10, 5, 2, 700), parked_engine(90, None, 1, 500), parked_engine(100, 110, 4, 900)]
    assert parked(spans, HOUR) == ParkedUse(gpu_s=2 * 5 + 10, device_bytes=700)


def test_windows_of_parked_time_add_up():
    spans = [parked_engine(10, 60, 2), parked_engine(20, None)]
    halves = [parked(spans, Window(0, 45)), parked(spans, Window(45, 100))]
    assert sum(half.gpu_s for half in halves) == parked(spans, HOUR).gpu_s == 180


def test_nobody_parked_is_zero_and_not_unknown():
    assert parked([], HOUR) == ParkedUse(0.0, 0)
