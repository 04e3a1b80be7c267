"""An adapter folder in place of a model: its base is found and compared, its tokenizer is used; default lengths fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import make_adapter, make_flags, make_tiny_tokenizer
from oarlock.cli.commands import chat, serve
from oarlock.config import FinetuneConfig, PretrainConfig, load_config
from oarlock.errors import ConfigError, ModelError
from oarlock.files import holds_adapter
from oarlock.model_config.model_folder import find_model_folder
from oarlock.models import generate
from oarlock.models.generate import ask_model
from oarlock.models.load_finetuned import load_finetuned
from oarlock.peft.adapter_base import add_texts_of, find_base
from oarlock.peft.adapter_folder import Base
from oarlock.peft.lora import LoRA
from oarlock.peft.open_adapter import open_adapter
from oarlock.peft.prefix_tuning import Prefix
from oarlock.serve.config import ServeConfig
from oarlock.train.sequence_lengths import fit_lengths
from oarlock.train.start_from_adapter import start_from_adapter
from oarlock.weights.shard_index import INDEX

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Path:
    """models/a/base and out/lora (with its own template), as a run started here leaves them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "models/a/base")
    Path("out").mkdir()
    make_adapter("models/a/base", Path("out/lora"), LoRA(r=3, alpha=5.0, targets=("q_proj",), rslora=True))
    make_tiny_tokenizer("out/lora")
    Path("out/lora/chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def loaded(*words: str, **options: object):
    return load_config(FinetuneConfig, [*make_flags(do_train=1, **options), *words])


def started(*words: str, **options: object) -> FinetuneConfig:
    found = loaded(*words, **options)
    return start_from_adapter(found.config, found.origins)


def test_the_base_is_found_from_any_folder_and_requested_if_missing(place, monkeypatch, capsys):
    adapter = open_adapter("out/lora")
    assert find_base(adapter, "") == Path("models/a/base") and capsys.readouterr().out == ""
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    adapter = open_adapter("../out/lora")
    assert find_base(adapter, "") == place / "models/a/base"
    assert f"its base models/a/base is taken from {place / 'models/a/base'}" in capsys.readouterr().out
    (place / "models").rename(place / "moved")
    for program, way_out in (
        (lambda: load_finetuned("../out/lora"), "--base DIR"),
        (lambda: started(model_name_or_path="../out/lora"), "--model_name_or_path BASE --adapter_name_or_path ../out/lora"),
        (lambda: chat._find_folders("../out/lora", None, place), "oarlock chat BASE --adapter ../out/lora"),
    ):  # fmt: skip
        with pytest.raises(
            ModelError, match="its base is recorded as 'models/a/base': there is no such folder"
        ) as error:
            program()
        assert str(error.value).endswith(f"Name it: {way_out}")
    assert load_finetuned("../out/lora", "../moved/a/base").template.source == TEMPLATE


def test_omitted_options_come_from_the_adapter(place, capsys):
    config = started(model_name_or_path="out/lora")
    method, model = config.method, config.model
    assert (method.lora, method.r, method.lora_alpha, method.lora_target_modules) == (True, 3, 5.0, "q_proj")
    assert method.rslora and method.adapter_name_or_path == "out/lora"
    assert (model.model_name_or_path, model.tokenizer_name_or_path) == ("models/a/base", "out/lora")
    config = started(model_name_or_path="models/a/base", adapter_name_or_path="out/lora", r=8, lora_dropout=0.1)
    assert (config.method.r, config.method.lora_alpha, config.method.lora_dropout) == (8, 5.0, 0.1)  # r: refused later
    assert config.model.tokenizer_name_or_path is None
    plain = loaded(model_name_or_path="models/a/base").config
    assert start_from_adapter(plain, {}) is plain
    assert "not used" not in capsys.readouterr().out
    started("--lora_rank", "8", model_name_or_path="models/a/base", num_prefix_tokens=4)
    assert "--r, --num_prefix_tokens: not used, because no method is chosen" in capsys.readouterr().out


def test_incompatible_options_are_refused(place):
    make_adapter("models/a/base", Path("out/prefix"), Prefix(4))
    with pytest.raises(ConfigError, match="--adapter_name_or_path out/prefix is another"):
        started(model_name_or_path="out/lora", adapter_name_or_path="out/prefix")
    with pytest.raises(
        ConfigError, match="with the options of the adapter out/prefix: --packing can't be combined with"
    ):
        started("--packing", model_name_or_path="out/prefix")
    with pytest.raises(ModelError, match=r"it is an adapter folder .*`oarlock merge --adapter out/lora"):
        find_model_folder("out/lora", with_weights=True)
    with pytest.raises(ModelError, match="only LoRA adapters can be talked with"):
        chat._find_folders("out/prefix", None, place)


def test_chat_and_serve_use_the_tokenizer_of_the_adapter(place, monkeypatch):
    tools = Path("additional_chat_templates/tool_use.jinja")
    (Path("out/lora") / tools).parent.mkdir()
    (Path("out/lora") / tools).write_text(TEMPLATE + "{{ tools }}")
    view, adapter = chat._find_folders("out/lora", None, place)
    assert adapter == Path("out/lora")
    assert (Path(view) / "chat_template.jinja").read_text() == TEMPLATE
    assert (Path(view) / tools).read_text() == TEMPLATE + "{{ tools }}"
    assert (Path(view) / "model.safetensors").samefile("models/a/base/model.safetensors")
    assert Base.from_folder("", Path(view)).fingerprint == Base.from_folder("", Path("models/a/base")).fingerprint
    assert add_texts_of(place, Path("models/a/base"), place) == Path("models/a/base")  # one without its own tokenizer
    served = {}

    def run(config: ServeConfig, *_: object) -> int:
        model = Path(config.triton.repository) / "oarlock" / "1" / "model"
        served["template"] = (model / "chat_template.jinja").read_text()
        served["tools"] = (model / tools).read_text()
        served["adapters"] = [path.name for path in (model.parent / "adapters").iterdir()]
        served["model"] = sorted(path.name for path in model.iterdir())
        return 0

    monkeypatch.setattr(serve, "_start", run)
    assert serve._run(serve.ServeFlags(folder=Path("out/lora"))) == 0
    assert served["template"] == TEMPLATE and served["adapters"] == ["lora"]
    assert served["tools"] == TEMPLATE + "{{ tools }}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(served["model"])
    assert not any(path.name.startswith(".oarlock-serve") for path in Path("models/a").iterdir())


def test_a_checkpoint_is_distinguished_from_an_adapter(place):
    """The error says how to make an adapter from a checkpoint where that is possible."""
    checkpoint = Path("out/checkpoint-1")
    checkpoint.mkdir()
    (checkpoint / INDEX).write_text("{}")
    assert not holds_adapter(checkpoint)
    with pytest.raises(ModelError, match=r"adapter.json is missing$"):  # of full training
        open_adapter(checkpoint)
    shutil.copy("out/lora/adapter.json", checkpoint)
    with pytest.raises(ModelError, match="`oarlock checkpoint consolidate out/checkpoint-1 ADAPTER`"):
        open_adapter(checkpoint)


def source(positions: int):
    return SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions, seq_length=0))


@pytest.mark.parametrize(
    ("positions", "options", "before", "expected"),
    [
        (2048, {}, 0, (128, 160)),
        (288, {}, 0, (128, 160)),
        (256, {}, 0, (113, 143)),
        (256, {}, 64, (85, 107)),
        (256, {"src_length": 200}, 0, (200, 56)),
        (256, {"tgt_length": 250}, 0, (6, 250)),
        (256, {"src_length": 10}, 0, (10, 160)),
        (256, {"src_length": 255}, 0, (255, 160)),  # no space for an answer: refused by check_lengths
        (256, {"src_length": 128, "tgt_length": 160}, 0, (128, 160)),  # given, although equal to the defaults
        (256, {"p_tuning": 1, "num_virtual_tokens": 16}, 0, (106, 134)),
        (0, {}, 0, (128, 160)),
    ],
)
def test_default_lengths_are_cut_to_the_context(positions, options, before, expected):
    found, model = loaded(**options), source(positions)
    config = fit_lengths(found.config, model, found.origins, before)
    data = config.data
    assert (data.src_length, data.tgt_length) == expected
    assert (config == found.config) == (model.config.seq_length == 0)
    if model.config.seq_length:
        assert model.config.seq_length == positions - before


def test_a_corpus_is_cut_to_the_context_too():
    found = load_config(PretrainConfig, ["--do_train"])
    assert fit_lengths(found.config, source(512), found.origins).data.max_seq_length == 512
    assert fit_lengths(found.config, source(4096), found.origins) is found.config
    given = load_config(PretrainConfig, ["--do_train", "--max_seq_length", "1024"])
    assert fit_lengths(given.config, source(512), given.origins) is given.config
    # If the origin of the values is unknown, a value other than the default counts as given.
    other = replace(found.config, data=replace(found.config.data, max_seq_length=600))
    assert fit_lengths(other, source(512), {}) is other


def test_a_question_that_is_not_text_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="is not valid text"):
        list(ask_model(str(tiny_model), ["caf\udce9"], 2))


def test_an_answer_fits_the_context_of_the_model(tiny_model):
    (_, answer), *_ = ask_model(str(tiny_model), ["count to 3"])
    assert answer is not None
    with pytest.raises(ConfigError, match="--max-new-tokens 300: the model's context leaves "):
        list(ask_model(str(tiny_model), ["count to 3"], 300))
    with pytest.raises(ModelError, match=r"the question has .* tokens, and the model supports 256 .* a shorter one"):
        list(ask_model(str(tiny_model), ["what " * 300]))
    config = SimpleNamespace(max_position_embeddings=256)
    assert [
        generate._find_answer_limit(config, 100, None),
        generate._find_answer_limit(config, 200, None),
        generate._find_answer_limit(config, 200, 56),
    ] == [
        64,
        56,
        56,
    ]
    assert generate._find_answer_limit(SimpleNamespace(), 1000, None) == 64  # Bloom has no limit
