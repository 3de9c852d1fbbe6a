#!/usr/bin/env bash
# DAPO on DAPO-Math-17k, Qwen2.5-Math-7B with a context of 32k, two nodes of 8 GPUs: long responses, dynamic sampling.
# Usage: examples/dapo_math_qwen2_5_7b.sh stock|elastic|resident [OVERRIDE]...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

recipe=(
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    # Dynamic sampling: groups whose answers are all right or all wrong are replaced within the step.
    algorithm.filter_groups.enable=True
    algorithm.filter_groups.metric=acc
    data.train_files="$DATA/dapo-math-17k.parquet"
    data.val_files="$DATA/aime-2024.parquet"
    data.prompt_key=prompt
    data.truncation=left
    data.train_batch_size=512
    data.max_prompt_length=2048
    data.max_response_length=8192
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-Math-7B}"
    +actor_rollout_ref.model.override_config.max_position_embeddings=32768
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr=1e-6
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.optim.weight_decay=0.1
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.actor.clip_ratio_c=10.0
    actor_rollout_ref.actor.loss_agg_mode=token-mean
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.grad_clip=1.0
    actor_rollout_ref.actor.ppo_mini_batch_size=32
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    actor_rollout_ref.actor.ulysses_sequence_parallel_size=4
    actor_rollout_ref.actor.fsdp_config.param_offload=True
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=12
    actor_rollout_ref.rollout.temperature=1.0
    actor_rollout_ref.rollout.top_p=1.0
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.gpu_memory_utilization=0.80
    actor_rollout_ref.rollout.enable_chunked_prefill=True
    actor_rollout_ref.rollout.max_num_batched_tokens=10240
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=30720
    actor_rollout_ref.rollout.val_kwargs.do_sample=True
    actor_rollout_ref.rollout.val_kwargs.top_p=0.7
    reward.reward_manager.name=dapo
    +reward.reward_kwargs.overlong_buffer_cfg.enable=True
    +reward.reward_kwargs.overlong_buffer_cfg.len=4096
    +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0
    +reward.reward_kwargs.overlong_buffer_cfg.log=False
    +reward.reward_kwargs.max_resp_len=8192
    trainer.logger='["console","file"]'
    trainer.project_name=rlhfless_examples
    trainer.experiment_name=dapo_math_qwen2_5_7b
    trainer.n_gpus_per_node=8
    trainer.nnodes=2
    trainer.val_before_train=True
    trainer.test_freq=10
    trainer.save_freq=-1
    trainer.total_epochs=10
)

elastic=(
    +rlhfless=default
    # As many GPUs as stock: the trainer gives its lease back during a rollout (its state waits in host memory), and
    # replicas lease them meanwhile. How many, and of which size, is planned for each step.
    rlhfless.pool.max_gpus=16
    # Groups are thrown away after they have finished, so their inference can't begin during the rollout.
    rlhfless/fusion=off
    # While a replica has them, nothing of the trainer is on its GPUs, nor beside one (it is offloaded), and long
    # contexts need the room.
    actor_rollout_ref.rollout.gpu_memory_utilization=0.9
    # Last, because the last override wins: a recipe that sets the mode itself would run stock verl.
    trainer.v1.trainer_mode=rlhfless_sync
)

run "$@"
