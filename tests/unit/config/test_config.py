"""Options from flags and YAML: types, rules, problems, published commands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.config.command_line import format_help, read_command_line, to_yaml
from oarlock.config.load import flatten
from oarlock.config.options import list_option_specs
from oarlock.config.pretrain import parse_split
from oarlock.errors import ConfigError
from support.published_commands import COMMAND_1, COMMAND_2, COMMAND_5, DO, problems


def load(*words: str, kind: type = PretrainConfig):
    return load_config(kind, [*DO, *words]).config


@pytest.mark.parametrize("words", [["--recompute"], ["--recompute", "1"], ["--recompute=true"], ["--recompute", "YES"]])
def test_boolean_spellings_of_true(words):
    assert load(*words).kernels.recompute is True


@pytest.mark.parametrize(
    "words", [[], ["--recompute", "0"], ["--recompute", "False"], ["--recompute", "--no_recompute"]]
)
def test_boolean_spellings_of_false(words):
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
        (["--no_learning_rate"], "is for yes/no options only"),
        (["--seed", "1", "stray.yaml"], "is not a flag"),
        (["--learning_rate", "nan"], "must be a number"),
    ],
)
def test_wrong_flags_are_named(words, expected):
    assert expected in problems(*words)


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


def test_a_run_with_nothing_to_do_is_an_error():
    with pytest.raises(ConfigError, match="--do_train, --do_eval or both"):
        load_config(PretrainConfig, [])


def test_merge_weights_needs_lora_training():
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
        ("seed: 1\nseed: 2\n", "run.yaml:2: seed is already defined at line 1"),
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


def test_a_missing_file_error_explains_the_first_argument():
    with pytest.raises(
        ConfigError, match=r"absent.yaml: No such file.*must be a YAML file, the name of a recipe .* or a flag"
    ):
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
    specs = list_option_specs(PretrainConfig)
    chosen = data.draw(st.lists(st.sampled_from(sorted(specs)), unique=True, max_size=8))
    words = ["--do_train"]
    for name in chosen:
        spec = specs[name]
        value = data.draw(st.sampled_from([c for c in spec.choices if c]) if spec.choices else _VALUES[spec.type])
        words += [f"--{name}", str(value)]
    try:
        config = load_config(PretrainConfig, words).config
    except ConfigError:
        return  # values that don't fit together; their messages are tested above
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(PretrainConfig, [str(path)]).config == config


def test_help_and_print_config_do_not_train(capsys):
    assert read_command_line(PretrainConfig, ["--help"], "p") is None
    assert "--learning_rate" in capsys.readouterr().out
    assert read_command_line(PretrainConfig, ["--do_train", "--seed", "9", "--print_config"], "p") is None
    assert "seed: 9  # flag --seed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_every_option_is_documented(kind):
    undocumented = [name for name, spec in list_option_specs(kind).items() if len(spec.help) < 10]
    assert not undocumented
    text = format_help(kind, "p", width=100)
    assert all(f"--{name}" in text for name in list_option_specs(kind))
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("text", "expected"), [("949,50,1", (0.949, 0.05, 0.001)), ("8/2", (0.8, 0.2, 0.0)), ("1", (1, 0, 0))]
)
def test_split_option(text, expected):
    assert parse_split(text) == pytest.approx(expected)


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
    assert set(flatten(config)) == set(list_option_specs(PretrainConfig))


def test_quickstart_configurations_are_valid():
    folder = Path(__file__).resolve().parents[3] / "configs" / "quickstart"
    assert load_config(PretrainConfig, [str(folder / "pretrain.yaml")]).config.schedule.max_steps > 0
    assert load_config(FinetuneConfig, [str(folder / "finetune.yaml")]).config.evaluation.do_generation
