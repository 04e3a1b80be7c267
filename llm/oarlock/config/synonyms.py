"""Names of options in other training suites: LLaMA-Factory, axolotl, transformers' Trainer, TRL, PEFT, ms-swift,
torchtune, Megatron-LM, DeepSpeed, Lightning, and PaddleNLP's older scripts.

The error for an unknown option in this table names Oarlock's option, and its value if that differs.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from oarlock.config.finetune import FinetuneConfig
from oarlock.config.options import FALSE_WORDS, TRUE_WORDS, list_option_specs
from oarlock.config.pretrain import PretrainConfig

_PERCENT = "use validation_split with a fraction (0.05) or a number of records"
_LENGTHS = (
    "cutoff_len max_length max_len max_seq_len seq_len seq_length sequence_len sequence_length block_size "
    "model_max_length context_length"
)
# Option (or several) -> other names with the same values. A name may occur once per entrypoint.
SAME = {
    "model_name_or_path": "model model_name model_id model_path model_dir model_id_or_path base_model base_model_name "
    "base_model_name_or_path pretrained_model_name_or_path checkpoint_path from_pretrained",
    "tokenizer_name_or_path": "tokenizer tokenizer_name tokenizer_path tokenizer_dir tokenizer_model",
    "dataset_name_or_path": "dataset datasets dataset_name dataset_path dataset_dir dataset_id data data_dir data_file "
    "data_files data_path train_data train_file train_dataset train_data_path task_name task_name_or_path",
    "input_dir": "dataset datasets dataset_path dataset_dir data data_dir data_path data_prefix train_data train_file "
    "train_data_path dataset_name_or_path",
    "validation_split": "val_size val_set_size split_dataset_ratio eval_split_ratio test_size dev_size eval_size "
    "val_split eval_split_size validation_ratio validation_fraction eval_ratio val_ratio",
    "columns": "column_map column_mapping column_names columns_mapping field_mapping",
    "data_format": "dataset_format dataset_type formatting prompt_style record_format",
    "data_cache_dir": "cache_dir dataset_prepared_path tokenized_path",
    "chat_template": "template template_type template_name prompt_template prompt_type chat_format conv_template "
    "conversation_template",
    "src_length": "max_source_length max_src_length max_prompt_length max_input_length source_max_len src_len",
    "tgt_length": "max_target_length max_tgt_length max_completion_length max_new_tokens target_max_len tgt_len "
    "max_output_length",
    "src_length tgt_length": f"{_LENGTHS} max_seq_length",
    "max_seq_length": f"{_LENGTHS} src_length tgt_length",
    "packing": "sample_packing neat_packing pack_sequences intokens multipack use_packing",
    "packing_length": "pack_length packing_len",
    "lora": "use_lora use_peft lora_enable enable_lora",
    "qlora": "use_qlora load_in_4bit use_4bit",
    "r": "lora_r lora_dim lora_rank_dim rank",
    "lora_alpha": "alpha lora_scale",
    "lora_dropout": "lora_drop lora_p",
    "lora_target_modules": "lora_target target_modules lora_modules lora_attn_modules",
    "rslora": "use_rslora",
    "lora_plus_scale": "loraplus_lr_ratio lora_plus_lr_ratio lorap_lr_ratio",
    "weight_quantize_algo": "bnb_4bit_quant_type quantization_type",
    "qlora_weight_double_quant": "double_quantization bnb_4bit_use_double_quant double_quant",
    "num_prefix_tokens": "pre_seq_len prefix_length prefix_len",
    "num_virtual_tokens": "virtual_tokens prompt_length",
    "adapter_name_or_path": "adapters adapter_path adapter_dir lora_model_dir lora_path lora_weights peft_path "
    "peft_model prefix_path lora_checkpoint",
    "merge_weights": "merge_lora merge_adapter merge_and_unload",
    "per_device_train_batch_size": "batch_size train_batch_size per_device_batch_size micro_batch_size "
    "per_gpu_train_batch_size device_train_batch_size train_micro_batch_size_per_gpu device_batch_size bs",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size per_gpu_eval_batch_size device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps accumulation_steps "
    "accumulate_grad_batches grad_accum_steps",
    "dataloader_num_workers": "num_workers dataloader_workers",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs train_epochs epoch",
    "max_steps": "train_iters total_steps num_train_steps num_steps max_iters max_train_steps num_training_steps "
    "max_steps_per_run train_steps iterations iters",
    "learning_rate": "lr base_lr max_lr peak_lr",
    "min_learning_rate": "min_lr lr_min eta_min final_lr end_lr",
    "lr_scheduler_type": "lr_scheduler scheduler scheduler_type lr_schedule lr_decay_style schedule_type",
    "warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_iters lr_warmup_iters warmup_step",
    "warmup_ratio": "warmup_proportion lr_warmup_fraction warmup_fraction warm_up_ratio",
    "decay_steps": "lr_decay_steps lr_decay_iters decay_iters",
    "weight_decay": "wd decay l2",
    "max_grad_norm": "grad_clip clip_grad max_norm gradient_clip_val clip_grad_norm gradient_clipping grad_norm_clip "
    "gradient_clip",
    "adam_beta1": "beta1 adam_b1",
    "adam_beta2": "beta2 adam_b2",
    "adam_epsilon": "eps adam_eps epsilon",
    "do_train": "train",
    "do_eval": "evaluate do_evaluate do_validation do_predict eval",
    "eval_steps": "eval_interval eval_every eval_freq val_check_interval eval_iters evaluation_steps "
    "evals_per_step valid_steps",
    "max_evaluate_steps": "eval_samples max_eval_steps limit_val_batches max_eval_batches",
    "do_generation": "predict_with_generate do_generate",
    "metric_for_best_model": "best_metric metric monitor",
    "early_stopping_patience": "patience early_stopping early_stopping_steps",
    "output_dir": "output out_dir save_dir save_path output_path checkpoint_dir save_folder output_folder "
    "ckpt_output_dir default_root_dir",
    "overwrite_output_dir": "overwrite overwrite_output",
    "save_strategy": "checkpoint_strategy",
    "save_steps": "save_interval save_every save_freq checkpointing_steps checkpoint_interval checkpoint_every",
    "save_total_limit": "keep_last_n max_checkpoints keep_checkpoints save_last_n total_limit",
    "load_best_model_at_end": "load_best_model load_best",
    "async_save": "async_checkpoint async_checkpointing",
    "resume_from_checkpoint": "resume resume_from resume_path resume_checkpoint resume_from_checkpoint_path load "
    "auto_resume_from_checkpoints",
    "logging_steps": "log_interval log_every log_freq log_every_n_steps logging_interval print_every log_steps",
    "logging_dir": "log_dir tensorboard_dir tensorboard_log_dir vdl_dir",
    "report_to": "logger tracker log_with",
    "disable_tqdm": "no_progress_bar",
    "bf16": "use_bf16 bfloat16",
    "fp16": "use_fp16 float16 half",
    "scale_loss": "loss_scale initial_loss_scale init_loss_scale initial_scale_power",
    "amp_master_grad": "master_grad",
    "fp16_opt_level": "amp_level opt_level",
    "recompute": "gradient_checkpointing activation_checkpointing enable_activation_checkpointing use_recompute "
    "checkpoint_activations recompute_activations use_gradient_checkpointing",
    "use_flash_attention": "flash_attention use_flash_attn",
    "use_fused_rms_norm": "fused_rms_norm",
    "tensor_parallel_degree": "tp tp_size tp_degree mp_degree tensor_parallel tensor_parallel_size tensor_parallel_dim "
    "tensor_model_parallel_size model_parallel_size",
    "pipeline_parallel_degree": "pp pp_size pp_degree pipeline_parallel pipeline_parallel_size "
    "pipeline_model_parallel_size",
    "virtual_pp_degree": "vpp virtual_pipeline_model_parallel_size num_virtual_stages",
    "expert_parallel_degree": "ep ep_size ep_degree expert_parallel expert_parallel_size expert_model_parallel_size "
    "moe_expert_parallel_size",
    "sharding_parallel_degree": "sharding_size fsdp_size data_parallel_shard_degree",
    "sequence_parallel": "use_sequence_parallel",
    "device": "device_type accelerator",
    "num_threads": "threads cpu_threads omp_num_threads",
    "collective_timeout": "ddp_timeout distributed_timeout nccl_timeout",
    "seed": "random_seed data_seed seed_everything rng_seed",
    "split": "train_valid_test_split split_ratio",
    "allow_pickle_weights": "allow_pickle",
    "model_type": "model_family",
    "skip_bad": "skip_errors ignore_errors",
}
# Names whose values differ: name -> (value there -> options here, hint for all other values). "yes" and "no" stand for
# all words of that meaning.
_TRUE, _FALSE = "true", "false"
_METHODS = {
    "lora": {"lora": _TRUE},
    "qlora": {"qlora": _TRUE},
    "prefix": {"prefix_tuning": _TRUE},
    "prefix_tuning": {"prefix_tuning": _TRUE},
    "p_tuning": {"p_tuning": _TRUE},
    "ptuning": {"p_tuning": _TRUE},
}
_PRECISIONS = {
    "bf16": {"bf16": _TRUE},
    "bfloat16": {"bf16": _TRUE},
    "fp16": {"fp16": _TRUE},
    "float16": {"fp16": _TRUE},
    "half": {"fp16": _TRUE},
}
_ZERO = {
    "1": {"sharding": "stage1"},
    "2": {"sharding": "stage2"},
    "3": {"sharding": "stage3"},
    "os": {"sharding": "stage1"},
    "os_g": {"sharding": "stage2"},
    "p_g_os": {"sharding": "stage3"},
    "shard_grad_op": {"sharding": "stage2"},
    "full_shard": {"sharding": "stage3"},
}
_FLASH = {
    "fa2": {"use_flash_attention": _TRUE},
    "flash_attention_2": {"use_flash_attention": _TRUE},
    "flash_attn": {"use_flash_attention": _TRUE},
    "yes": {"use_flash_attention": _TRUE},
    "eager": {"use_flash_attention": _FALSE},
    "sdpa": {"use_flash_attention": _FALSE},
    "no": {"use_flash_attention": _FALSE},
}
_WHEN = {"epoch": {"do_eval": _TRUE}, "steps": {"do_eval": _TRUE, "eval_steps": "N"}, "no": {"do_eval": _FALSE}}
VALUES: dict[str, tuple[dict[str, dict[str, str]], str]] = {
    **dict.fromkeys(
        ("finetuning_type", "train_type", "tuner_type", "sft_type", "adapter", "peft_type", "method", "tuning_type"),
        (_METHODS, "use lora, qlora, prefix_tuning or p_tuning; without one, all weights are trained"),
    ),
    **dict.fromkeys(
        ("mixed_precision", "precision", "torch_dtype", "dtype", "compute_dtype", "model_dtype"),
        (_PRECISIONS, "use bf16 or fp16; without one, the weights are float32"),
    ),
    **dict.fromkeys(
        ("deepspeed", "zero", "zero_stage", "deepspeed_stage", "fsdp", "sharding_stage"),
        (_ZERO, "ZeRO's stages are sharding stage1, stage2 and stage3, without a configuration file"),
    ),
    **dict.fromkeys(
        ("flash_attn", "attn_implementation", "attn_impl"), (_FLASH, "set use_flash_attention to yes or no")
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "val_strategy"),
        (_WHEN, "do_eval evaluates every eval_steps, or at the end of every epoch without eval_steps"),
    ),
    "quantization_bit": ({"4": {"qlora": _TRUE}}, "qlora has 4-bit weights; other widths are not supported"),
    "quant_bits": ({"4": {"qlora": _TRUE}}, "qlora has 4-bit weights; other widths are not supported"),
    **dict.fromkeys(
        ("use_cpu", "no_cuda", "cpu", "force_cpu"),
        ({"yes": {"device": "cpu"}, "no": {"device": "gpu"}}, "set device to cpu or gpu"),
    ),
    "validation_split_percentage": ({"5": {"validation_split": "0.05"}}, _PERCENT),
    "pure_bf16": ({"yes": {"bf16": _TRUE, "fp16_opt_level": "O2"}}, "set bf16 and fp16_opt_level O2"),
}
# Names without a counterpart, and why.
_OPTIMIZER = "AdamW is the only optimizer: drop it"
ABSENT = {
    "optim": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "optimizer_type": _OPTIMIZER,
    "use_adam": _OPTIMIZER,
    "stage": "pretraining (pt) is run_pretrain.py, fine-tuning (sft) is finetune_generation.py, others don't exist",
    "rlhf_type": "only pretraining and supervised fine-tuning are supported",
    "global_batch_size": "it is per_device_train_batch_size x gradient_accumulation_steps x data-parallel ranks: set "
    "the first two",
    "train_on_inputs": "prompts are not trained on; for records with data_format text, all text is",
    "train_on_prompt": "prompts are not trained on; for records with data_format text, all text is",
    "mask_prompt": "prompts are never trained on: drop it",
    "completion_only_loss": "prompts are never trained on: drop it",
    "assistant_only_loss": "only the assistant's messages are trained on: drop it",
    "group_by_length": "examples are not grouped by length; packing avoids padding",
    "trust_remote_code": "code in model folders is never run: drop it",
    "wandb_project": "metrics go to metrics.jsonl and VisualDL (report_to): drop it",
    "use_wandb": "metrics go to metrics.jsonl and VisualDL (report_to): drop it",
    "use_swanlab": "metrics go to metrics.jsonl and VisualDL (report_to): drop it",
    "mix_strategy": 'give weights in dataset_name_or_path: "0.7 a 0.3 b"',
    "interleave_probs": 'give weights in dataset_name_or_path: "0.7 a 0.3 b"',
    "run_name": "a run is identified by its output_dir: drop it",
    "logging_first_step": "logging_steps 1 logs every step",
    "plot_loss": "VisualDL draws the metrics: drop it",
    "preprocessing_num_workers": "records are tokenised once and cached (data_cache_dir): drop it",
    "local_rank": "the launcher sets it: drop it",
    "unified_checkpoint": "every checkpoint can be loaded under every plan: drop it",
    "save_safetensors": "all weights are saved as safetensors: drop it",
    "save_only_model": "the final model in output_dir has no optimizer states; checkpoints do",
    "push_to_hub": "nothing is uploaded: drop it",
    "remove_unused_columns": "records are read according to data_format: drop it",
    "gradient_checkpointing_kwargs": "use recompute_granularity",
    "use_dora": "DoRA is not supported; rslora and lora_plus_scale are",
    "modules_to_save": "LoRA trains only its matrices",
    "freeze_trainable_layers": "all weights are trained, or an adapter (lora, prefix_tuning, p_tuning)",
    "neftune_noise_alpha": "NEFTune is not supported",
    "label_smoothing_factor": "label smoothing is not supported",
    "max_samples": "all records are read: use a smaller file, or --max_steps",
    "max_train_samples": "all records are read: use a smaller file, or --max_steps",
    "eval_dataset": "put a dev file next to the train file, or use validation_split",
    "validation_file": "put a dev file next to the train file, or use validation_split",
    "mask_history": "set the weight of a message to 0 to exclude it from training",
    "hub_model_id": "nothing is uploaded: drop it",
    "device_map": "use tensor_parallel_degree, pipeline_parallel_degree or sharding",
    "nproc_per_node": "it is an option of the launcher: python -m paddle.distributed.launch --devices 0,1,...",
    "context_parallel_size": "context parallelism is not supported; sequence_parallel and packing are",
}


_OPTIONS_BY_NAME: dict[str, list[tuple[str, ...]]] = {}
for _options, _names in SAME.items():
    for _name in _names.split():
        _OPTIONS_BY_NAME.setdefault(_name, []).append(tuple(_options.split()))
_PROGRAMS = {"run_pretrain.py": PretrainConfig, "finetune_generation.py": FinetuneConfig}


def explain_name(name: str, value: Any, options: Collection[str], as_flags: bool) -> str:
    """Explain an unknown name that other suites have, as the end of a sentence; "" if none has it.

    Args:
        name, value: as given; None without a value.
        options: the options of the entrypoint.
        as_flags: write options as flags ("--r 8") instead of keys of a file ("r: 8").
    """
    name = name.lower().replace("-", "_")
    own = _explain_among(name, value, options, as_flags)
    if own or name in options:
        return own
    for program, config_class in _PROGRAMS.items():
        theirs = list_option_specs(config_class)
        if options != theirs.keys() and (name in theirs or _explain_among(name, value, theirs, as_flags)):
            found = _explain_among(name, value, theirs, as_flags)
            return f"in {program}, {found}" if found else f"it is an option of {program}"
    return ""


def _explain_among(name: str, value: Any, options: Collection[str], as_flags: bool) -> str:
    """Explain a name by these options."""
    for same in _OPTIONS_BY_NAME.get(name, ()):
        if all(option in options for option in same):
            return "use " + " and ".join(_spelled(option, "", as_flags) for option in same)
    if name in VALUES:
        values, otherwise = VALUES[name]
        if not all(option in options for row in values.values() for option in row):
            return ""
        word = "yes" if value is None else str(value).strip().lower()
        chosen = values.get(word) or values.get("yes" if word in TRUE_WORDS else "no" if word in FALSE_WORDS else "")
        if chosen is None:
            return otherwise
        return "use " + " and ".join(_spelled(option, value, as_flags) for option, value in chosen.items())
    return ABSENT.get(name, "")


def _spelled(option: str, value: str, as_flags: bool) -> str:
    if as_flags:
        return f"--{option} {value}".strip()
    return f"{option}: {value}" if value else option
