#!/usr/bin/env bash
# HAPO on Qwen2.5-Math-7B over a Ray cluster with verl 0.9: the paper's batch, full fine-tuning. Not yet run on a cluster.
#
#   pip install "verl[vllm,fsdp]==0.9.*" && pip install --no-deps -e .      on every machine
#   ray start --head             on the first, `ray start --address=HOST:6379` on the others
#   TRAIN=dapo-math-17k.parquet VAL=aime-2024.parquet NODES=4 recipes/verl/hapo_qwen7b.sh [more overrides]
#
# The files are in verl's format: prompt, data_source, reward_model.ground_truth.
set -euo pipefail

plugin=${PLUGIN:-hapo_lite.integrations.verl_cluster}
overrides=(
  # The plug-in: imported in every process, then chosen by name. B is the estimator, C and D are the loss.
  "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=$plugin"
  trainer.v1.trainer_mode=hapo
  algorithm.adv_estimator=hapo
  actor_rollout_ref.actor.policy_loss.loss_mode=hapo

  # A: the agent loop sends the last iteration's signal along, and a logits processor in vLLM takes it.
  actor_rollout_ref.rollout.agent.default_agent_loop=hapo
  '+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=["hapo_lite.integrations.verl_rollout:HapoTemperature"]'
  +ray_kwargs.ray_init.runtime_env.env_vars.VLLM_USE_V2_MODEL_RUNNER="'0'"

  # The base bounds eps_L and eps_R, the dual clip, DAPO's token mean. No KL term, no entropy bonus.
  actor_rollout_ref.actor.clip_ratio_low=0.2
  actor_rollout_ref.actor.clip_ratio_high=0.28
  actor_rollout_ref.actor.clip_ratio_c=10
  actor_rollout_ref.actor.loss_agg_mode=token-mean
  actor_rollout_ref.actor.use_kl_loss=false
  actor_rollout_ref.actor.entropy_coeff=0
  algorithm.use_kl_in_reward=false

  # 512 prompts x 16 completions an iteration, shared by 16 steps of 32 prompts: with one step C and D do nothing.
  data.train_batch_size=512
  actor_rollout_ref.rollout.n=16
  actor_rollout_ref.actor.ppo_mini_batch_size=32
  actor_rollout_ref.actor.optim.lr=1e-6
  "data.train_files=${TRAIN:?a parquet file of problems}"
  "data.val_files=${VAL:?a parquet file of held-out problems}"
  data.max_prompt_length=1024
  data.max_response_length=3072

  # Temperature 1 and no truncation, since the old log-probabilities are taken at it.
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.temperature=1.0
  actor_rollout_ref.rollout.top_p=1.0
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.7

  # verl packs micro-batches by tokens; the gradient does not depend on it.
  "actor_rollout_ref.model.path=${MODEL:-Qwen/Qwen2.5-Math-7B}"
  actor_rollout_ref.model.use_remove_padding=true
  actor_rollout_ref.actor.use_dynamic_bsz=true
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384

  trainer.nnodes="${NODES:-1}"
  trainer.n_gpus_per_node="${GPUS:-8}"
  trainer.project_name=hapo_lite
  trainer.experiment_name=hapo_qwen7b
  'trainer.logger=[console]'
  trainer.val_before_train=true
  trainer.test_freq=10
  trainer.save_freq=20
)
VERL_USE_EXTERNAL_MODULES=$plugin exec python3 -m verl.trainer.main_ppo "${overrides[@]}" "$@"
