"""A cell of the comparison: one trace on one cluster with one model, and its arms, each tuned to its fair best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from verl_rlhfless.errors import ConfigError
from verl_rlhfless.policy.arm import Arm
from verl_rlhfless.policy.baselines.oracle import Oracle, PromptOracle
from verl_rlhfless.policy.baselines.rlhfless_paper import RlhflessPaper
from verl_rlhfless.policy.baselines.rlhfuse import SHARES, Rlhfuse
from verl_rlhfless.policy.baselines.seer import Seer
from verl_rlhfless.policy.baselines.stock import StockSync
from verl_rlhfless.policy.ours import Ours
from verl_rlhfless.policy.perf import Efficiencies, EnginePerf
from verl_rlhfless.policy.plan import Goal
from verl_rlhfless.policy.routing import Routing
from verl_rlhfless.policy.shapes import MODELS, ModelShape, parse_model_config
from verl_rlhfless.policy.snapshot import IntArray, PoolSnapshot
from verl_rlhfless.policy.transitions import LeaseTimes, Recipe, TrainerPerf, optimizer_state_bytes
from verl_rlhfless.sim import shipped
from verl_rlhfless.sim.cluster import Cluster
from verl_rlhfless.sim.records import RunRecord
from verl_rlhfless.sim.run import ArmRun
from verl_rlhfless.sim.workload import StepData

_TUNING_STEPS = 2
"""Steps on which baselines are tuned."""

_STATE_SHARE = 0.9
"""Most of its GPUs' memory that the trainer's state may take: a sleeping engine needs the rest."""

_EIGHTHS = (1, 2, 3, 4, 6, 8)
"""Numbers of actors that the published RLHFless is tuned over, in eighths of those that fit."""

_MOST_CANDIDATES = 24


def load_model(name_or_path: str) -> ModelShape:
    """Return a shipped model by name, or the one that a Hugging Face ``config.json`` describes.

    Raises:
        ConfigError: An unknown name, or a key whose value breaks a rule.
        DataError: The file cannot be read or is no JSON.
    """
    return shipped.load("--model", name_or_path, MODELS, parse_model_config, "the model's config.json")


def make_pool(
    cluster: Cluster, shape: ModelShape, times: LeaseTimes, recipe: Recipe | None = None, context_tokens: int = 0
) -> PoolSnapshot:
    """Return what the cluster can do with the model; engines have to hold one sample of ``context_tokens``.

    Raises:
        ConfigError: Weights, one sample or training state do not fit.
    """
    recipe = recipe or Recipe()
    perf, refused = {}, None
    for tp in shape.legal_tp(cluster.gpus_per_node):
        try:
            one = EnginePerf(shape, cluster.gpu, tp)
            one.check_holds(context_tokens)
        except ConfigError as error:
            refused = error
        else:
            perf[tp] = one
    if not perf:
        rule = "no tensor-parallel size is legal" if refused is None else refused.rule
        action = "Use GPUs with more memory, a smaller model, or a trace with shorter contexts."
        raise ConfigError("--model", shape.name, rule, action) from refused
    need = optimizer_state_bytes(shape, recipe)
    have = _STATE_SHARE * cluster.trainer_gpus * cluster.gpu.memory_bytes
    if need > have:
        raise ConfigError(
            "--cluster",
            cluster.name,
            f"training {shape.name} needs {need / 1e9:.0f} GB, its {cluster.trainer_gpus} GPUs have {have / 1e9:.0f}",
            "Use a larger cluster or a smaller model.",
        )
    trainer = TrainerPerf(shape, cluster.gpu, cluster.trainer_gpus, cluster.gpus_per_node, recipe, times)
    return PoolSnapshot(cluster.num_gpus, cluster.gpus_per_node, perf, trainer, has_kv_transfer=cluster.has_kv_transfer)


@dataclass(frozen=True)
class Cell:
    """One trace, cluster and model.

    Baselines are tuned on the first two steps with true lengths (in their favour), then held.

    Attributes:
        data: The steps of the trace.
        cluster: Nodes and prices.
        shape: The model.
        times: Seconds of leases and starts.
        goal: What our arms optimise; its weight of cost also ranks the baselines' candidates.
        parked_charge: Share of the price that parked engines' GPUs cost.
        seed: Shifts the availability trace of preemptible nodes, and draws the random dispatch.
        recipe: What the trainer computes.
        efficiencies: Of the GPU type, as shipped or as measured.
    """

    data: Sequence[StepData]
    cluster: Cluster
    shape: ModelShape
    times: LeaseTimes
    goal: Goal = field(default_factory=Goal)
    parked_charge: float = 0.0
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    efficiencies: Efficiencies = field(default_factory=Efficiencies)

    @cached_property
    def pool(self) -> PoolSnapshot:
        """What may be leased."""
        longest = max(int(step.batch.prompt_tokens.max()) + step.batch.max_response_tokens for step in self.data)
        pool = make_pool(self.cluster, self.shape, self.times, self.recipe, longest)
        perf = {tp: replace(one, efficiencies=self.efficiencies) for tp, one in pool.perf.items()}
        return replace(pool, perf=perf, trainer=replace(pool.trainer, efficiencies=self.efficiencies))

    def check(self) -> None:
        """Refuse a model or a trace that the cluster cannot hold.

        Raises:
            ConfigError: See ``make_pool``.
        """
        _ = self.pool

    def run(self, arm: Arm) -> RunRecord:
        """Return the record of one arm over all steps."""
        return ArmRun(arm, self.cluster, self.pool, self.data, self.parked_charge, self.seed).run()

    def _short(self, arm: Arm) -> tuple[float, float]:
        """Return an arm's mean seconds and GPU-seconds of the tuning steps."""
        record = ArmRun(arm, self.cluster, self.pool, self.data[:_TUNING_STEPS]).run()
        return _mean(record, "step_s"), _mean(record, "gpu_s_allocated")

    @cached_property
    def best_tp(self) -> int:
        """The best static tensor-parallel size on the first two steps."""
        sizes = [tp for tp in self.pool.perf if tp <= self.pool.trainer.num_gpus]
        return min(sizes, key=lambda tp: (self._short(StockSync(tp))[0], tp))

    def arm(self, name: str) -> Arm:
        """Return an arm by name, tuned.

        Raises:
            ConfigError: No arm has this name.
        """
        if name not in ARMS:
            raise ConfigError("--arms", name, f"must be among {', '.join(ARMS)}", "Correct it.")
        return ARMS[name](self)

    def tuned(self, candidates: Sequence[Arm]) -> Arm:
        """Return the candidate with the least objective on the first two steps; the first one wins ties."""
        step_s, gpu_s = self._short(StockSync(self.best_tp))
        weight = self.goal.cost_weight
        taken = [self._short(arm) for arm in candidates]
        value = [(1 - weight) * t / step_s + weight * g / gpu_s for t, g in taken]
        return candidates[int(np.argmin(value))]

    @property
    def truth(self) -> Mapping[int, IntArray]:
        """True lengths by step."""
        return {step.batch.step: step.lengths for step in self.data}


def _mean(record: RunRecord, name: str) -> float:
    return float(np.mean([getattr(step, name) for step in record.steps]))


def _rlhfuse(cell: Cell) -> Arm:
    """Return RLHFuse with the shares and numbers of targets that are best on the tuning steps."""
    count = cell.pool.trainer.num_gpus // cell.best_tp
    targets = sorted({1, *(max(1, quarters * count // 4) for quarters in (1, 2, 3))})
    return cell.tuned([Rlhfuse(cell.best_tp, share=share, num_targets=m) for share in SHARES for m in targets])


def _paper(cell: Cell) -> Arm:
    """Return the published RLHFless with the size and number of actors that are best on the tuning steps."""
    candidates = []
    for tp in cell.pool.perf:
        most = cell.cluster.num_gpus // tp
        counts = sorted({max(1, eighths * most // 8) for eighths in _EIGHTHS})
        candidates += [RlhflessPaper(count, tp) for count in counts]
    return cell.tuned(candidates[:_MOST_CANDIDATES])


def _dispatch(cell: Cell, name: str, **how: Any) -> Arm:
    """Return what a resident live fleet runs: the best static one, where only dispatch differs from stock's."""
    tp = cell.best_tp
    return Routing((tp,) * (cell.pool.trainer.num_gpus // tp), name=name, **how)


ARMS: dict[str, Callable[[Cell], Arm]] = {
    "stock_sync": lambda cell: StockSync(),
    "stock_sync_best_tp": lambda cell: StockSync(cell.best_tp, "stock_sync_best_tp"),
    "rlhfuse": _rlhfuse,
    "rlhfless_paper": _paper,
    "seer": lambda cell: Seer(cell.best_tp),
    "ours": lambda cell: Ours(cell.goal),
    "ours_notslower": lambda cell: Ours(replace(cell.goal, is_notslower=True), name="ours_notslower"),
    "ours_nofuse": lambda cell: Ours(cell.goal, can_fuse=False, name="ours_nofuse"),
    "oracle": lambda cell: Oracle(cell.goal, lengths=cell.truth),
    "oracle_prompts": lambda cell: PromptOracle(cell.goal, lengths=cell.truth),
    "oracle_notslower": lambda cell: Oracle(
        replace(cell.goal, is_notslower=True), lengths=cell.truth, name="oracle_notslower"
    ),
    "dispatch": lambda cell: _dispatch(cell, "dispatch", migration="cut_and_migrate"),
    "dispatch_equal": lambda cell: _dispatch(cell, "dispatch_equal", learns=False),
    "dispatch_random": lambda cell: _dispatch(cell, "dispatch_random", dispatcher="random", seed=cell.seed),
}
"""Every arm by name."""

DESCRIPTIONS = {
    "stock_sync": "stock verl, synchronous; every engine of the smallest tensor-parallel size that fits",
    "stock_sync_best_tp": "stock verl with the fastest tensor-parallel size on this trace's first steps; always runs",
    "rlhfuse": "RLHFuse: stock's engines, one tuned cut of the tail, inference on the GPUs that this frees",
    "rlhfless_paper": "RLHFless as published: a tuned number of equal leased actors, a local cut",
    "seer": "Seer: stock's engines, probes of each group, divided rollout over a global pool of keys and values",
    "ours": "this package: each step's fleet planned from predicted lengths, cut, migration and fusion where they pay",
    "ours_notslower": "ours for the least cost of a step that takes no longer than the best static fleet's",
    "ours_nofuse": "ours without inference on freed GPUs",
    "oracle": "ours, knowing every length in advance",
    "oracle_prompts": "ours, knowing each prompt's lengths but not which of its samples is long",
    "oracle_notslower": "ours_notslower, knowing every length in advance",
    "dispatch": "the best static fleet with our placement by predicted length, and cut and migration",
    "dispatch_equal": "dispatch without learning lengths and without migration",
    "dispatch_random": "the best static fleet with every request on a random engine",
}
"""What each arm is, in one line."""
