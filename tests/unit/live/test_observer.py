import io
import json

import pytest

from verl_rlhfless.errors import RlhflessError
from verl_rlhfless.live import observer
from verl_rlhfless.live.observer import LeaseWatch, Observer, PlacedGroup, StepWatch


def group(name, granted_s, is_held=True, num_gpus=2):
    return PlacedGroup(name.encode(), name, num_gpus, is_held, granted_s)


class Looks:
    """Feeds looks at Ray's table, each 0.1 s long, and returns what was recorded."""

    def __init__(self):
        self.out = io.StringIO()
        self.watch = LeaseWatch(self.out)

    def look(self, at_s, *groups):
        self.watch.look(groups, at_s - 0.01, at_s)
        return self

    def records(self):
        lines = [json.loads(line) for line in self.out.getvalue().splitlines()]
        return [(line["event"], line["lease"], line["t"]) for line in lines]


def test_a_grant_has_rays_time_and_a_release_the_time_of_the_look_that_missed_it():
    looks = Looks().look(5.0, group("a", 4.95)).look(5.1, group("a", 4.95)).look(5.2, group("a", 4.95, is_held=False))
    assert looks.records() == [("granted", "a", 4.95), ("released", "a", 5.2)]
    assert not looks.watch.is_anything_held


def test_a_group_that_vanished_from_the_table_was_released():
    assert Looks().look(5.0, group("a", 4.95)).look(5.1).records()[-1] == ("released", "a", 5.1)


def test_gpus_that_change_hands_between_two_looks_are_released_before_they_are_granted():
    looks = Looks().look(5.0, group("a", 4.0)).look(5.1, group("a", 4.0, is_held=False), group("b", 5.03))
    assert looks.records() == [("granted", "a", 4.0), ("granted", "b", 5.03), ("released", "a", 5.03)]


def test_a_grant_from_before_the_last_look_does_not_move_a_release():
    looks = Looks().look(5.0, group("a", 4.0)).look(5.1, group("b", 4.5))
    assert ("released", "a", 5.1) in looks.records()


def test_a_lease_that_came_and_went_between_two_looks_is_recorded():
    assert Looks().look(5.0).look(5.1, group("a", 5.02, is_held=False)).records() == [
        ("granted", "a", 5.02),
        ("released", "a", 5.1),
    ]


def test_a_group_that_waits_for_gpus_is_no_lease():
    assert Looks().look(5.0, group("a", 0.0, is_held=False)).records() == []


def test_what_ended_before_the_watch_is_left_out_and_what_is_held_is_not():
    looks = Looks()
    old, held = group("old", 1.0, is_held=False), group("held", 2.0)
    looks.watch.ignore_ended([old, held])
    assert looks.look(5.0, old, held).records() == [("granted", "held", 2.0)]


def test_a_lease_that_lost_its_node_and_got_another_is_two_holds():
    looks = Looks().look(5.0, group("a", 4.0)).look(5.1, group("a", 4.0, is_held=False))
    looks.look(5.2, group("a", 4.0, is_held=False)).look(6.0, group("a", 5.9))
    assert looks.records() == [("granted", "a", 4.0), ("released", "a", 5.1), ("granted", "a", 5.9)]


def test_our_replicas_are_told_from_every_other_group_by_name():
    names = ("rlhfless/replica/r1", "rlhfless/trainer/pool", "global_poolverl_group_4:0", "a1b2c3")
    assert [group(name, 1.0).role for name in names] == ["replica", "trainer", "trainer", "trainer"]


def test_a_step_is_stamped_once_and_only_when_its_line_is_whole(tmp_path):
    out = io.StringIO()
    watch = StepWatch(tmp_path, out)
    watch.look()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for text, steps in (('{"step": 1, "da', []), ('ta": {}}\n', [1]), ("", [1]), ('{"step": 2}\n', [1, 2])):
            file.write(text)
            file.flush()
            watch.look()
            assert [json.loads(line)["step"] for line in out.getvalue().splitlines()] == steps


@pytest.mark.parametrize(
    ("ended_by", "told"),
    [(None, RlhflessError), (OSError, RlhflessError), (KeyboardInterrupt, KeyboardInterrupt), (SystemExit, SystemExit)],
)
def test_an_observer_that_failed_says_so_unless_the_process_is_being_ended(monkeypatch, tmp_path, ended_by, told):
    def fail():
        raise OSError("No space left on device")

    monkeypatch.setattr(observer, "read_groups", fail)
    with pytest.raises(told), Observer(tmp_path):
        if ended_by is not None:
            raise ended_by
