"""verl's own post-processing, on what fusion hands it: the batch and the metrics of an unfused step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.v1 import trainer_base

from tests.unit.live.fusion_fakes import FakeGroup, FakeQueue
from verl_rlhfless.live import fusion_recall
from verl_rlhfless.live.fusion_trainer import FusionTrainer, phases_of

LENGTHS = {f"u{group}_{session}_0": 4 + group + session for group in range(2) for session in range(4)}
KEYS = tuple(LENGTHS)
PROMPT_TOKENS = 3
PHASES = ("_compute_old_log_prob", "_compute_ref_log_prob", "_compute_values")
_waited: list[str] = []
RESULTS = ("old_log_probs", "entropy", "ref_log_prob", "values")


class CriticGroup(FakeGroup):
    """verl's critic does not wait: it returns futures."""

    def infer_batch(self, batch: Any) -> Any:
        self.compute_log_prob(batch)
        return SimpleNamespace(futures=list(batch.keys))


class Recipe(FusionTrainer):
    """PPO with a reference, on fake worker groups."""

    def __init__(self, queue: FakeQueue) -> None:
        actor = {"loss_agg_mode": "token-mean", "loss_scale_factor": None, "use_kl_loss": True}
        rollout = {"temperature": 1.0, "calculate_log_probs": False, "log_prob_use_dynamic_bsz": True}
        ref, critic = {"log_prob_use_dynamic_bsz": True}, {"use_dynamic_bsz": True, "ppo_micro_batch_size_per_gpu": 1}
        model = {"actor": actor, "rollout": rollout, "ref": ref}
        self.config = OmegaConf.create({"actor_rollout_ref": model, "critic": critic, "algorithm": {}})
        self.ref_in_actor = False
        self.actor_rollout_wg = FakeGroup(queue, ("log_probs", "entropy"))
        self.ref_policy_wg, self.critic_wg = FakeGroup(queue), CriticGroup(queue, ("values",))
        self.ref_policy_wg.factor, self.critic_wg.factor = 3.0, 5.0
        self._memory = fusion_recall.InferenceMemory()
        self._phases = {phase.method: phase for phase in phases_of(self.config, True, False, True)}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> FakeQueue:
    made = FakeQueue()
    waits = SimpleNamespace(get=_waited.extend)
    for module in (trainer_base, fusion_recall):
        monkeypatch.setattr(module, "tq", made)
        monkeypatch.setattr(module, "ray", waits)
    _waited.clear()
    for key, tokens in LENGTHS.items():
        made.finish(key, tokens=PROMPT_TOKENS + tokens)
        mask = {"response_mask": torch.nested.as_nested_tensor([torch.ones(tokens)], layout=torch.jagged)}
        made.kv_batch_put([key], "train", TensorDict(mask, batch_size=1))
    return made


def infer(trainer: Recipe, queue: FakeQueue, keys: tuple[str, ...]) -> dict[str, Any]:
    """Run the phases on a batch as verl does, and return the metrics."""
    batch, metrics = queue.batch(*keys), dict[str, Any]()
    for phase in PHASES:
        batch = getattr(trainer, phase)(batch, metrics)
    return metrics


def results(queue: FakeQueue) -> dict[tuple[str, str], list[float]]:
    return {(key, name): queue.fields[key][name].tolist() for key in KEYS for name in RESULTS}


def test_a_fused_step_ends_with_the_batch_and_the_metrics_of_an_unfused_one(queue: FakeQueue) -> None:
    alone = infer(Recipe(queue), queue, KEYS)
    expected = results(queue)
    for key in KEYS:
        for name in (*RESULTS, "log_probs"):
            queue.fields[key].pop(name)
    fused = Recipe(queue)
    fused._memory.is_open = True
    infer(fused, queue, KEYS[3:1:-1])
    infer(fused, queue, KEYS[5:7])
    fused._memory.is_open = False
    metrics = infer(fused, queue, KEYS)
    assert results(queue) == expected
    assert metrics == alone and "actor/entropy" in alone
    assert sorted(_waited) == sorted([*KEYS, *KEYS]), "unfused and fused, the critic is waited for"
    for group in (fused.actor_rollout_wg, fused.ref_policy_wg, fused.critic_wg):
        assert sorted(key for call in group.calls for key in call) == sorted(KEYS), "each sample once in each phase"


def test_results_differ_between_phases_and_samples(queue: FakeQueue) -> None:
    infer(Recipe(queue), queue, KEYS)
    found = {tuple(values) for values in results(queue).values()}
    assert len(found) == len(KEYS) * len(RESULTS), "else the test above would prove little"
