"""A fused step: chunks beside the rollout, only the rest after it, and the same step when something fails."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from tests.unit.live.fusion_fakes import FakeGroup, FakeQueue
from verl_rlhfless.config import FusionConfig
from verl_rlhfless.live import fusion_loop, fusion_recall
from verl_rlhfless.live.events import EventLog
from verl_rlhfless.live.fusion_trainer import FusionTrainer, phases_of
from verl_rlhfless.live.request_trainer import RequestTrainer

KEYS = tuple(f"u{group}_{session}_0" for group in range(2) for session in range(4))
OLD, REF, VALUES = "_compute_old_log_prob", "_compute_ref_log_prob", "_compute_values"


def recipe(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "algorithm.rollout_correction.bypass_mode": False,
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": False,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": True,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": None,
        "critic.use_dynamic_bsz": False,
        "critic.ppo_infer_micro_batch_size_per_gpu": None,
        "critic.ppo_micro_batch_size_per_gpu": 2,
    }
    config = OmegaConf.create({})
    for key, value in {**values, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        OmegaConf.update(config, key, value)
    return config


@pytest.mark.parametrize(
    ("changes", "roles", "methods"),
    [
        ({}, (False, False, False), [OLD]),
        ({}, (True, False, False), [OLD, REF]),
        ({}, (True, False, True), [OLD, REF, VALUES]),
        ({"algorithm__rollout_correction__bypass_mode": True}, (True, False, False), [REF]),
    ],
    ids=["GRPO", "GRPO with reference", "PPO with reference", "old log-probs are the rollout's"],
)
def test_a_recipe_has_the_phases_that_verl_computes(
    changes: dict[str, Any], roles: tuple[bool, bool, bool], methods: list[str]
) -> None:
    assert [phase.method for phase in phases_of(recipe(**changes), *roles)] == methods


def test_the_reference_of_an_adapter_is_the_actor_and_keeps_no_entropy() -> None:
    old, reference = phases_of(recipe(), True, True, False)
    assert (reference.group, reference.call, reference.fields) == (old.group, old.call, ("log_probs",))


def test_static_micro_batches_count_and_dynamic_ones_do_not() -> None:
    assert [phase.micro_batch for phase in phases_of(recipe(), True, False, True)] == [4, 1, 2]


class Step(FusionTrainer):
    """A trainer whose rollout is a callback; its phases call the worker groups and nothing else, as verl's do."""

    def __init__(self, queue: FakeQueue) -> None:
        self.actor, self.reference = FakeGroup(queue, ("log_probs", "entropy")), FakeGroup(queue)
        self.actor_rollout_wg, self.ref_policy_wg = self.actor, self.reference
        self._settings: Any = SimpleNamespace(fusion=FusionConfig(name="on", end_timeout_s=10.0))
        self.resource_pool_manager: Any = SimpleNamespace(is_leased=True)
        self._events, self.global_steps, self._rollout_metrics = EventLog(None), 3, {}
        self._memory, self._fusion, self._fused = fusion_recall.InferenceMemory(), None, None
        micro = {"actor_rollout_ref__rollout__log_prob_micro_batch_size_per_gpu": 1}
        self._phases = {phase.method: phase for phase in phases_of(recipe(**micro), True, False, False)}
        self._queue, self.rollout = queue, lambda: None
        self.left_s = 100.0

    def _remaining_s(self) -> float:
        return self.left_s


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Step:
    queue = FakeQueue()
    for part in (fusion_loop, fusion_recall):
        monkeypatch.setattr(part, "tq", queue)
    monkeypatch.setattr(fusion_loop, "_LOOK_S", 0.001)

    def step(self: Step, metrics: Any, timing_raw: Any) -> Any:
        self.on_sample_begin()
        self.rollout()
        self.on_sample_end()
        queue.finish(*[key for key in KEYS if key not in queue.tags])
        batch = self._compute_old_log_prob(queue.batch(*KEYS), {})
        return self._compute_ref_log_prob(batch, {})

    monkeypatch.setattr(RequestTrainer, "step", step)
    for hook in ("on_sample_begin", "on_sample_end"):
        monkeypatch.setattr(RequestTrainer, hook, lambda self: None)

    def old(self: Any, batch: Any, metrics: Any) -> Any:
        assert len(self.actor_rollout_wg.compute_log_prob(batch)) == len(batch)
        return batch

    def reference(self: Any, batch: Any, metrics: Any) -> Any:
        assert len(self.ref_policy_wg.compute_ref_log_prob(batch)) == len(batch)
        return batch

    monkeypatch.setattr(PPOTrainer, OLD, old)
    monkeypatch.setattr(PPOTrainer, REF, reference)
    made = Step(queue)
    made.rollout = lambda: _until_fused(made, 6)
    queue.finish(*KEYS[:6])
    return made


def _until_fused(trainer: Step, samples: int) -> None:
    deadline_s = time.monotonic() + 10
    while sum(map(len, trainer.reference.calls)) < samples:
        assert time.monotonic() < deadline_s, "no chunk was inferred"
        time.sleep(0.001)


def test_each_sample_is_inferred_once_in_each_phase(trainer: Step) -> None:
    trainer.step({}, {})
    for group in (trainer.actor, trainer.reference):
        assert sorted(key for call in group.calls for key in call) == sorted(KEYS)
        assert sorted(group.calls[-1]) == sorted(KEYS[6:])
    assert trainer._rollout_metrics["rlhfless/fused_samples"] == 6
    assert trainer._rollout_metrics["rlhfless/late_samples"] == 2
    assert trainer._rollout_metrics["rlhfless/fusion_failed"] == 0


def test_the_next_step_begins_with_nothing_known(trainer: Step) -> None:
    trainer.step({}, {})
    trainer.rollout, trainer.left_s = (lambda: None), 0.0
    trainer.step({}, {})
    assert sorted(trainer.actor.calls[-1]) == sorted(KEYS)


def test_the_trainer_has_its_own_groups_again(trainer: Step) -> None:
    trainer.step({}, {})
    assert trainer.actor_rollout_wg is trainer.actor and trainer.ref_policy_wg is trainer.reference


def test_a_step_without_its_lease_does_not_fuse(trainer: Step) -> None:
    trainer.resource_pool_manager.is_leased, trainer.rollout = False, lambda: None
    trainer.step({}, {})
    assert [sorted(call) for call in trainer.actor.calls] == [sorted(KEYS)]
    assert trainer._rollout_metrics == {}


def test_after_a_failed_chunk_the_step_is_as_without_fusion(trainer: Step) -> None:
    def fail_beside_the_rollout() -> None:
        fusion = trainer._fusion
        assert fusion is not None and fusion._thread is not None
        fusion._thread.join(10)
        trainer.reference.failure = None

    trainer.reference.failure = RuntimeError("out of memory")
    trainer.rollout = fail_beside_the_rollout
    trainer.step({}, {})
    assert trainer.reference.calls[-1] == list(KEYS), "in verl's order"
    assert trainer._rollout_metrics["rlhfless/fusion_failed"] == 1
    assert trainer._rollout_metrics["rlhfless/fused_samples"] == 0


def test_a_rollout_that_fails_leaves_no_thread_behind(trainer: Step) -> None:
    def fail() -> None:
        raise RuntimeError("no replica")

    trainer.rollout = fail
    with pytest.raises(RuntimeError, match="no replica"):
        trainer.step({}, {})
    assert trainer._fusion is None and not trainer._memory.is_open
