"""What settings of TRL, Unsloth, verl and open-r1 are called here, for whoever brings a recipe from there."""

from __future__ import annotations

_NONE = "hapo_lite has no such setting: "

_WHOLE_LAYERS = (
    _NONE + "every weight of the base stays frozen, because the head gives no gradient to its own weight, samplers are "
    "handed the adapter alone, and a divergence is from the base without it; model.lora.targets takes more layers"
)

OURS = {
    # TRL's GRPOConfig, and what open-r1 and Unsloth's notebooks pass to it
    "num_generations": "rollout.completions_per_prompt",
    "num_generations_eval": "evaluation.samples",
    "generation_batch_size": "rollout.prompts_per_iteration times rollout.completions_per_prompt",
    "steps_per_generation": "training.updates_per_iteration",
    "num_iterations": _NONE + "each completion is used once, in training.updates_per_iteration optimiser steps",
    "per_device_train_batch_size": "training.micro_batch_tokens (memory) and rollout.prompts_per_iteration (learning)",
    "per_device_eval_batch_size": "rollout.batch_size",
    "gradient_accumulation_steps": "training.updates_per_iteration; training.micro_batch_tokens sets memory alone",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "beta": "method.kl_certain and method.kl_uncertain, 0 unless they are set",
    "epsilon": "method.eps_low and method.eps_high",
    "epsilon_high": "method.eps_high",
    "delta": "method.dual_clip",
    "loss_type": "method, the name of a preset such as dr_grpo, and method.loss_average",
    "scale_rewards": "method.scale: group, batch or none",
    "importance_sampling_level": "method.surrogate: clip for token, sequence for sequence (method=gspo)",
    "sapo_temperature_pos": "method.gate_positive",
    "sapo_temperature_neg": "method.gate_negative",
    "vllm_importance_sampling_correction": "method.importance=truncated",
    "vllm_importance_sampling_cap": "method.importance_cap",
    "top_entropy_quantile": "method.quantile with method.trained_tokens=uncertain",
    "mask_truncated_completions": "method.truncated=mask",
    "reward_funcs": "reward.functions",
    "reward_weights": "reward.functions, where each has its weight",
    "multi_objective_aggregation": "reward.combine: sum, or normalise_each for normalize_then_sum",
    "min_p": "rollout.min_p",
    "repetition_penalty": _NONE + "sampling is from the policy's own distribution",
    "use_vllm": "rollout.engine=vllm",
    "vllm_mode": "rollout.engine=vllm, which shares the GPU with training",
    "vllm_gpu_memory_utilization": "rollout.engine_memory",
    "use_transformers_paged": "rollout.engine=paged",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup_updates",
    "warmup_steps": "training.warmup_updates",
    "max_steps": "training.iterations; an iteration makes training.updates_per_iteration steps",
    "num_train_epochs": "training.iterations; an iteration takes rollout.prompts_per_iteration prompts",
    "optim": "training.optimizer",
    "adam_beta1": _NONE + "AdamW has its usual betas",
    "adam_beta2": _NONE + "AdamW has its usual betas",
    "gradient_checkpointing_kwargs": "model.gradient_checkpointing",
    "bf16": "model.dtype=bf16",
    "fp16": "model.dtype=fp16",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "attn_implementation": "model.attention",
    "load_in_4bit": "model.quantization=nf4",
    "load_in_8bit": _NONE + "model.quantization is nf4 or none",
    "use_peft": _NONE + "an adapter is always what is trained (model.lora)",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_model_dir": "model.adapter",
    "lora_adapter_path": "model.adapter",
    "adapter_name_or_path": "model.adapter",
    "lora_dropout": _NONE + "with dropout the ratios would not begin at 1",
    "lora_target_modules": "model.lora.targets",
    "use_rslora": "model.lora.variant=rslora",
    "use_dora": "model.lora.variant=dora",
    "lora_modules_to_save": _WHOLE_LAYERS,
    "modules_to_save": _WHOLE_LAYERS,
    "chat_template_kwargs": "model.chat_template_options",
    "chat_template": _NONE + "the tokenizer's own template is used; model.chat_template_options reach it",
    "dataset_name": "data.source",
    "dataset_config": "data.config",
    "dataset_train_split": "data.split",
    "dataset_test_split": "evaluation.data.split",
    "dataset_prompt_column": "data.problem_column",
    "dataset_mixture": _NONE + "write one file and name it as data.source",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "save_strategy": "checkpoint.every",
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "do_eval": "evaluation.prompts, where 0 is no evaluation",
    "logging_steps": _NONE + "every iteration is logged",
    "logging_strategy": _NONE + "every iteration is logged",
    "log_completions": "logging.table_rows for a tracker, and logging.traces_per_iteration for the inspector",
    "num_completions_to_print": "logging.table_rows for a tracker, and logging.traces_per_iteration for the inspector",
    "run_name": "name",
    "wandb_project": _NONE + "runs go to the project hapo_lite (logging.report_to)",
    "overwrite_output_dir": _NONE + "choose another name for a new run",
    "resume_from_checkpoint": "checkpoint.resume; the same command goes on where a run was stopped",
    "push_to_hub": _NONE + "hapo_lite.export uploads a finished run with --push NAME",
    "hub_model_id": _NONE + "hapo_lite.export uploads a finished run with --push NAME",
    "hub_private_repo": _NONE + "hapo_lite.export --push uploads privately unless --public is given",
    "ddp_timeout": _NONE + "accelerate launch takes the settings of processes",
    "sync_ref_model": _NONE + "the reference is the base without its adapter",
    # Unsloth
    "max_seq_length": "data.max_prompt_tokens plus rollout.max_new_tokens",
    "fast_inference": "rollout.engine=vllm or rollout.engine=unsloth",
    "gpu_memory_utilization": "rollout.engine_memory",
    "max_lora_rank": "model.lora.rank",
    "r": "model.lora.rank",
    "target_modules": "model.lora.targets",
    "use_gradient_checkpointing": "model.gradient_checkpointing, with model.activation_offload",
    "random_state": "seed",
    "full_finetuning": _NONE + "an adapter is always what is trained (model.lora)",
    # verl
    "rollout.n": "rollout.completions_per_prompt",
    "model.path": "model.name",
    "actor_rollout_ref.rollout.name": "rollout.engine",
    "trainer.logger": "logging.report_to",
    "trainer.project_name": _NONE + "runs go to the project hapo_lite (logging.report_to)",
    "experiment_name": "name",
    "default_local_dir": "output_dir",
    "train_batch_size": "rollout.prompts_per_iteration",
    "gen_batch_size": "rollout.prompts_per_iteration",
    "max_response_length": "rollout.max_new_tokens",
    "train_files": "data.source",
    "val_files": "evaluation.data.source",
    "prompt_key": "data.problem_column",
    "ppo_mini_batch_size": "training.updates_per_iteration, the number of optimiser steps instead of their size",
    "ppo_micro_batch_size": "training.micro_batch_tokens",
    "ppo_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "ppo_max_token_len_per_gpu": "training.micro_batch_tokens",
    "use_dynamic_bsz": _NONE + "micro-batches are always cut by tokens (training.micro_batch_tokens)",
    "ppo_epochs": _NONE + "each completion is used once, in training.updates_per_iteration optimiser steps",
    "log_prob_micro_batch_size_per_gpu": "training.micro_batch_tokens",
    "clip_ratio": "method.eps_low and method.eps_high",
    "clip_ratio_low": "method.eps_low",
    "clip_ratio_high": "method.eps_high",
    "clip_ratio_c": "method.dual_clip",
    "grad_clip": "training.max_grad_norm",
    "clip_cov_ratio": "method.covariance_share",
    "clip_cov_lb": "method.covariance_low",
    "clip_cov_ub": "method.covariance_high",
    "loss_mode": "method.surrogate, or the name of a preset as method",
    "tau_pos": "method.gate_positive",
    "tau_neg": "method.gate_negative",
    "loss_agg_mode": "method.loss_average",
    "adv_estimator": "method, the name of a preset",
    "norm_adv_by_std_in_grpo": "method.scale, where none divides by nothing",
    "kl_loss_coef": "method.kl_certain and method.kl_uncertain",
    "kl_coef": "method.kl_certain and method.kl_uncertain",
    "use_kl_loss": "method.kl_certain and method.kl_uncertain, where 0 is none",
    "use_kl_in_reward": "method.kl_certain and method.kl_uncertain; the divergence is part of the loss",
    "entropy_coeff": "method.entropy_bonus, which is that of Entropy-Adv",
    "filter_groups": "rollout.dynamic_sampling",
    "max_num_gen_batches": "rollout.token_budget",
    "overlong_buffer": "reward.overlong_buffer",
    "overlong_buffer_cfg": "reward.overlong_buffer and reward.overlong_penalty",
    "custom_reward_function": "reward.function",
    "lora_rank": "model.lora.rank",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "tensor_model_parallel_size": _NONE + "a model has to fit one GPU",
    "total_epochs": "training.iterations; an iteration takes rollout.prompts_per_iteration prompts",
    "total_training_steps": "training.iterations",
    "save_freq": "checkpoint.every",
    "test_freq": "evaluation.every",
    "val_before_train": "evaluation.prompts, where 0 is no evaluation",
    "resume_mode": "checkpoint.resume",
    "n_gpus_per_node": _NONE + "accelerate launch takes the settings of processes",
    "nnodes": _NONE + "accelerate launch takes the settings of processes",
}
"""By the last parts of a foreign setting's name: our setting, or why there is none."""

OPTIONS = ("filter_groups", "overlong_buffer_cfg", "overlong_buffer", "chat_template_kwargs", "custom_reward_function")
"""Those of them that hold settings of their own."""
FOREIGN_SECTIONS = ("actor_rollout_ref", "algorithm", "trainer", "critic", "reward_model")
"""Sections of verl's configuration that have no counterpart here."""


def answer_for(name: str) -> str | None:
    """What a setting of another kit is called here, as a clause; None if the name is not known.

    name: as it was written, such as `num_generations` or `actor_rollout_ref.rollout.n`, with or without leading dashes.
    """
    parts = name.lstrip("-+").replace("-", "_").split(".")
    for start in range(len(parts)):
        ours = OURS.get(".".join(parts[start:]))
        if ours is not None:
            return ours if ours.startswith(_NONE) else f"here it is {ours}"
    for part in reversed(parts[:-1]):
        if part in OPTIONS:
            return f"here it is {OURS[part]}"
    if parts[0] in FOREIGN_SECTIONS:
        return f"{parts[0]} is a section of verl; the sections here are listed by --help"
    return None
