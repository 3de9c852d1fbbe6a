#!/usr/bin/env bash
# GRPO on GSM8K, Qwen2.5-7B-Instruct, one node of 8 GPUs.
# Usage: examples/grpo_gsm8k_qwen2_5_7b.sh stock|elastic|resident [OVERRIDE]...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

recipe=(
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    data.train_files="$DATA/gsm8k/train.parquet"
    data.val_files="$DATA/gsm8k/test.parquet"
    data.train_batch_size=512
    data.max_prompt_length=1024
    data.max_response_length=1024
    data.filter_overlong_prompts=True
    data.truncation=error
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-7B-Instruct}"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=256
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24576
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.001
    actor_rollout_ref.actor.kl_loss_type=low_var_kl
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=5
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=24576
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=24576
    actor_rollout_ref.ref.fsdp_config.param_offload=True
    trainer.critic_warmup=0
    trainer.logger='["console","file"]'
    trainer.project_name=rlhfless_examples
    trainer.experiment_name=grpo_gsm8k_qwen2_5_7b
    trainer.n_gpus_per_node=8
    trainer.nnodes=1
    trainer.save_freq=20
    trainer.test_freq=5
    trainer.total_epochs=15
)

elastic=(
    +rlhfless=default
    # As many GPUs as stock: the trainer gives its lease back during a rollout (its state waits in host memory), and
    # replicas lease them meanwhile. How many, and of which size, is planned for each step. Where short answers do not
    # repay that, replicas run beside the trainer, for which an engine's share of the memory stays what stock gives it.
    rlhfless.pool.max_gpus=8
    # Last, because the last override wins: a recipe that sets the mode itself would run stock verl.
    trainer.v1.trainer_mode=rlhfless_sync
)

run "$@"
