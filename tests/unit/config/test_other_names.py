"""Names of options in other suites."""

from __future__ import annotations

import json
import re

import pytest

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.options import list_option_specs
from oarlock.config.synonyms import ABSENT, SAME, VALUES
from oarlock.errors import ConfigError
from support.published_commands import DO, problems

SUITES = {
    # LLaMA-Factory
    "cutoff_len 2048": "use --src_length and --tgt_length",
    "finetuning_type lora": "use --lora true",
    "finetuning_type full": "without one, all weights are trained",
    "template qwen": "use --chat_template",
    "val_size 0.1": "use --validation_split",
    "validation_split_percentage 3": "use validation_split with a fraction (0.05) or a number of records",
    "flash_attn fa2": "use --use_flash_attention true",
    "quantization_bit 4": "use --qlora true",
    "stage sft": "pretraining (pt) is run_pretrain.py, fine-tuning (sft) is finetune_generation.py",
    "deepspeed ds_z3.json": "sharding stage1, stage2 and stage3, without a configuration file",
    # axolotl
    "base_model x": "use --model_name_or_path",
    "micro_batch_size 2": "use --per_device_train_batch_size",
    "sample_packing true": "use --packing",
    "adapter qlora": "use --qlora true",
    "lora_r 8": "use --r",
    "load_in_4bit true": "use --qlora",
    "sequence_len 512": "use --src_length and --tgt_length",
    # transformers, TRL, PEFT
    "optim adamw_torch": "AdamW is the only optimizer",
    "eval_strategy no": "use --do_eval false",
    "evaluation_strategy steps": "use --do_eval true and --eval_steps N",
    "gradient_checkpointing true": "use --recompute",
    "torch_dtype bfloat16": "use --bf16 true",
    "target_modules q_proj": "use --lora_target_modules",
    "use_rslora 1": "use --rslora",
    "max_seq_length 512": "use --src_length and --tgt_length",
    # ms-swift, torchtune, Lightning, Megatron, DeepSpeed, and commands typed from memory
    "train_type lora": "use --lora true",
    "Batch-Size 4": "use --per_device_train_batch_size",
    "lr 1e-4": "use --learning_rate",
    "epochs 3": "use --num_train_epochs",
    "gradient_clip_val 1": "use --max_grad_norm",
    "warmup 10": "use --warmup_steps",
    "tensor_model_parallel_size 2": "use --tensor_parallel_degree",
    "zero_stage 2": "use --sharding stage2",
    "use_cpu": "use --device cpu",
    # of the other entrypoint
    "num_hidden_layers 4": "it is an option of run_pretrain.py",
    "data_prefix x": "in run_pretrain.py, use --input_dir",
}


@pytest.mark.parametrize("words", SUITES)
def test_option_names_of_other_suites_get_a_hint(tmp_path, words):
    """As a flag, in YAML and in JSON."""
    name, _, value = words.partition(" ")
    expected = SUITES[words]
    said = problems(f"--{name}", *([value] if value else []), kind=FinetuneConfig)
    assert f"unknown flag --{name.replace('-', '_')}: " in said and expected in said
    if not value:
        return
    as_keys = re.sub(r"--(\w+) (?!and)(\w+)", r"\1: \2", expected).replace("--", "")
    for file, text in (("run.yaml", f"{name}: {value}\n"), ("run.json", json.dumps({name: value}))):
        (tmp_path / file).write_text(text)
        with pytest.raises(ConfigError) as error:
            load_config(FinetuneConfig, [str(tmp_path / file), *DO])
        assert f"{file}:1: unknown key {name}: " in str(error.value) and as_keys in str(error.value)


def test_every_hint_names_an_existing_option():
    """Each hint names an existing option with a valid value, and none of our options is shadowed by a foreign name."""
    classes = [list_option_specs(kind) for kind in (FinetuneConfig, PretrainConfig)]
    for options, names in SAME.items():
        assert any(all(option in specs for option in options.split()) for specs in classes), options
        for name in names.split():
            assert not all(name in _spellings(specs) for specs in classes), f"{name} is a name here"
    for values, _ in VALUES.values():
        for chosen in values.values():
            specs = next(specs for specs in classes if all(option in specs for option in chosen))
            for option, value in chosen.items():
                assert value == "N" or specs[option].problem(specs[option].convert(value)) is None
    for name in (*VALUES, *ABSENT):
        assert not any(name in _spellings(specs) for specs in classes), f"{name} is a name here"


def _spellings(specs) -> set[str]:
    return {spelling for name, spec in specs.items() for spelling in (name, *spec.aliases)}


def test_pretraining_hints_name_pretraining_options():
    assert "unknown flag --cutoff_len: use --max_seq_length" in problems("--cutoff_len", "512")
    assert "unknown flag --lora_r: in finetune_generation.py, use --r" in problems("--lora_r", "8")
    assert "unknown flag --lora: it is an option of finetune_generation.py" in problems("--lora")
    assert "unknown flag --dataset: use --input_dir" in problems("--dataset", "x")
