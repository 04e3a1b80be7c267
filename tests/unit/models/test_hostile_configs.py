"""Hostile or damaged config.json files: the error names the fault before anything is allocated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oarlock.environment.memory
from families import FAMILIES
from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES as REGISTRY
from oarlock.families.registry import HF_CONFIGS
from oarlock.model_config.hf_fields import NEUTRAL, RECORDS
from oarlock.model_config.load import find_config_class, find_fields, make_config, read_config
from oarlock.model_config.schema import ConfigFields
from oarlock.models import memory_check
from oarlock.models.build import ModelSource, build_model
from oarlock.serve.engine.loading import open_served_model
from support.family_folders import build

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
        st.sampled_from(sorted({*content, *find_fields(find_config_class(family)), *ConfigFields.__annotations__}))
    )
    value = data.draw(st.sampled_from(_VALUES))
    place = folders.root / family / "config.json"
    try:
        config = make_config(content | {name: value}, str(place))
        model = build_model(ModelSource(place.parent, config, from_weights=True))
    except ModelError as error:
        message = str(error)
        assert str(place.parent) in message and len(message) < 2000
        return
    assert sum(int(np.prod(parameter.shape)) for parameter in model.parameters()) < 10**6


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_replaces_a_configuration_method(folders, family):
    config_class = find_config_class(family)
    taken = [name for name in dir(config_class) if callable(getattr(config_class, name)) or name.startswith("_")]
    taken += [name for name in dir(config_class) if isinstance(getattr(config_class, name), property)]
    assert {"to_dict", "from_dict", "__class__", "num_labels"} <= set(taken)
    for name in taken:
        try:
            config = make_config(folders.content[family] | {name: 5}, "x")
        except ModelError as error:
            assert name in str(error)
        else:
            assert type(config) is config_class and config.to_dict()["model_type"] and vars(config).get(name) != 5


def test_every_field_passed_to_paddlenlp_is_type_checked():
    from paddlenlp.transformers.configuration_utils import LlmMetaConfig

    names: set[str] = set()
    for family in FAMILIES:
        names |= find_fields(find_config_class(family))
    for words in HF_CONFIGS.values():
        names |= {*words.fields, *words.paddle_names.values(), *words.aliases, *words.supported, *words.required}
        names |= set(words.unread)
        names |= words.ignored | words.dropouts
    names |= {name for family in REGISTRY.values() for name in family.paddle_values}
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
        ({"init_args": [{"head_dim": "many"}]}, "head_dim must be an integer"),
        ({"num_attention_heads": 5}, "a hidden size of 32 can't be divided into 5 heads"),
        ({"num_key_value_heads": 3}, "4 heads can't share the keys of 3"),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 32},
            "heads of size 1: the rotary embeddings of llama need a multiple of 2",
        ),
        ({"num_hidden_layers": 4000}, "says 4,000 layers, and the weights next to it have 2"),
        ({"hidden_size": 2**20}, "a hidden size of 1,048,576, and .* has 512 rows of 32"),
        ({"vocab_size": 2**26}, "a vocabulary of 67,108,864"),
        ({"intermediate_size": 2**24}, "an? intermediate size of 16,777,216, and no tensor"),
        (
            {"max_position_embeddings": 2**31 - 1},
            r"max_position_embeddings\) take 137.4 GB, and the weights only about 0.2 MB",
        ),
        ({"max_position_embeddings": 25_699_999}, r"max_position_embeddings\) take 1.6 GB"),
        ({"intermediate_size": 65}, r"is \[64, 32\], the model expects \[65, 32\]"),
    ],
)
def test_configurations_that_do_not_fit_the_weights_or_the_memory(folders, tmp_path, monkeypatch, fields, words):
    monkeypatch.setattr(
        memory_check,
        "measure_available_memory",
        lambda: oarlock.environment.memory.AvailableMemory(4 * 10**9, "free on this machine"),
    )
    with pytest.raises(ModelError, match=words):
        build(folders.copy(tmp_path, **fields))


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


def test_a_model_too_large_for_the_memory_is_refused_with_figures(folders, tmp_path, monkeypatch):
    source = ModelSource(folders.root / "llama", read_config(folders.root / "llama"), from_weights=True)
    number = sum(int(np.prod(p.shape)) for p in build_model(source).parameters())
    free = {"bytes": 4 * number}
    monkeypatch.setattr(
        memory_check,
        "measure_available_memory",
        lambda: oarlock.environment.memory.AvailableMemory(free["bytes"], "free on this machine"),
    )
    build_model(source)
    free["bytes"] -= 1
    with pytest.raises(ModelError, match=r"the model needs 0.2 MB of memory, and 0.2 MB are free on this machine"):
        build_model(source)
    free["bytes"] = 4 * number + 7 * number
    with pytest.raises(ModelError, match=r"with gradients and optimizer states, needs"):
        build_model(source, training_bytes=8)
    monkeypatch.setattr(memory_check, "_SMALL_TABLES", 10**12)
    long = make_config(folders.content["llama"] | {"max_position_embeddings": 10**7}, "x")
    with pytest.raises(ModelError, match=r"\(max_position_embeddings\) needs 640.0 MB of memory, and"):
        build_model(ModelSource(folders.root / "llama", long, from_weights=True))
    large = make_config(folders.content["llama"] | {"hidden_size": 2**18, "intermediate_size": 2**20}, "x")
    with pytest.raises(ModelError, match=r"a model of these sizes needs 8.2 TB of memory"):
        build_model(ModelSource(tmp_path, large, from_weights=False))


def test_free_memory_is_the_minimum_of_machine_container_and_process(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapFree: 10 kB\n")

    def free() -> tuple[int, str]:
        found = oarlock.environment.memory.measure_available_memory(proc, groups)
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
def test_values_that_paddle_rejects_are_reported_first(folders, tmp_path, family, fields, words):
    with pytest.raises(ModelError, match=words):
        build(folders.copy(tmp_path, family, **fields))


def test_a_too_short_context_is_refused(folders, tmp_path):
    folder = folders.copy(tmp_path, max_position_embeddings=4)
    with pytest.raises(ModelError, match=r"config.json: 4 token\(s\) at a time are too few for a question"):
        open_served_model(folder, {})
