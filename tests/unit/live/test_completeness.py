"""A batch with fewer samples than prompts x n stops the run and names what is lost."""

from __future__ import annotations

import pytest

from verl_rlhfless.errors import SampleLossError
from verl_rlhfless.live.completeness import RolloutLedger


def keys(**sessions: int) -> list[str]:
    return [f"{uid}_{session}_0" for uid, count in sessions.items() for session in range(count)]


def ledger_for(**rows: int) -> RolloutLedger:
    ledger = RolloutLedger(samples_per_prompt=4)
    ledger.expect({"uid": list(rows), "index": list(rows.values())})
    return ledger


def test_complete_batch_passes() -> None:
    ledger_for(a=10, b=11).check(keys(a=4, b=4), num_groups=2)


def test_missing_sample_names_group_and_data_row() -> None:
    with pytest.raises(SampleLossError, match=r"group b \(data row 11\): 3 of 4 samples"):
        ledger_for(a=10, b=11).check(keys(a=4, b=3), num_groups=2)


def test_group_without_any_sample_is_named() -> None:
    with pytest.raises(SampleLossError, match=r"group b \(data row 11\): 0 of 4 samples"):
        ledger_for(a=10, b=11).check(keys(a=4), num_groups=2)


def test_empty_batch_names_every_group() -> None:
    with pytest.raises(SampleLossError, match=r"2 of 2 prompt groups.*group a.*group b"):
        ledger_for(a=10, b=11).check([], num_groups=2)


def test_filtered_groups_that_were_replaced_are_not_lost() -> None:
    ledger_for(a=1, filtered=2, b=3).check(keys(a=4, b=4), num_groups=2)


def test_several_outputs_of_one_session_count_once() -> None:
    with pytest.raises(SampleLossError, match="1 of 4 samples"):
        ledger_for(a=10).check(["a_0_0", "a_0_1", "a_0_2", "a_0_3"], num_groups=1)


def test_group_may_ask_for_its_own_number_of_samples() -> None:
    ledger = RolloutLedger(samples_per_prompt=4)
    ledger.expect({"uid": ["a"], "index": [0], "__rollout_n__": [2]})
    ledger.check(keys(a=2), num_groups=1)


def test_each_step_is_judged_alone() -> None:
    ledger = ledger_for(a=1)
    ledger.check(keys(a=4), num_groups=1)
    ledger.expect({"uid": ["b"], "index": [2]})
    ledger.check(keys(b=4), num_groups=1)
