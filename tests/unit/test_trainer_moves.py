"""An elastic step pays the trainer's way to the host and back, in the simulator and in what a plan expects."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.sim.cases import cell, steps
from verl_rlhfless.policy.baselines.rlhfless_paper import RlhflessPaper
from verl_rlhfless.policy.snapshot import PoolSnapshot
from verl_rlhfless.policy.step_costs import StepCosts
from verl_rlhfless.policy.transitions import TrainerPerf


def took(patch: pytest.MonkeyPatch, copy_s: float, resume_s: float) -> tuple[float, float, PoolSnapshot]:
    """Return seconds and GPU-seconds of a step whose trainer moves with these, and the pool that says so."""
    patch.setattr(TrainerPerf, "state_copy_s", property(lambda trainer: copy_s))
    one = cell(steps(1, 16, 4), resume_s=resume_s)
    (step,) = one.run(RlhflessPaper(num_actors=4, tp=2)).steps
    assert "resident" not in step.fleet
    return step.step_s, step.gpu_s_allocated, one.pool


@pytest.mark.parametrize(("copy_s", "resume_s", "added_s"), [(7.0, 0.0, 14.0), (0.0, 3.0, 3.0)])
def test_an_elastic_step_pays_the_trainers_way_to_the_host_and_back(
    monkeypatch: pytest.MonkeyPatch, copy_s: float, resume_s: float, added_s: float
) -> None:
    base_s, base_gpu_s, base = took(monkeypatch, 0.0, 0.0)
    units: Any = None  # of the batch, which takes no part
    free_s = StepCosts(base, units, 1.0, can_fuse=False).transition_s
    step_s, gpu_s, pool = took(monkeypatch, copy_s, resume_s)
    assert step_s - base_s == pytest.approx(added_s)
    assert gpu_s - base_gpu_s == pytest.approx(added_s * pool.trainer.num_gpus)
    assert StepCosts(pool, units, 1.0, can_fuse=False).transition_s - free_s == pytest.approx(added_s)
