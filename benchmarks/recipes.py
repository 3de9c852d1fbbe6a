"""Short real runs of the recipes that people train with, on our replicas: do they work, and are they right?

Every recipe is the demo's elastic run (tiny Qwen3, real verl, vLLM and Ray, no GPU) with the overrides that make it
that recipe; ``resident`` is the resident fleet, which a reward model on the trainer's own GPUs needs. A run passes when
all its steps end, no sample is missing, engine and trainer agree on every log-prob, every replica served the weights of
its step, nothing is left behind, and the recipe did what it is for (``expects``).

FSDP 1 is not among them: verl synchronises its module states, which torch does on a GPU only.

    python -m benchmarks.recipes [--only tool,dapo]     # about 3 minutes each; writes benchmarks/results/recipes.json

Records of recipes that do not run now are kept, with their commit.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.record import parts_of, write_result
from benchmarks.reward_model import build_reward_model
from benchmarks.scheduled import scheduled
from benchmarks.tiny_models import build_model
from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.demo import recipe
from verl_rlhfless.demo.assets import Assets, arithmetic_problems, build_assets
from verl_rlhfless.demo.run import DemoOptions, run_arm
from verl_rlhfless.report.ab import build_arm
from verl_rlhfless.report.environment import code
from verl_rlhfless.report.guards import GuardLimits, judge

_PARTS, _TOOL = (Path(__file__).with_name(name) for name in ("recipe_parts.py", "recipe_tool.py"))
_RECORD = Path(__file__).with_name("results") / "recipes.json"
_COMMAND = "python -m benchmarks.recipes"
_FP32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
_REFERENCE = (
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.ref.strategy=fsdp2",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.fsdp_config.dtype=float32",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile=False",
    f"+actor_rollout_ref.ref.fsdp_config.mixed_precision={_FP32}",
)
_REWARD_MODEL = (
    "reward.reward_model.enable=True",
    "reward.reward_model.rollout.name=vllm",
    "reward.reward_model.rollout.tensor_model_parallel_size=1",
    "reward.reward_model.rollout.dtype=float32",
    "reward.reward_model.rollout.max_model_len=1024",
    "reward.reward_model.rollout.free_cache_engine=False",
    "+reward.reward_model.rollout.enable_sleep_mode=False",
)
_CRITIC = (
    "algorithm.adv_estimator=gae",
    "critic.strategy=fsdp2",
    "critic.model.path=${actor_rollout_ref.model.path}",
    "+critic.model.override_config.attn_implementation=sdpa",
    "critic.model.use_remove_padding=False",
    "critic.model.enable_gradient_checkpointing=False",
    "critic.ppo_micro_batch_size_per_gpu=8",
    "critic.fsdp.dtype=float32",
    "critic.fsdp.use_torch_compile=False",
    f"+critic.fsdp.mixed_precision={_FP32}",
)


_ELASTIC = scheduled(1, 2)
_RESIDENT = recipe.RESIDENT.with_overrides("trainer.n_gpus_per_node=1")
_FILTERED = (
    "algorithm.filter_groups.enable=True",
    "algorithm.filter_groups.metric=reward",
    f"reward.custom_reward_function.path={_PARTS}",
    "reward.custom_reward_function.name=coarse_score",
)
_TURNS = (
    "actor_rollout_ref.rollout.multi_turn.enable=True",
    "actor_rollout_ref.rollout.multi_turn.format=rlhfless_always",
    f"actor_rollout_ref.rollout.multi_turn.function_tool_path={_TOOL}",
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=3",
    "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
    "data.max_response_length=160",
    f"actor_rollout_ref.rollout.max_model_len={recipe.MAX_PROMPT_TOKENS + 160}",
)
_EVICTED = {"training/filter_groups/evicted_samples": 1}
_MOST_TURNS = {"num_turns/max": 4}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One recipe.

    Attributes:
        overrides: What makes the demo's run this recipe.
        expects: verl metric -> least value in some step that shows that the recipe did what it is for.
        samples: Samples of a step that reach the trainer.
        modules: What every process of the run loads beside verl.
        probs_diff: Most difference of a probability between engine and trainer.
        arm: What the recipe runs on.
        has_reward_model: Whether a tiny reward model is built and scores the samples.
        family: Of the model that is trained (``tiny_models``); ``None`` = the demo's.
    """

    overrides: tuple[str, ...] = ()
    expects: Mapping[str, float] = field(default_factory=dict)
    samples: int = recipe.PROMPTS_PER_STEP * recipe.SAMPLES_PER_PROMPT
    modules: tuple[str, ...] = ()
    probs_diff: float = 1e-6
    arm: Arm = _ELASTIC
    has_reward_model: bool = False
    family: str | None = None


_PLANNED = Recipe(("trainer.n_gpus_per_node=2",), {"rlhfless/predicted_step_s": 1e-9}, arm=recipe.ELASTIC)

RECIPES: Mapping[str, Recipe] = {
    "grpo": Recipe(),
    "grpo-reference": Recipe(_REFERENCE, {"actor/kl_loss": 0.0}),
    "ppo-critic-reference": Recipe(
        (*_CRITIC, *_REFERENCE), {"critic/vf_loss": 1e-9, "actor/kl_loss": 0.0}, modules=("benchmarks.cpu_critic",)
    ),
    "dapo": Recipe(_FILTERED, _EVICTED),
    "tool": Recipe(_TURNS, _MOST_TURNS, modules=("benchmarks.recipe_parts",)),
    "dapo-tool": Recipe((*_FILTERED, *_TURNS), _EVICTED | _MOST_TURNS, modules=("benchmarks.recipe_parts",)),
    "lora": Recipe(
        (
            "actor_rollout_ref.model.lora_rank=8",
            "actor_rollout_ref.model.lora.merge=True",
            "actor_rollout_ref.model.target_modules=all-linear",
        ),
        probs_diff=1e-3,  # verl sends merged adapters as bfloat16, in stock too
    ),
    **{family: replace(_PLANNED, family=family) for family in ("experts", "windows")},
    "validation": Recipe(("trainer.test_freq=1", "trainer.val_before_train=True"), {"val-core": 0.0}),
    "reward-model": Recipe(
        (
            *_REWARD_MODEL,
            f"reward.custom_reward_function.path={_PARTS}",
            "reward.custom_reward_function.name=model_score",
            "reward.reward_model.enable_resource_pool=True",
            "reward.reward_model.nnodes=1",
            "reward.reward_model.n_gpus_per_node=1",
            "rlhfless.pool.max_gpus=3",  # one of the four is the reward model's
        ),
        {"critic/advantages/max": 1e-6},
        has_reward_model=True,
    ),
    "resident": Recipe(arm=_RESIDENT),
    "reward-model-colocated": Recipe(
        (*_REWARD_MODEL, "reward.custom_reward_function.path=null"),
        {"critic/advantages/max": 1e-6, "timing_s/reward": 0.0},
        arm=_RESIDENT,
        has_reward_model=True,
    ),
}
FAST = "dapo-tool"
"""What every run of the test suite trains: several turns with a tool, groups filtered and refilled."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a recipe ran.

    Attributes:
        exit_code: Of verl.
        failed: What is wrong, in words; empty when all is well.
        figures: Greatest value over the steps of each metric in ``expects``.
        step_s: Seconds of each step.
        reward: Mean score of each step.
    """

    exit_code: int
    failed: tuple[str, ...]
    figures: Mapping[str, float]
    step_s: tuple[float, ...]
    reward: tuple[float, ...]


def run_recipe(name: str, assets: Assets, out: Path, steps: int = 2, overrides: tuple[str, ...] = ()) -> Outcome:
    """Train a recipe for some steps on elastic replicas and judge it."""
    chosen = RECIPES[name]
    if chosen.has_reward_model:
        overrides = (f"reward.reward_model.model_path={build_reward_model(assets, out / 'reward-model')}", *overrides)
    if chosen.family:
        model = build_model(chosen.family, assets, out / chosen.family)
        overrides = (f"actor_rollout_ref.model.path={model}", *overrides)
    arm = replace(chosen.arm, name=f"{chosen.arm.name}-{name}").with_overrides(*chosen.overrides, *overrides)
    with _loaded(chosen.modules):
        ended = run_arm(arm, assets, DemoOptions(out=out, steps=steps, arms=("elastic",)), print)
    if ended.exit_code:
        return Outcome(
            ended.exit_code, (f"verl ended with {ended.exit_code}; see {ended.folder}/train.log",), {}, (), ()
        )
    record = build_arm(ended.folder)
    pulling = (arm.name,) if arm.pulls_weights else ()
    limits = GuardLimits(steps, chosen.samples, recipe.NUM_GPUS, pulling, chosen.probs_diff)
    # verl ends its reward model's engine by killing it, which leaves vLLM's shared-memory segments
    leftovers = () if chosen.has_reward_model else ended.leftovers
    guards = judge({arm.name: record}, limits, {arm.name: leftovers})
    metrics = [json.loads(line)["data"] for line in (ended.folder / "metrics.jsonl").read_text().splitlines()]
    figures = {key: _greatest(metrics, key) for key in chosen.expects}
    failed = [f"{guard.name}: {guard.value}, limit {guard.limit}" for guard in guards if not guard.ok]
    failed += leftovers
    failed += [
        f"{key}: {figures[key]}, expected >= {least}"
        for key, least in chosen.expects.items()
        if not figures[key] >= least
    ]
    trained = [data for data in metrics if "timing_s/step" in data]
    return Outcome(
        ended.exit_code,
        tuple(failed),
        figures,
        tuple(data["timing_s/step"] for data in trained),
        tuple(data["critic/score/mean"] for data in trained),
    )


def _greatest(metrics: list[dict[str, Any]], key: str) -> float:
    """Return the greatest value of the metrics whose name begins with ``key``; NaN when there is none."""
    return max(
        (float(value) for data in metrics for name, value in data.items() if name.startswith(key)), default=float("nan")
    )


@contextmanager
def _loaded(modules: tuple[str, ...]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ("VERL_USE_EXTERNAL_MODULES", "PYTHONPATH")}
    if modules:
        root = Path(__file__).parents[1]
        os.environ.update({"VERL_USE_EXTERNAL_MODULES": ",".join(modules), "PYTHONPATH": str(root)})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def main() -> None:
    """Run the recipes one after another, and print how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RECIPES), help="names, separated by commas")
    parser.add_argument("--out", type=Path, help="folder of all logs; without it they are not kept")
    arguments = parser.parse_args()
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="rlhfless-recipes-") as temporary:
        out = arguments.out or Path(temporary)
        assets = build_assets(out.resolve() / "assets", arithmetic_problems(256, seed=1), seed=1)
        for name in arguments.only.split(","):
            outcomes[name] = run_recipe(name, assets, out)
            print(name, "ok" if not outcomes[name].failed else "; ".join(outcomes[name].failed), flush=True)
    before: dict[str, Any] = json.loads(_RECORD.read_text()) if _RECORD.exists() else {"results": {}}
    results = before["results"] | {name: asdict(outcome) for name, outcome in outcomes.items()}
    parts = parts_of(before, before["results"]) | dict.fromkeys(outcomes, code())
    names = [name for name in RECIPES if name in results]
    write_result(
        "recipes",
        {name: results[name] for name in names},
        command=_COMMAND,
        parts={name: parts[name] for name in names},
    )


if __name__ == "__main__":
    main()
