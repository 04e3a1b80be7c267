"""Flags, YAML, their errors, and the published commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.command_line import help_text, read_command_line, to_yaml
from oarlock.config.load import flatten
from oarlock.config.options import option_specs
from oarlock.config.pretrain import parse_split
from oarlock.config.synonyms import ABSENT, SAME, VALUES
from oarlock.errors import ConfigError

DO = ("--do_train",)


def load(*words: str, kind: type = PretrainConfig):
    return load_config(kind, [*DO, *words]).config


def problems(*words: str, kind: type = PretrainConfig) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(kind, [*DO, *words])
    return str(error.value)


@pytest.mark.parametrize("words", [["--recompute"], ["--recompute", "1"], ["--recompute=true"], ["--recompute", "YES"]])
def test_boolean_spellings_that_mean_yes(words):
    assert load(*words).kernels.recompute is True


@pytest.mark.parametrize(
    "words", [[], ["--recompute", "0"], ["--recompute", "False"], ["--recompute", "--no_recompute"]]
)
def test_boolean_spellings_that_mean_no(words):
    assert load(*words).kernels.recompute is False


def test_later_flags_win_and_dashes_are_underscores():
    config = load("--learning-rate", "1e-3", "--learning_rate", "2e-3")
    assert config.schedule.learning_rate == 2e-3


def test_aliases():
    assert load("--sharding_degree", "4").parallel.sharding_parallel_degree == 4
    assert load("--eval_with_do_generation", "1", kind=FinetuneConfig).evaluation.do_generation is True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning_rat", "3"], "did you mean --learning_rate"),
        (["--max_steps", "many"], "flag --max_steps: max_steps must be a whole number; got 'many'"),
        (["--max_steps"], "needs a value"),
        (["--per_device_train_batch_size", "0"], "must be at least 1"),
        (["--warmup_ratio", "1.5"], "must lie in [0, 1]"),
        (["--sharding", "stage4"], "must be one of"),
        (["--recompute", "maybe"], "must be yes/no"),
        (["--no_learning_rate"], "exists for yes/no options only"),
        (["--seed", "1", "stray.yaml"], "is not a flag"),
        (["--learning_rate", "nan"], "must be a number"),
    ],
)
def test_wrong_flags_are_named(words, expected):
    assert expected in problems(*words)


SUITES = {
    # LLaMA-Factory
    "cutoff_len 2048": "here it is --src_length and --tgt_length",
    "finetuning_type lora": "here it is --lora true",
    "finetuning_type full": "without one all weights train",
    "template qwen": "here it is --chat_template",
    "val_size 0.1": "here it is --validation_split",
    "validation_split_percentage 3": "here validation_split is a share (0.05), or a number of records",
    "flash_attn fa2": "here it is --use_flash_attention true",
    "quantization_bit 4": "here it is --qlora true",
    "stage sft": "here pretraining (pt) is run_pretrain.py, fine-tuning (sft) is finetune_generation.py",
    "deepspeed ds_z3.json": "sharding stage1, stage2 and stage3, without a file",
    # axolotl
    "base_model x": "here it is --model_name_or_path",
    "micro_batch_size 2": "here it is --per_device_train_batch_size",
    "sample_packing true": "here it is --packing",
    "adapter qlora": "here it is --qlora true",
    "lora_r 8": "here it is --r",
    "load_in_4bit true": "here it is --qlora",
    "sequence_len 512": "here it is --src_length and --tgt_length",
    # transformers, TRL, PEFT
    "optim adamw_torch": "here AdamW is the only optimizer",
    "eval_strategy no": "here it is --do_eval false",
    "evaluation_strategy steps": "here it is --do_eval true and --eval_steps N",
    "gradient_checkpointing true": "here it is --recompute",
    "torch_dtype bfloat16": "here it is --bf16 true",
    "target_modules q_proj": "here it is --lora_target_modules",
    "use_rslora 1": "here it is --rslora",
    "max_seq_length 512": "here it is --src_length and --tgt_length",
    # ms-swift, torchtune, Lightning, Megatron, DeepSpeed, and commands typed from memory
    "train_type lora": "here it is --lora true",
    "Batch-Size 4": "here it is --per_device_train_batch_size",
    "lr 1e-4": "here it is --learning_rate",
    "epochs 3": "here it is --num_train_epochs",
    "gradient_clip_val 1": "here it is --max_grad_norm",
    "warmup 10": "here it is --warmup_steps",
    "tensor_model_parallel_size 2": "here it is --tensor_parallel_degree",
    "zero_stage 2": "here it is --sharding stage2",
    "use_cpu": "here it is --device cpu",
    # of the other entrypoint
    "num_hidden_layers 4": "it is an option of run_pretrain.py",
    "data_prefix x": "in run_pretrain.py it is --input_dir",
}


@pytest.mark.parametrize("words", SUITES)
def test_names_of_other_suites_are_answered_with_ours(tmp_path, words):
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


def test_the_table_of_other_names_names_options():
    """Every one that it answers with exists, with a value that it takes; none of ours is hidden by a name of theirs."""
    classes = [option_specs(kind) for kind in (FinetuneConfig, PretrainConfig)]
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


def test_a_hint_of_pretraining_is_of_pretraining():
    assert "unknown flag --cutoff_len: here it is --max_seq_length" in problems("--cutoff_len", "512")
    assert "unknown flag --lora_r: in finetune_generation.py it is --r" in problems("--lora_r", "8")
    assert "unknown flag --lora: it is an option of finetune_generation.py" in problems("--lora")
    assert "unknown flag --dataset: here it is --input_dir" in problems("--dataset", "x")


def test_all_problems_are_listed_at_once():
    text = problems("--learning_rat", "1", "--max_steps", "x", "--sharding", "y")
    assert text.startswith("3 problems")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--fp16", "--bf16"], "can't be combined"),
        (["--min_learning_rate", "1"], "is above --learning_rate"),
        (["--max_steps", "5", "--warmup_steps", "5"], "takes all of"),
        (["--split", "0,1,0"], "no documents for training"),
        (["--split", "1,0,0", "--do_eval"], "no documents for evaluation"),
        (["--split", "a,b"], "must be numbers"),
        (["--split", "1,2,3,4"], "more than three"),
        (["--hidden_size", "8", "--continue_training"], "can't be combined with --continue_training"),
        (["--sequence_parallel"], "needs --tensor_parallel_degree"),
        (["--virtual_pp_degree", "2"], "needs --pipeline_parallel_degree"),
        (["--overwrite_output_dir", "--resume_from_checkpoint", "x"], "give only one of them"),
        (["--amp_master_grad"], "needs --fp16 or --bf16"),
        (["--max_steps", "0"], "must be above 0"),
    ],
)
def test_rules_across_options(words, expected):
    assert expected in problems(*words)


def test_nothing_to_do_is_an_error():
    with pytest.raises(ConfigError, match="--do_train, --do_eval or both"):
        load_config(PretrainConfig, [])


def test_merging_is_for_the_end_of_a_lora_training():
    for words, message in ((["--do_train"], "needs --lora"), (["--do_eval", "--lora"], "merges after training")):
        with pytest.raises(ConfigError, match=message):
            load_config(FinetuneConfig, ["--merge_weights", *words])


def test_yaml_by_section_flat_with_include_and_flags_over_it(tmp_path):
    (tmp_path / "base.yaml").write_text("schedule:\n  learning_rate: 1e-4\n  max_steps: 7\nseed: 3\n")
    (tmp_path / "run.yaml").write_text(
        "include: [base.yaml]\ndo_train: yes\nbatch:\n  per_device_train_batch_size: 2\nmax_steps: 9\n"
    )
    loaded = load_config(PretrainConfig, [str(tmp_path / "run.yaml"), "--seed", "5"])
    config = loaded.config
    assert config.schedule.learning_rate == 1e-4
    assert config.schedule.max_steps == 9
    assert config.runtime.seed == 5
    assert config.batch.per_device_train_batch_size == 2
    assert loaded.origins["learning_rate"].endswith("base.yaml:2")
    assert loaded.origins["max_steps"].endswith("run.yaml:5")
    assert loaded.origins["seed"] == "flag --seed"
    assert loaded.origins["split"] == "default"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("do_tran: 1\n", "run.yaml:1: unknown key do_tran; did you mean do_train?"),
        (
            "batch:\n  learning_rate: 1\n",
            "run.yaml:2: unknown key learning_rate in section batch (it belongs to section schedule)",
        ),
        ("seed: 1\nseed: 2\n", "run.yaml:2: seed stands already at line 1"),
        ("max_steps: [1]\n", "run.yaml:1: max_steps must be a whole number"),
        ("- a\n", "expected `option: value` lines"),
        ("a: [\n", "not valid YAML"),
        ("seed: 1\ninclude: run.yaml\n", "run.yaml:2: include: "),
        ("include: run.yaml\n", "run.yaml includes itself (through run.yaml -> run.yaml)"),
        ("seed: 1\ninclude: [absent.yaml]\n", "run.yaml:2: include: "),
        ("include: absent.yaml\n", "absent.yaml: No such file"),
        ("device: !!python/object/apply:os.system [ls]\n", "run.yaml:1"),
    ],
)
def test_yaml_errors_name_file_and_line(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(PretrainConfig, [str(tmp_path / "run.yaml"), "--do_train"])
    assert expected in str(error.value)


def test_missing_file_says_what_the_first_argument_may_be():
    with pytest.raises(ConfigError, match=r"absent.yaml: No such file.*must be a YAML file or a flag"):
        load_config(PretrainConfig, ["absent.yaml"])


_VALUES = {
    bool: st.booleans(),
    int: st.integers(1, 10**9),
    float: st.floats(1e-6, 0.9),
    str: st.sampled_from(["a", "b c", "ü"]),
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_printed_config_reads_back_to_the_same(tmp_path_factory, data):
    specs = option_specs(PretrainConfig)
    chosen = data.draw(st.lists(st.sampled_from(sorted(specs)), unique=True, max_size=8))
    words = ["--do_train"]
    for name in chosen:
        spec = specs[name]
        value = data.draw(st.sampled_from([c for c in spec.choices if c]) if spec.choices else _VALUES[spec.type])
        words += [f"--{name}", str(value)]
    try:
        config = load_config(PretrainConfig, words).config
    except ConfigError:
        return  # values that don't fit together; what they say is tested above
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(PretrainConfig, [str(path)]).config == config


def test_help_and_print_config_answer_without_training(capsys):
    assert read_command_line(PretrainConfig, ["--help"], "p") is None
    assert "--learning_rate" in capsys.readouterr().out
    assert read_command_line(PretrainConfig, ["--do_train", "--seed", "9", "--print_config"], "p") is None
    assert "seed: 9  # flag --seed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_every_option_is_documented(kind):
    undocumented = [name for name, spec in option_specs(kind).items() if len(spec.help) < 10]
    assert not undocumented
    text = help_text(kind, "p", width=100)
    assert all(f"--{name}" in text for name in option_specs(kind))
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("text", "expected"), [("949,50,1", (0.949, 0.05, 0.001)), ("8/2", (0.8, 0.2, 0.0)), ("1", (1, 0, 0))]
)
def test_split(text, expected):
    assert parse_split(text) == pytest.approx(expected)


COMMAND_1 = """
--model_type "llama" --model_name_or_path "facebook/llama-7b"
--tokenizer_name_or_path "facebook/llama-7b" --input_dir "./data" --output_dir "output/llama_hybid"
--split 949,50,1 --max_seq_length 2048 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
--use_flash_attention 1 --use_fused_rms_norm 0 --fp16 --fp16_opt_level "O2" --scale_loss 1024
--learning_rate 0.00001 --min_learning_rate 0.000005 --lr_scheduler_type "cosine" --max_steps 10000
--save_steps 5000 --weight_decay 0.01 --warmup_ratio 0.01 --max_grad_norm 1.0 --logging_steps 20
--dataloader_num_workers 1 --sharding "stage2" --eval_steps 1000 --report_to "visualdl" --disable_tqdm true
--continue_training 1 --recompute 1 --do_train --do_eval --device "gpu"
"""
COMMAND_2 = """
--model_name_or_path facebook/llama-7b --do_train --do_eval --num_train_epochs 1
--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --tensor_parallel_degree 4
--overwrite_output_dir --output_dir ./checkpoints/ --logging_steps 10 --fp16 --fp16_opt_level O2
--gradient_accumulation_steps 32 --recompute --learning_rate 3e-5 --lr_scheduler_type linear
--max_grad_norm 1.0 --warmup_steps 20
"""
COMMAND_5 = """
--model_name_or_path __internal_testing__/tiny-random-llama --do_train --do_eval --num_train_epochs 1
--dataloader_num_workers 1 --gradient_accumulation_steps 16 --per_device_train_batch_size 1
--per_device_eval_batch_size 16 --tensor_parallel_degree 2 --pipeline_parallel_degree 2
--pipeline_parallel_config "disable_p2p_cache_shape" --overwrite_output_dir --output_dir ./checkpoints/
--logging_steps 1 --disable_tqdm 1 --eval_steps 100 --eval_with_do_generation 0 --fp16 0 --fp16_opt_level O2
--recompute 0 --learning_rate 3e-5 --lr_scheduler_type linear --max_grad_norm 1.0 --warmup_steps 20
"""


def test_published_pretraining_command():
    config = load_config(PretrainConfig, shlex.split(COMMAND_1)).config
    assert config.precision.fp16 and config.precision.scale_loss == 1024 and config.precision.fp16_opt_level == "O2"
    assert (
        config.parallel.sharding == "stage2" and config.model.continue_training and config.kernels.use_flash_attention
    )
    assert not config.kernels.use_fused_rms_norm and config.data.max_seq_length == 2048 and config.logging.disable_tqdm


def test_published_finetuning_commands():
    config = load_config(FinetuneConfig, shlex.split(COMMAND_2)).config
    assert config.parallel.tensor_parallel_degree == 4 and config.checkpoint.overwrite_output_dir
    assert config.batch.gradient_accumulation_steps == 32 and config.kernels.recompute
    assert (config.data.src_length, config.data.tgt_length) == (128, 160)
    config = load_config(FinetuneConfig, shlex.split(COMMAND_5)).config
    assert config.precision.fp16 is False and config.evaluation.do_generation is False
    assert config.parallel.pipeline_parallel_config == "disable_p2p_cache_shape"
    config = load_config(FinetuneConfig, [*shlex.split(COMMAND_2), "--instruction_generation"]).config
    assert config.data.instruction_generation


def test_flatten_has_every_option_once():
    config = load()
    assert set(flatten(config)) == set(option_specs(PretrainConfig))


def test_quickstart_configs_are_valid():
    folder = Path(__file__).resolve().parents[3] / "configs" / "quickstart"
    assert load_config(PretrainConfig, [str(folder / "pretrain.yaml")]).config.schedule.max_steps > 0
    assert load_config(FinetuneConfig, [str(folder / "finetune.yaml")]).config.evaluation.do_generation
