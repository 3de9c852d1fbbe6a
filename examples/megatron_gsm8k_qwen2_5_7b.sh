#!/usr/bin/env bash
# GRPO on GSM8K with Megatron, Qwen2.5-7B-Instruct, one node of 8 GPUs.
# Usage: examples/megatron_gsm8k_qwen2_5_7b.sh stock|elastic|resident [OVERRIDE]...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export CUDA_DEVICE_MAX_CONNECTIONS=1

recipe=(
    model_engine=megatron
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    data.train_files="$DATA/gsm8k/train.parquet"
    data.val_files="$DATA/gsm8k/test.parquet"
    data.train_batch_size=1024
    data.max_prompt_length=1024
    data.max_response_length=2048
    data.filter_overlong_prompts=True
    data.truncation=error
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-7B-Instruct}"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.ppo_mini_batch_size=256
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=24576
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.001
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=5
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=24576
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=24576
    actor_rollout_ref.ref.megatron.tensor_model_parallel_size=2
    actor_rollout_ref.ref.megatron.pipeline_model_parallel_size=2
    trainer.balance_batch=True
    trainer.logger='["console","file"]'
    trainer.project_name=rlhfless_examples
    trainer.experiment_name=megatron_gsm8k_qwen2_5_7b
    trainer.n_gpus_per_node=8
    trainer.nnodes=1
    trainer.save_freq=20
    trainer.test_freq=5
    trainer.total_epochs=15
)

elastic=(
    # Only the rollout is elastic: Megatron's ranks keep their GPUs for the whole run, so trainer and replicas share them.
    +rlhfless=default
    # Four GPUs are one copy of the model (2 x 2); the other four are leased for each rollout.
    trainer.n_gpus_per_node=4
    rlhfless.pool.max_gpus=8
    # Replicas have GPUs of their own: nothing of the trainer is beside them.
    actor_rollout_ref.rollout.gpu_memory_utilization=0.85
    # Last, because the last override wins: a recipe that sets the mode itself would run stock verl.
    trainer.v1.trainer_mode=rlhfless_sync
)

run "$@"
