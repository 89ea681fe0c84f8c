"""TRL's names: which option means the same, which need nothing in their place, and what takes the place of the others.

A field that needs more than another name is read in the modules beside this one.
"""

from __future__ import annotations

SAME = {
    "adam_beta1": "train.adam_beta1",
    "adam_beta2": "train.adam_beta2",
    "adam_epsilon": "train.adam_epsilon",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "learning_rate": "train.learning_rate",
    "max_grad_norm": "train.max_grad_norm",
    "output_dir": "train.output_dir",
    "resume_from_checkpoint": "train.resume_from_checkpoint",
    "run_name": "track.run_name",
    "seed": "train.seed",
    "trust_remote_code": "model.trust_remote_code",
    "weight_decay": "train.weight_decay",
}
"""Every kind of run."""

SAMPLED = {
    "cast_lm_head_to_fp32": "model.float32_head",
    "chat_template_kwargs": "data.chat_template_kwargs",
    "max_completion_length": "rollout.max_completion_length",
    "max_prompt_length": "data.max_prompt_length",
    "num_generations": "rollout.num_generations",
    "shuffle_dataset": "data.shuffle",
    "temperature": "rollout.temperature",
    "top_k": "rollout.top_k",
    "top_p": "rollout.top_p",
}
"""Runs whose policy samples."""

POLICY_GRADIENT = {
    "entropy_coef": "algo.entropy_coef",
    "mask_truncated_completions": "algo.mask_truncated_completions",
    "num_iterations": "algo.num_iterations",
    "off_policy_mask_threshold": "algo.off_policy_mask_threshold",
    "scale_rewards": "algo.baseline.scale",
    "top_entropy_quantile": "algo.top_entropy_quantile",
}
"""GRPO and its relatives."""

ROWS = {
    "ld_alpha": "algo.ld_alpha",
    "max_length": "algo.max_length",
    "precompute_ref_log_probs": "algo.precompute_ref_log_probs",
    "use_weighting": "algo.use_weighting",
}
"""DPO and KTO."""

MORE = [
    "do_eval", "metric_for_best_model",
    "beta", "bf16", "delta", "desirable_weight", "disable_dropout", "discopop_tau", "epsilon", "epsilon_high",
    "eval_on_start", "eval_steps", "eval_strategy", "f_alpha_divergence_coef", "f_divergence_type",
    "generation_batch_size", "gradient_accumulation_steps", "greater_is_better", "importance_sampling_level",
    "label_smoothing", "load_best_model_at_end", "loss_type", "loss_weights", "lr_scheduler_type", "max_steps",
    "model_init_kwargs", "multi_objective_aggregation", "num_generations_eval", "num_train_epochs", "optim",
    "per_device_train_batch_size", "project", "report_to", "reward_weights", "sapo_temperature_neg",
    "sapo_temperature_pos", "save_steps", "save_strategy", "save_total_limit", "steps_per_generation",
    "train_sampling_strategy", "undesirable_weight", "use_bias_correction_kl", "use_vllm", "vespo_k_neg",
    "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization",
    "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_max_model_length", "vllm_mode",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_tensor_parallel_size", "warmup_ratio", "warmup_steps",
]  # fmt: skip
"""Fields that need more than another name; the modules beside this one read them."""

USUAL = {
    "beta": 0.0,
    "epsilon": 0.2,
    "generation_batch_size": None,
    "gradient_accumulation_steps": 1,
    "logging_steps": 10,
    "lr_scheduler_type": "linear",
    "max_steps": -1,
    "num_generations": 8,
    "num_iterations": 1,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "steps_per_generation": None,
    "use_bias_correction_kl": True,
    "vllm_mode": "colocate",
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0,
}
"""TRL's defaults, for the fields that a dictionary leaves out but that belong to one that it has."""

_BATCHES = "batches are planned by train.max_tokens_per_micro_batch"
_SHOWN = "every step is logged"
_TEXTS = "rollouts.jsonl holds every completion (track.save_rollouts)"
_DDP = "the learner adds up gradients itself"
_DATA = "rows are read once, before training"

NOT_NEEDED = {
    "average_tokens_across_devices": "denominators are global",
    "batch_eval_metrics": _BATCHES,
    "cache_implementation": "the engine has its own cache",
    "dataloader_drop_last": "the sampler goes on into the next epoch",
    "dataloader_in_order": _DATA,
    "dataloader_multiprocessing_context": _DATA,
    "dataloader_num_workers": _DATA,
    "dataloader_persistent_workers": _DATA,
    "dataloader_pin_memory": _DATA,
    "dataloader_prefetch_factor": _DATA,
    "dataset_num_proc": _DATA,
    "ddp_broadcast_buffers": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "ddp_find_unused_parameters": _DDP,
    "ddp_static_graph": _DDP,
    "ddp_timeout": "processes wait for each other long enough",
    "disable_tqdm": "track.console chooses what is shown",
    "do_predict": "`llmrl eval` samples from a trained model",
    "do_train": "train() trains",
    "ds3_gather_for_generation": "the engine holds whole weights",
    "enable_jit_checkpoint": "train.save_steps saves checkpoints",
    "eval_accumulation_steps": _BATCHES,
    "eval_do_concat_batches": _BATCHES,
    "eval_use_gather_object": _BATCHES,
    "full_determinism": "a run on one process repeats bit for bit anyway",
    "gradient_checkpointing_kwargs": "transformers chooses how to recompute",
    "hub_always_push": "nothing is pushed",
    "hub_private_repo": "nothing is pushed",
    "hub_strategy": "nothing is pushed",
    "include_for_metrics": "metrics.jsonl has what is measured",
    "include_num_input_tokens_seen": "rollout/num_tokens is logged",
    "label_names": "the columns of the data are found by name",
    "length_column_name": _BATCHES,
    "liger_kernel_config": "logits are computed in parts anyway",
    "local_rank": "the launcher says it",
    "log_completions": _TEXTS,
    "log_level": "track.console chooses what is shown",
    "log_level_replica": "track.console chooses what is shown",
    "log_multimodal": _TEXTS,
    "log_on_each_node": "the main process writes",
    "log_unique_prompts": _TEXTS,
    "logging_dir": "trackers write in train.output_dir",
    "logging_first_step": _SHOWN,
    "logging_nan_inf_filter": "a loss that is not finite is recorded as such",
    "logging_steps": _SHOWN,
    "logging_strategy": _SHOWN,
    "num_completions_to_print": _TEXTS,
    "overwrite_output_dir": "a folder that holds a run is never written over",
    "pad_to_multiple_of": "sequences are packed",
    "padding_free": "sequences are packed (train.packing)",
    "per_device_eval_batch_size": _BATCHES,
    "precompute_ref_batch_size": _BATCHES,
    "prediction_loss_only": "eval/... has what is measured",
    "remove_unused_columns": "rewards get every column that they name",
    "restore_callback_states_from_checkpoint": "a resumed run repeats the interrupted one bit for bit",
    "save_on_each_node": "the main process writes",
    "save_only_model": "model/ has the model alone; checkpoints hold what resuming needs",
    "save_safetensors": "models are saved as safetensors",
    "skip_memory_metrics": "memory is not measured",
    "torch_empty_cache_steps": "micro-batches have a bounded size (train.max_tokens_per_micro_batch)",
    "use_cache": "the engine has its own cache",
    "use_liger_kernel": "logits are computed in parts anyway",
    "use_transformers_continuous_batching": "the hf engine batches continuously",
    "use_transformers_paged": "the hf engine batches continuously",
    "transformers_continuous_batching_config": "the hf engine batches continuously (rollout.max_num_seqs)",
    "vllm_group_port": "the port of a weight transfer is chosen when it begins",
    "vllm_model_impl": "rollout.vllm.extra passes arguments on to vLLM",
}
"""Fields that change nothing in what is trained, and why they need nothing in their place. A line says so."""

_HUB = "write the model with `llmrl export`, then upload that folder (`hf upload`)"
_SCALE = "launch with `accelerate launch`, which reads a configuration of accelerate; this version trains with DDP"
_ENTROPY = "the weight of the entropy is constant: use entropy_coef alone"
_SYNC = "the reference of a policy gradient stays: use DPO or KTO (algo.reference), or leave it out"
_SAMPLE = "rollouts are drawn from the policy itself, or every probability ratio would be biased: leave it out"
_QUANT = 'load the base in 4 bits with model.quantization "nf4"'

INSTEAD = {
    "accelerator_config": _SCALE,
    "activation_offloading": "use gradient_checkpointing",
    "auto_find_batch_size": "train.max_tokens_per_micro_batch bounds the memory of a pass, whatever the batch",
    "bf16_full_eval": "evaluation computes in model.dtype: leave it out",
    "data_seed": "train.seed fixes every random number of the run: use seed",
    "ddp_backend": _SCALE,
    "debug": "leave it out",
    "deepspeed": _SCALE,
    "dispatch_batches": _SCALE,
    "entropy_coef_delta": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_target": _ENTROPY,
    "eval_delay": "evaluation begins with the first eval_steps: leave it out",
    "fp16": "use bf16: half precision without loss scaling is not supported",
    "fp16_full_eval": "evaluation computes in model.dtype: leave it out",
    "fsdp": _SCALE,
    "fsdp_config": _SCALE,
    "generation_kwargs": _SAMPLE,
    "group_by_length": "sequences are packed by length in any case: leave it out",
    "hub_model_id": _HUB,
    "hub_revision": _HUB,
    "hub_token": _HUB,
    "ignore_data_skip": "a resumed run goes on exactly where it stopped: leave it out",
    "label_smoothing_factor": "the preference loss has label_smoothing; others have none",
    "log_completions_hub_repo": "rollouts.jsonl holds every completion: upload that file",
    "lr_scheduler_kwargs": "schedules are plain: train.lr_scheduler_type constant, linear or cosine",
    "max_tool_calling_iterations": "rollouts have one turn: tools are not there yet",
    "min_p": _SAMPLE,
    "neftune_noise_alpha": "embeddings get no noise: leave it out",
    "optim_args": "AdamW is the optimizer: leave it out",
    "optim_target_modules": "AdamW is the optimizer: leave it out",
    "pad_token": "set it on the tokenizer (processing_class)",
    "parallelism_config": _SCALE,
    "push_to_hub": _HUB,
    "ref_model_mixup_alpha": _SYNC,
    "ref_model_sync_steps": _SYNC,
    "reference_free": 'use loss_type "simpo" or "orpo" (algo.loss.kind), which need no reference',
    "repetition_penalty": _SAMPLE,
    "router_aux_loss_coef": "the loss has no term for the balance of experts: leave it out",
    "sync_ref_model": _SYNC,
    "tf32": "call torch.set_float32_matmul_precision before training",
    "torch_compile": "models are not compiled here: leave it out",
    "torch_compile_backend": "models are not compiled here: leave it out",
    "torch_compile_mode": "models are not compiled here: leave it out",
    "trackio_bucket_id": "set it in trackio's environment",
    "trackio_space_id": "set TRACKIO_SPACE_ID in the environment",
    "trackio_static_space_id": "set it in trackio's environment",
    "truncation_mode": "sequences are cut at their end (keep_start): shorten prompts before training",
    "use_adaptive_entropy": _ENTROPY,
    "use_cpu": "set ACCELERATE_USE_CPU=true in the environment",
    "vllm_structured_outputs_regex": _SAMPLE,
    "quantization_config": _QUANT,
}
"""Fields that are refused, and what takes their place."""

MODEL = {
    "attn_implementation": "model.attn_implementation",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
}
"""Entries of `model_init_kwargs` and the options that mean the same. `dtype` becomes `model.dtype`."""
