"""The demo's recipe: overrides of ``python -m verl.trainer.main_ppo`` that both arms share, and the few that differ."""

from __future__ import annotations

from pathlib import Path

from verl_rlhfless.ab.arms import Arm
from verl_rlhfless.config import TRAINER_MODE
from verl_rlhfless.demo.assets import Assets

NUM_GPUS = 4
"""GPUs that each arm may lease at any instant: the budget is the same for all."""
PROMPTS_PER_STEP = 8
SAMPLES_PER_PROMPT = 4
MAX_PROMPT_TOKENS = 512
MAX_RESPONSE_TOKENS = 64
STOCK = Arm("stock", (f"trainer.n_gpus_per_node={NUM_GPUS}", "+rlhfless=off"))
ELASTIC = Arm(
    "elastic",
    (
        f"trainer.n_gpus_per_node={NUM_GPUS}",
        "+rlhfless=default",
        f"rlhfless.pool.max_gpus={NUM_GPUS}",
        "rlhfless.weights.bucket_mib=16",  # for a model of 2 MiB on a host with a small object store
        f"trainer.v1.trainer_mode={TRAINER_MODE}",
    ),
    pulls_weights=True,
    is_ours=True,
)
RESIDENT = Arm(
    "resident",
    (f"trainer.n_gpus_per_node={NUM_GPUS}", "+rlhfless=resident", f"trainer.v1.trainer_mode={TRAINER_MODE}"),
    is_ours=True,
)
ARMS = {arm.name: arm for arm in (STOCK, ELASTIC, RESIDENT)}

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB per engine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What a run without a GPU needs: the CPU platform, one thread per process, and no network."""


def common_overrides(assets: Assets, out_dir: Path, steps: int, seed: int) -> list[str]:
    """Return the overrides of every arm."""
    reward = Path(__file__).with_name("reward.py")
    return [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={assets.train}",
        f"data.val_files={assets.validation}",
        f"data.train_batch_size={PROMPTS_PER_STEP}",
        f"data.max_prompt_length={MAX_PROMPT_TOKENS}",
        f"data.max_response_length={MAX_RESPONSE_TOKENS}",
        "data.dataloader_num_workers=0",
        "data.shuffle=False",
        f"data.seed={seed}",
        f"actor_rollout_ref.model.path={assets.model}",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS_PER_STEP}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        f"actor_rollout_ref.actor.fsdp_config.seed={seed}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        f"actor_rollout_ref.rollout.n={SAMPLES_PER_PROMPT}",
        f"actor_rollout_ref.rollout.seed={seed}",
        "actor_rollout_ref.rollout.dtype=float32",
        "actor_rollout_ref.rollout.enforce_eager=True",
        f"actor_rollout_ref.rollout.max_model_len={MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS}",
        "actor_rollout_ref.rollout.max_num_batched_tokens=8192",
        "actor_rollout_ref.rollout.max_num_seqs=32",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16",
        "actor_rollout_ref.rollout.disable_log_stats=False",
        "+actor_rollout_ref.rollout.enable_sleep_mode=False",
        "actor_rollout_ref.rollout.free_cache_engine=False",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={reward}",
        "reward.custom_reward_function.name=compute_score",
        "trainer.device=cpu",
        "trainer.nnodes=1",
        'trainer.logger=["console","file"]',
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        f"trainer.rollout_data_dir={out_dir / 'rollouts'}",
        f"trainer.default_local_dir={out_dir / 'checkpoints'}",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"hydra.run.dir={out_dir / 'hydra'}",
    ]
