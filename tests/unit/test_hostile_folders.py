"""Model folders that were made to harm, or damaged: an error that names what is wrong, before anything is taken."""

from __future__ import annotations

import base64
import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

import oarlock.memory
from families import FAMILIES, family_model
from helpers import make_tiny_tokenizer
from oarlock.data.tokenizers import load_tokenizer
from oarlock.errors import ConfigError, ModelError
from oarlock.models import room
from oarlock.models.adapter_base import find_base
from oarlock.models.arrays import all_finite, array_type
from oarlock.models.build import ModelSource, build_model
from oarlock.models.config_schema import ConfigFields
from oarlock.models.configs import _config_class, config_of, own_fields, read_config
from oarlock.models.generation_config import generation_content
from oarlock.models.hf_words import NEUTRAL, PADDLE_ONLY, RECORDS, WORDS
from oarlock.models.open_adapter import open_adapter
from oarlock.models.save import save_config
from oarlock.models.weights import WeightFolder


class Folders:
    """A tiny model of each family, in Paddle's layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[str, dict[str, Any]] = {}
        for family in FAMILIES:
            model, folder = family_model(family), root / family
            folder.mkdir()
            save_config(model.config, folder)
            tensors = {name: value.numpy() for name, value in model.state_dict().items()}
            save_file(tensors, str(folder / "model.safetensors"), {"format": "np"})
            self.content[family] = json.loads((folder / "config.json").read_text())

    def copy(self, to: Path, family: str = "llama", **fields: Any) -> Path:
        folder = Path(shutil.copytree(self.root / family, to / f"{family}-copy", dirs_exist_ok=True))
        (folder / "config.json").write_text(json.dumps(self.content[family] | fields, indent=1))
        return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("families"))


def build(folder: Path) -> Any:
    return build_model(ModelSource(folder, read_config(folder), from_weights=True))


# config.json

_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 5, 7, -1, -(10**9), 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, 0.0, 0.5, 1.5, -0.5,
    1e300, float("nan"), float("inf"), "", "many", "__class__", "os.system", "x" * 10_000, [], [1], ["llama"], [[[]]], {},
    {"a": 1}, {"__class__": "x"}, {"type": "linear", "factor": "2"}, {"rope_type": ["linear"]}, [None], {"": {}},
    {"type": "linear", "factor": 1e30}, {"rope_type": "llama3", "factor": 0}, "relu", "float64", [-5], [10**12],
]  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_any_value_of_any_field_is_refused_by_name_or_harmless(folders, family, data):
    content = folders.content[family]
    name = data.draw(
        st.sampled_from(sorted({*content, *own_fields(_config_class(family)), *ConfigFields.__annotations__}))
    )
    value = data.draw(st.sampled_from(_VALUES))
    place = folders.root / family / "config.json"
    try:
        config = config_of(content | {name: value}, str(place))
        model = build_model(ModelSource(place.parent, config, from_weights=True))
    except ModelError as error:
        message = str(error)
        assert str(place.parent) in message and len(message) < 2000
        return
    assert sum(int(np.prod(parameter.shape)) for parameter in model.parameters()) < 10**6


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_replaces_a_method_of_the_configuration(folders, family):
    config_class = _config_class(family)
    taken = [name for name in dir(config_class) if callable(getattr(config_class, name)) or name.startswith("_")]
    taken += [name for name in dir(config_class) if isinstance(getattr(config_class, name), property)]
    assert {"to_dict", "from_dict", "__class__", "num_labels"} <= set(taken)
    for name in taken:
        try:
            config = config_of(folders.content[family] | {name: 5}, "x")
        except ModelError as error:
            assert name in str(error)
        else:
            assert type(config) is config_class and config.to_dict()["model_type"] and vars(config).get(name) != 5


def test_every_field_that_paddlenlp_is_given_has_a_type():
    from paddlenlp.transformers.configuration_utils import LlmMetaConfig

    names: set[str] = set()
    for family in FAMILIES:
        names |= own_fields(_config_class(family))
    for words in WORDS.values():
        names |= {*words.fields, *words.here.values(), *words.aliases, *words.only, *words.paddle_only, *words.unread}
        names |= words.ignored | words.dropouts
    names |= {name for fields in PADDLE_ONLY.values() for name in fields}
    not_given = {*LlmMetaConfig._get_defaults(), *RECORDS, *NEUTRAL, "quantization_config", "num_classes", "dpo_config"}
    untyped = {name for name in names - not_given - set(ConfigFields.__annotations__) if not name.startswith("_")}
    assert not untyped


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_long_sequence_strategies": True, "long_sequence_strategy_type": "x"}, "use_long_sequence_strategies"),
        ({"long_sequence_strategy_type": "embedding_strategies"}, "names code that PaddleNLP would import"),
        ({"long_sequence_init_args": {"a": 1}}, "long_sequence_init_args"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "architectures": ["os.system"]}, "architectures names 'os.system'"),
        ({"model_type": "__init__"}, "model_type '__init__' is not supported"),
        ({"init_class": "BertModel"}, "architectures names 'BertModel'"),
        ({"init_args": 5}, "init_args must be a list"),
        ({"init_args": [{"head_dim": "many"}]}, "head_dim must be a whole number"),
        ({"num_attention_heads": 5}, "a hidden size of 32 can't be divided into 5 heads"),
        ({"num_key_value_heads": 3}, "4 heads can't share the keys of 3"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "heads of size 1: rotary embeddings need an even one"),
        ({"num_hidden_layers": 4000}, "says 4,000 layers, and the weights beside it have 2"),
        ({"hidden_size": 2**20}, "a hidden size of 1,048,576, and .* has 512 rows of 32"),
        ({"vocab_size": 2**26}, "a vocabulary of 67,108,864"),
        ({"intermediate_size": 2**24}, "an? intermediate size of 16,777,216, and no tensor"),
        (
            {"max_position_embeddings": 2**31 - 1},
            r"max_position_embeddings\) takes 274.9 GB, and its weights some 0.1 MB",
        ),
        ({"max_position_embeddings": 25_699_999}, r"max_position_embeddings\) takes 3.3 GB"),
        ({"intermediate_size": 65}, r"is \[64, 32\], the model expects \[65, 32\]"),
    ],
)
def test_configurations_that_do_not_fit_their_weights_or_the_machine(folders, tmp_path, monkeypatch, fields, words):
    monkeypatch.setattr(room, "free_memory", lambda: oarlock.memory.Room(4 * 10**9, "free on this machine"))
    with pytest.raises(ModelError, match=words):
        build(folders.copy(tmp_path, **fields))


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("bloom", {"layer_norm_epsilon": 0.5}, "layer_norm_epsilon must be less than or equal to 0.001"),
        ("chatglm_v2", {"num_attention_heads": 2}, r"2 heads of 8 \(kv_channels\) are not the hidden size 32"),
        ("chatglm_v2", {"kv_channels": 64}, r"4 heads of 64 \(kv_channels\)"),
        ("opt", {"hidden_act": "swiglu"}, "hidden_act is 'swiglu'; PaddleNLP computes with "),  # it halves the width
        ("opt", {"hidden_act": "Layer"}, "hidden_act is 'Layer'"),
        ("chatglm", {"num_attention_heads": 16}, "need a multiple of 4"),
    ],
)
def test_what_paddle_would_stop_at_is_said_before(folders, tmp_path, family, fields, words):
    with pytest.raises(ModelError, match=words):
        build(folders.copy(tmp_path, family, **fields))


def test_errors_name_the_line(folders, tmp_path):
    folder = folders.copy(tmp_path, num_attention_heads=0)
    line = (folder / "config.json").read_text().split("num_attention_heads")[0].count("\n") + 1
    with pytest.raises(
        ModelError, match=rf"config.json:{line}: num_attention_heads must be greater than or equal to 1"
    ):
        read_config(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "a": ' + "[" * 10_000 + "]" * 10_000 + "}")
    with pytest.raises(ModelError, match="levels deep"):
        read_config(folder)


def test_a_model_that_is_too_large_for_the_memory_is_refused_with_numbers(folders, tmp_path, monkeypatch):
    source = ModelSource(folders.root / "llama", read_config(folders.root / "llama"), from_weights=True)
    number = sum(int(np.prod(p.shape)) for p in build_model(source).parameters())
    free = {"bytes": 4 * number}
    monkeypatch.setattr(room, "free_memory", lambda: oarlock.memory.Room(free["bytes"], "free on this machine"))
    build_model(source)
    free["bytes"] -= 1
    with pytest.raises(ModelError, match=r"the model needs 0.2 MB of memory, and 0.2 MB are free on this machine"):
        build_model(source)
    free["bytes"] = 4 * number + 7 * number
    with pytest.raises(ModelError, match=r"with what training holds beside it, needs"):
        build_model(source, held_beside=8)
    monkeypatch.setattr(room, "_SMALL_TABLES", 10**12)
    long = config_of(folders.content["llama"] | {"max_position_embeddings": 10**7}, "x")
    with pytest.raises(ModelError, match=r"\(max_position_embeddings\) needs 1.3 GB of memory, and"):
        build_model(ModelSource(folders.root / "llama", long, from_weights=True))
    large = config_of(folders.content["llama"] | {"hidden_size": 2**18, "intermediate_size": 2**20}, "x")
    with pytest.raises(ModelError, match=r"a model of these sizes needs 4.4 TB of memory"):
        build_model(ModelSource(tmp_path, large, from_weights=False))


def test_free_memory_is_the_least_of_machine_container_and_process(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapFree: 10 kB\n")

    def free() -> tuple[int, str]:
        found = oarlock.memory.free_memory(proc, groups)
        assert found is not None
        return found.num_bytes, found.where

    assert free() == (60 * 1024, "free on this machine")
    inner = groups / "a" / "b"
    inner.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    for folder, limit in ((inner, "max"), (groups / "a", "40000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("30000")
        (folder / "memory.stat").write_text("anon 5000\ninactive_file 20000\nactive_file 1000\n")
    assert free()[0] == 31000 and "container" in free()[1]
    (proc / "self" / "cgroup").write_text("4:memory:/host/path\n")
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("20000")
    (groups / "memory" / "memory.usage_in_bytes").write_text("15000")
    (groups / "memory" / "memory.stat").write_text("total_inactive_file 0\n")
    assert free()[0] == 5000
    (groups / "memory" / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert free()[0] == 60 * 1024


# weights


def rewritten(folder: Path, change: Any) -> Path:
    """A folder whose header was changed; the data stay."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return folder


_EMBEDDING = "llama.embed_tokens.weight"


def _shift(header: dict[str, Any], by: int) -> None:
    begin, end = header[_EMBEDDING]["data_offsets"]
    header[_EMBEDDING]["data_offsets"] = [begin + by, end + by]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: _shift(h, -4), "tensor|overlaps|bytes"),
        (lambda h: h[_EMBEDDING].update(data_offsets=[-4, 0]), "data_offsets must be begin and end"),
        (lambda h: h[_EMBEDDING].update(shape=[512, 33]), "F32 of shape"),
        (lambda h: h[_EMBEDDING].update(shape=[2**62, 2**62]), "its shape must be"),
        (lambda h: h[_EMBEDDING].update(dtype="I32"), "quantised weights"),
        (lambda h: h[_EMBEDDING].update(dtype="Q4"), "not a dtype of safetensors"),
        (lambda h: h["llama.norm.weight"].update(dtype="F8_E4M3", shape=[128]), "F8_E4M3, which can't be used here"),
        (lambda h: h.pop(_EMBEDDING), "hole|belong to no tensor|leaves"),
        (lambda h: h.update(__metadata__={"format": 5}), "an object of texts"),
        (lambda h: h.update(__metadata__={"format": "__class__"}), "another framework"),
        (lambda h: h.update({"extra.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "extra.weight"),
    ],
)
def test_headers_that_lie_are_refused(folders, tmp_path, change, words):
    with pytest.raises(ModelError, match=words):
        build(rewritten(folders.copy(tmp_path), change))


@pytest.mark.parametrize("by", [-1, -5000, 1, 4096])
def test_files_that_were_cut_or_grew_are_refused(folders, tmp_path, by):
    folder = folders.copy(tmp_path)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:by] if by < 0 else data + b"\0" * by)
    with pytest.raises(ModelError, match=r"model.safetensors: "):
        build(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_weights_that_are_no_numbers_are_named_when_they_are_loaded(folders, tmp_path, dtype, value):
    folder = folders.copy(tmp_path)
    tensors = load_file(str(folder / "model.safetensors"))
    values = {name: tensor.astype(array_type(dtype)) for name, tensor in tensors.items()}
    values["llama.layers.1.mlp.up_proj.weight"][-1, -1] = value
    values["llama.norm.weight"][0] = 6e4 if dtype == "float16" else 3e38  # large, and a number
    save_file(values, str(folder / "model.safetensors"), {"format": "np"})
    if value == 0:
        assert build(folder) is not None
    else:
        with pytest.raises(ModelError, match=r"llama.layers.1.mlp.up_proj.weight holds values that are not finite"):
            build(folder)


def test_finite_values_are_found_in_any_layout():
    values = np.zeros((700, 800), np.float32)
    assert all_finite(values) and all_finite(values.T) and all_finite(values[::2, ::3]) and all_finite(np.zeros(0))
    values[-1, 0] = np.nan
    assert not all_finite(values) and not all_finite(values.T) and all_finite(values[:-1])
    assert all_finite(np.full(10, 3e38, np.float32)) and all_finite(np.arange(5)) and all_finite(np.float32(1)[None])


def test_a_sparse_file_of_a_terabyte_is_refused_in_no_time(folders, tmp_path):
    folder = folders.copy(tmp_path, num_hidden_layers=1, vocab_size=2**26, hidden_size=2**12)
    entry = {"dtype": "F32", "shape": [2**26, 2**12], "data_offsets": [0, 2**40]}
    text = json.dumps({"llama.layers.0.mlp.down_proj.weight": {**entry, "shape": [0], "data_offsets": [0, 0]},
                       _EMBEDDING: entry}).encode()  # fmt: skip
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**40)
    start = time.thread_time()
    with pytest.raises(ModelError, match=r"of memory, and .* are"):
        build(folder)
    assert time.thread_time() - start < 2


def test_pipes_and_folders_in_place_of_files(folders, tmp_path):
    import os

    folder = folders.copy(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ModelError, match=f"{name}: a pipe, not a regular file|{name}: .*pipe"):
            read_config(folder) if name == "config.json" else generation_content(folder)
        (folder / name).unlink()
        folders.copy(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        WeightFolder.open(folder)


# tokenizers

AT = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def _model(**changes: Any) -> Any:
    return lambda content: content["model"].update(changes)


def _vocab(**tokens: int) -> Any:
    return lambda content: content["model"]["vocab"].update(tokens)


def _added(**token: Any) -> Any:
    return lambda content: content["added_tokens"].append({"content": "<x>", **AT, **token})


def _part(**parts: Any) -> Any:
    return lambda content: content.update(parts)


GROWS, A = {"type": "Replace", "content": "eee"}, {"Sequence": {"id": "A", "type_id": 0}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LONG_TABLE = base64.b64encode(b"\4\0\0\0" + b"\0" * 4 + b"x" * 5000 + b"\0").decode()
PREPEND = {"type": "Prepend", "prepend": "x" * 4000}
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "huge id": (_vocab(zzq=10**9), "less than or equal to 16777216"),
    "holes": (_vocab(zzq=2**24), "leaves out most of those below it"),
    "negative": (_vocab(zzq=-1), "greater than or equal to 0"),
    "doubled id": (_vocab(zzq=5), "have the same id, 5"),
    "vocab of texts": (_vocab(zzq="5"), "must be a whole number"),  # type: ignore[arg-type]
    "added id": (_added(id=10**9), "added_tokens"),
    "added twice": (_added(id=0), "two of them have the same id"),
    "added without content": (lambda c: c["added_tokens"].append({"id": 600, **AT}), "content is missing"),
    "merges": (_model(merges=[["qqq", "www"]]), "out of vocabulary"),
    "merges of ints": (_model(merges=[5]), "tokenizer.json: its model"),
    "no model": (_part(model=None), "its model must be an object"),
    "a model of another kind": (_model(type="__class__"), "its model"),
    "prefix": (_model(continuing_subword_prefix="##"), "tokenizer.json: "),
    "blows up": (_part(pre_tokenizer=SPLIT | {"pattern": {"Regex": "(a+)+$"}}), "can't be used: .*retry-limit"),
    "long pattern": (_part(pre_tokenizer=SPLIT | {"pattern": {"Regex": "a" * 50_000}}), "a text of 50,000 characters"),
    "no pattern": (_part(pre_tokenizer=SPLIT | {"pattern": {"Regex": "["}}), "its pre_tokenizer"),
    "empty": (_part(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "b"}), "an empty pattern"),
    "prepend": (_part(normalizer={"type": "Prepend", "prepend": "x" * 10_000_000}), "characters"),
    "table": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA"}), "can't be used"),
    "table of 4 GB": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "4,294,967,295 bytes"),
    "no table": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "\u00e9"}), "precompiled_charsmap can't be used"),
    "long table": (_part(normalizer={"type": "Precompiled", "precompiled_charsmap": LONG_TABLE}), "5,000 times as long"),
    "strip": (_part(decoder={"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}), "can't be used"),
    "number": (_part(decoder={"type": "Strip", "content": "a", "start": 10**12, "stop": 0}), "larger than any number"),
    "template": (
        _part(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                              "pair": [], "special_tokens": {}}), "tokenizer.json|can't be used"),
    "ids": (
        _part(post_processor={
            "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "a", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"a": {"id": "a", "ids": [2**31 - 1], "tokens": ["a"]}}}), "the id 2,147,483,647"),
    "grows": (_part(normalizer={"type": "Sequence", "normalizers": [GROWS | {"pattern": {"String": "e"}}] * 40}), "as long"),
    "grows between": (_part(decoder={"type": "Sequence", "decoders": [GROWS | {"pattern": {"Regex": "(?=.)"}}] * 9}), "as long"),
    "bytes of bytes": (_part(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES] * 30}), "as long"),
    "prepends": (_part(normalizer={"type": "Sequence", "normalizers": [PREPEND] * 500}), "puts 2,000,000 characters"),
    "many texts": (_part(post_processor={"type": "TemplateProcessing", "single": [A] * 99, "pair": [A], "special_tokens": {}}),
                   "holds a text more than once"),
    "many tokens": (
        _part(post_processor={
            "type": "TemplateProcessing", "single": [A, *[{"SpecialToken": {"id": "a", "type_id": 0}}] * 99], "pair": [A],
            "special_tokens": {"a": {"id": "a", "ids": [1] * 99, "tokens": ["a"] * 99}}}), "puts 9,801 tokens around"),
    "deep": (_part(pre_tokenizer=json.loads('{"type":"Sequence","pretokenizers":[' * 70 + "]}" * 70)), "levels deep"),
    "parts": (_part(decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}] * 30_000}), "parts|more than"),
    "not an object": (_part(normalizer=5), "normalizer must be an object or null"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_made_to_harm_are_refused(tokenizer_folder, tmp_path, name):
    change, words = TOKENIZERS[name]
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words) as error:
        load_tokenizer(str(folder))
    assert str(folder) in str(error.value)


def test_settings_for_padding_and_truncation_allocate_nothing(tokenizer_folder, tmp_path):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = {"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    content["truncation"] = {"max_length": 3, "stride": 10**9, "strategy": "LongestFirst", "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(str(folder)).encode("Hello") == load_tokenizer(str(tokenizer_folder)).encode("Hello")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("special_tokens_map.json", {"__class__": "int"}, "'__class__' is not the name of a special token"),
        ("special_tokens_map.json", {"init_class": "x"}, "'init_class' is not the name of a special token"),
        ("special_tokens_map.json", {"_bos_token": "x"}, "'_bos_token' is not the name"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token must be"),
        ("special_tokens_map.json", {"eos_token": {"lstrip": True}}, "content is missing"),
        ("tokenizer_config.json", {"__class__": "int"}, "'__class__' is not the name"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"999999999": {"content": "<x>"}}}, "is not a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "<x>"}}}, "is not a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": {}}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"model_input_names": 5}, "model_input_names must be a list"),
        ("tokenizer_config.json", {"padding_side": "__class__"}, "padding_side must be 'left' or 'right'"),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}, "tokenizer_class must be a text"),
        ("tokenizer_config.json", {"additional_special_tokens": [[]]}, "additional_special_tokens"),
        ("added_tokens.json", {"<x>": 10**9}, "less than or equal"),
        ("added_tokens.json", {"<x>": 5, "<y>": 5}, "two tokens have the same id"),
        ("added_tokens.json", {"<x>": "5"}, "must be a whole number"),
    ],
)
def test_what_is_beside_a_tokenizer_is_typed(tokenizer_folder, tmp_path, file, content, words):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words) as error:
        load_tokenizer(str(folder))
    assert file in str(error.value)


def test_paths_and_names_of_code_in_a_tokenizers_files_are_never_followed(tokenizer_folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("a private key")
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "t"))
    path = folder / "tokenizer_config.json"
    names = ("vocab_file", "tokenizer_file", "merges_file", "spm_file", "sp_model_file", "special_tokens_map_file")
    content = json.loads(path.read_text()) | dict.fromkeys(names, str(secret)) | {"auto_map": {"AutoTokenizer": "x.Y"}}
    path.write_text(
        json.dumps(content | {"tokenizer_class": "os.system", "sp_model_kwargs": {"model_file": str(secret)}})
    )
    plain, found = load_tokenizer(str(tokenizer_folder)), load_tokenizer(str(folder))
    assert found.get_vocab() == plain.get_vocab()
    (folder / "tokenizer.json").unlink()
    for file in folder.glob("*.model"):
        file.unlink()
    (folder / "vocab.txt").write_text("a\nb\n")
    for named in ("os.system", "AutoTokenizer", "PretrainedTokenizer", "LlamaTokenizer", "__class__", "Taskflow"):
        path.write_text(json.dumps({"tokenizer_class": named, "vocab_file": str(secret)}))
        with pytest.raises(ModelError, match=f"its class '{named}' is not supported"):
            load_tokenizer(str(folder))


def test_paddlenlps_classes_get_nothing_that_was_not_checked(tmp_path, monkeypatch):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"query": "a private key"}))
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "vocab_file": str(secret), "chat_template": str(secret),
              "name_or_path": "/etc", "do_lower_case": True, "from_slow": 5, "never_split": 7}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"query": "x", "__class__": 5}))
    found: Any = load_tokenizer(str(folder))
    assert found("A b")["input_ids"] == [2, 5, 6, 3]
    assert found.chat_template is None and found.init_kwargs["vocab_file"] == str(folder / "vocab.txt")
    assert found.name_or_path == str(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"convert_tokens_to_ids": "x"}))
    with pytest.raises(ModelError, match="'convert_tokens_to_ids' is not the name of a special token"):
        load_tokenizer(str(folder))
    (folder / "special_tokens_map.json").write_text(json.dumps({"my_token": "x"}))
    with pytest.raises(ModelError, match="'my_token' is not a special token of a BertTokenizer"):
        load_tokenizer(str(folder))
    (folder / "special_tokens_map.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\nb\n")  # its ids lie beyond its size
    with pytest.raises(ModelError, match=r"a token stands twice in vocab\.txt"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tekken.json", {"config": {"pattern": "a", "default_num_special_tokens": 10**9}, "vocab": []}, "default_num_special"),
        ("tekken.json", {"config": {"pattern": "a" * 50_000}, "vocab": []}, "pattern"),
        ("tekken.json", {"config": {"pattern": "(a+)+$"}, "vocab": [{"token_bytes": "YQ=="}]}, "can't be used"),
        ("tekken.json", {"config": {"pattern": "a"}, "vocab": [{"token_bytes": "YWFh" * 1000}] * 200}, "too many of them"),
        ("vocab.json", {"a": 10**9}, "less than or equal"),
        ("vocab.json", {"a": 0, "b": 0}, "have the same id"),
        ("vocab.json", {"a" * 5000: 0}, "tokens of up to 5,000 characters"),
    ],
)  # fmt: skip
def test_vocabularies_made_to_harm_are_refused(tmp_path, file, content, words):
    (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ModelError, match=words):
        load_tokenizer(str(tmp_path))


# generation settings and adapters


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"eos_token_id": "x"}, "eos_token_id must be"),
        ({"eos_token_id": 10**12}, "eos_token_id must be"),
        ({"temperature": []}, "temperature must be a number"),
        ({"do_sample": "__class__"}, "do_sample must be true or false"),
    ],
)
def test_generation_settings_are_typed(tmp_path, content, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words):
        generation_content(tmp_path)


_SETTINGS = {"r": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj"], "rslora": False, "plus_scale": 1.0,
             "quantization": None, "scaling": 2.0}  # fmt: skip
_A = "llama.layers.0.self_attn.q_proj.lora_A"


def adapter(
    folder: Path, tensor: np.ndarray | None = None, settings: Any = None, base: Any = None, **fields: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, "method": "lora", "settings": _SETTINGS | (settings or {}),
               "base": base or {"name": "base", "fingerprint": "0" * 64}}  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(content | fields))
    tensors = {_A: np.zeros((32, 2), np.float32) if tensor is None else tensor}
    (folder / "peft_model.safetensors").write_bytes(save(tensors, {"format": "np"}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"settings": {"r": -1}}, "r must be greater than or equal to 1"),
        ({"settings": {"r": 10**9}}, "r must be less than"),
        ({"settings": {"r": 2.5}}, "r must be a whole number"),
        ({"settings": {"targets": "q_proj"}}, "targets must be a list"),
        ({"settings": {"dropout": 1.5}}, "dropout must be less than 1"),
        ({"settings": {"quantization": {"algorithm": "__class__"}}}, "quantization.algorithm must be 'nf4' or 'fp4'"),
        ({"settings": {"r": 4}}, r"lora_A is \[32, 2\], and adapter.json says a rank of 4"),
        ({"method": ["lora"]}, "method must be"),
        ({"method": "__class__"}, "method must be"),
        ({"format": "1"}, "format must be a whole number"),
        ({"settings": None, "base": {"name": 5, "fingerprint": ""}}, "base.name must be a text"),
        ({"base": {"name": "x"}}, "fingerprint is missing"),
        ({"tensor": np.zeros((32, 2), np.int32)}, "is stored in int32, which no weight of an adapter can be"),
        ({"tensor": np.zeros(64, np.float32)}, r"is \[64\]"),
    ],
)
def test_adapters_made_to_harm_are_refused(tmp_path, arguments, words):
    with pytest.raises(ModelError, match=words) as error:
        open_adapter(adapter(tmp_path / "a", **arguments))
    assert str(tmp_path) in str(error.value)


def test_values_of_an_adapter_that_are_no_numbers_are_named(tmp_path):
    found = open_adapter(adapter(tmp_path / "a", np.full((32, 2), np.nan, np.float32)))
    with pytest.raises(ModelError, match="lora_A holds values that are not finite numbers"):
        found.value(_A, (32, 2))


def test_an_adapter_opens_no_folder_and_no_hub_of_its_own_choice(folders, tmp_path, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("oarlock.models.hub._download", never)
    elsewhere = str(folders.root / "llama")
    for name, mark in (("some/model", "0" * 64), ("gone", ""), ("", "unknown")):
        found = open_adapter(adapter(tmp_path / "a", base={"name": name, "fingerprint": mark}))
        with pytest.raises(ModelError, match=r"nothing is downloaded because an adapter names it\. Name it"):
            find_base(found, "Name it")
    for name, mark in ((elsewhere, "unknown"), (elsewhere, ""), (f"../../{folders.root.name}/llama", "unknown")):
        found = open_adapter(adapter(tmp_path / "a", base={"name": name, "fingerprint": mark}))
        with pytest.raises(ModelError, match=r"not opened because an adapter names it\. Name it"):
            find_base(found, "Name it")
    found = open_adapter(adapter(tmp_path / "a", base={"name": elsewhere, "fingerprint": "0" * 64}))
    assert find_base(found, "Name it") == Path(elsewhere)  # whoever loads it compares the fingerprint
    with pytest.raises((ModelError, ConfigError), match="not the base of this adapter"):
        from oarlock.models.tuned import open_tuned

        open_tuned(str(tmp_path / "a"))
