"""A directory broken in one of many ways: the checker finds that, and only that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from oarlock.cli import _parser
from oarlock.errors import ConfigError
from oarlock.export.check import check_folder, check_model, guess_server
from oarlock.export.manifest import write_manifest

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
    "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
INDEX = "model.safetensors.index.json"
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """As in the files that transformers 4 writes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (96, 16), "model.norm.weight": (16,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (16,) for norm in ("input", "post_attention")}
        shapes |= {
            f"{layer}.self_attn.{p}_proj.weight": (rows, 16) for p, rows in zip("qkvo", (16, 8, 8, 16), strict=True)
        }
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (24, 16) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (16, 24)
    return shapes | {"lm_head.weight": (96, 16)}


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def write_shards(folder: Path, shards: list[dict[str, np.ndarray]], metadata: str | None = "pt") -> None:
    for old in folder.glob("model*"):
        old.unlink()
    about = {"format": metadata} if metadata else None
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", about)
        return
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, folder / file, about)
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    total = sum(values.nbytes for tensors in shards for values in tensors.values())
    write(folder, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def shards_of(folder: Path) -> list[dict[str, np.ndarray]]:
    return [load_file(path) for path in sorted(folder.glob("*.safetensors"))]


def make_good(folder: Path, num_shards: int) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in llama_shapes().items()}
    names = sorted(arrays)
    write_shards(folder, [{name: arrays[name] for name in names[i::num_shards]} for i in range(num_shards)])
    write(folder, "config.json", CONFIG)
    vocabulary = {chr(33 + i): i + 1 for i in range(90)}
    special = [{"id": 0, "content": "</s>", "special": True}]
    write(
        folder, "tokenizer.json", {"added_tokens": special, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    write(folder, "tokenizer_config.json", about)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write(folder, "generation_config.json", {"eos_token_id": 0})
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {shards: make_good(folder / str(shards), shards) for shards in (1, 3)}


@pytest.mark.parametrize("server", ["hf", "vllm", "fastdeploy"])
@pytest.mark.parametrize("shards", [1, 3])
def test_nothing_is_found_in_a_good_directory(good, server, shards):
    assert check_model(good[shards], server) == []


# one way to break it: (folder, choose) -> the kind that has to be found; choose(list) picks one

Choose = Callable[[list[Any]], Any]


def change(folder: Path, name: str, **values: Any) -> None:
    content = read(folder, name) | values
    write(folder, name, {key: value for key, value in content.items() if value != "gone"})


def some_shard(folder: Path, choose: Choose) -> Path:
    return choose(sorted(folder.glob("*.safetensors")))


def rewrite(folder: Path, edit: Callable[[dict[str, np.ndarray]], None], choose: Choose, metadata: str = "pt") -> None:
    shards = shards_of(folder)
    edit(choose(shards))
    write_shards(folder, shards, metadata)


def lose_config(folder, choose):
    (folder / "config.json").unlink()
    return "config"


def cut_config(folder, choose):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: choose([0, 1, len(text) // 2, len(text) - 1])])
    return "config"


def lose_size(folder, choose):
    sizes = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ]
    change(folder, "config.json", **{choose(sizes): "gone"})
    return "config"


def wrong_architecture(folder, choose):
    change(
        folder,
        "config.json",
        architectures=choose(["gone", [], ["LlamaModel"], "LlamaForCausalLM", [3], ["Qwen3ForCausalLM"]]),
    )
    return "architecture"


def wrong_model_type(folder, choose):
    change(folder, "config.json", model_type=choose(["gone", "qwen2", "Llama", 7]))
    return "architecture"


def wrong_dtype_keys(folder, choose):
    keys = [
        {"torch_dtype": "gone"},
        {"torch_dtype": "float"},
        {"torch_dtype": "torch.float32"},
        {"dtype": "bfloat16"},
        {"torch_dtype": "gone", "dtype": "double"},
    ]
    change(folder, "config.json", **choose(keys))
    return "dtype-keys"


def other_dtype(folder, choose):
    change(folder, "config.json", torch_dtype=choose(["bfloat16", "float16"]))
    return "dtype"


def paddle_key(folder, choose):
    change(
        folder,
        "config.json",
        **choose([{"fuse_attention_qkv": True}, {"rope_scaling_factor": 2.0}, {"paddlenlp_version": "3"}]),
    )
    return "paddle-keys"


def wrong_rope(folder, choose):
    wrong = [
        "linear", [], {"type": "linear"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "2"},
        {"rope_type": "spiral", "factor": 2.0}, {"factor": 2.0}, {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "dynamic", "factor": True},
    ]  # fmt: skip
    change(folder, "config.json", rope_scaling=choose(wrong))
    return "rope"


def leftover(folder, choose):
    names = ["model_state.pdparams", "pytorch_model.bin", "optimizer.pdopt", "x.pt", "model.safetensors.partial"]
    (folder / choose(names)).write_bytes(b"x")
    return "leftovers"


def cut_shard(folder, choose):
    path = some_shard(folder, choose)
    data = path.read_bytes()
    path.write_bytes(data[: choose([0, 7, 8, 100, len(data) // 2, len(data) - 1])])
    return "shard"


def longer_shard(folder, choose):
    with some_shard(folder, choose).open("ab") as file:
        file.write(b"\0" * choose([1, 4, 1000]))
    return "shard"


def lose_shard(folder, choose):
    if not (folder / INDEX).exists():
        (folder / "model.safetensors").unlink()
        return "weights"
    some_shard(folder, choose).unlink()
    return "shard"


def lose_weight(folder, choose):
    rewrite(folder, lambda shard: shard.pop(choose(sorted(shard))), choose)
    return "names"


def rename_weight(folder, choose):
    def edit(shard):
        name = choose(sorted(shard))
        shard[choose([f"x.{name}", name.replace("model", "llama") + "x", name.upper()])] = shard.pop(name)

    rewrite(folder, edit, choose)
    return "names"


def extra_weight(folder, choose):
    name = choose(
        ["model.layers.2.mlp.up_proj.weight", "model.rotary_emb.inv_freq", "a", "model.layers.0.self_attn.q_proj.bias"]
    )
    rewrite(folder, lambda shard: shard.update({name: np.zeros(3, np.float32)}), choose)
    return "names"


def wrong_shape(folder, choose):
    def edit(shard):
        name = choose(
            [name for name in sorted(shard) if shard[name].shape[0] != shard[name].shape[-1] or shard[name].ndim == 1]
        )
        values = shard[name]
        shard[name] = (
            np.ascontiguousarray(values.T) if values.ndim == 2 and choose([True, False]) else values[:-1].copy()
        )

    rewrite(folder, edit, choose)
    return "shapes"


def fewer_layers(folder, choose):
    change(folder, "config.json", num_hidden_layers=choose([1, 3]))
    return "names"


def wrong_width(folder, choose):
    change(folder, "config.json", **choose([{"vocab_size": 97}, {"intermediate_size": 25}, {"num_key_value_heads": 4}]))
    return "shapes"


def wrong_format(folder, choose):
    write_shards(folder, shards_of(folder), choose(["np", None, "tf"]))
    return "format"


def as_bits(folder, choose):
    def edit(shard):
        name = choose(sorted(shard))
        shard[name] = shard[name].astype(ml_dtypes.bfloat16).view(np.uint16)

    rewrite(folder, edit, choose)
    return "u16"


def lose_vocabulary(folder, choose):
    (folder / "tokenizer.json").unlink()
    return "tokenizer"


def cut_tokenizer(folder, choose):
    path = folder / choose(["tokenizer.json", "tokenizer_config.json"])
    path.write_text(path.read_text()[: choose([0, 5, 40])])
    return "tokenizer"


def lose_tokenizer_config(folder, choose):
    (folder / "tokenizer_config.json").unlink()
    return "tokenizer"


def large_vocabulary(folder, choose):
    content = read(folder, "tokenizer.json")
    if choose([True, False]):
        content["model"]["vocab"]["é"] = choose([96, 97, 50_000])
    else:
        content["added_tokens"].append({"id": choose([96, 1_000]), "content": "<x>"})
    write(folder, "tokenizer.json", content)
    return "tokenizer"


def paddle_tokenizer(folder, choose):
    change(folder, "tokenizer_config.json", tokenizer_class="PretrainedTokenizerFast")
    return "tokenizer"


def lose_template(folder, choose):
    (folder / "chat_template.jinja").unlink()
    change(folder, "tokenizer_config.json", chat_template="gone")
    return "template"


def other_template(folder, choose):
    if choose([True, False]):
        change(folder, "tokenizer_config.json", chat_template="Q: " + TEMPLATE)
    else:
        (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    return "template"


def broken_template(folder, choose):
    text = choose(["{% for m in messages %}", "{{ messages", "nothing of it", "{{ raise_exception('no') }}"])
    (folder / "chat_template.jinja").write_text(text)
    change(folder, "tokenizer_config.json", chat_template=text)
    return "template"


def broken_generation(folder, choose):
    (folder / "generation_config.json").write_text(
        choose(["", "{", "[]", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")])
    )
    return "generation"


def wrong_generation(folder, choose):
    wrong = [
        {"temperature": "0.7"}, {"temperature": -1}, {"top_p": 1.5}, {"top_k": 2.5}, {"eos_token_id": 96},
        {"eos_token_id": "</s>"}, {"eos_token_id": [0, -3]}, {"pad_token_id": [0]}, {"do_sample": "yes"},
        {"max_new_tokens": -1}, {"repetition_penalty": True}, {"num_beams": 0}, {"min_p": [0.1]}, {"top_p": 1e400},
    ]  # fmt: skip
    change(folder, "generation_config.json", **choose(wrong))
    return "generation"


def no_length(folder, choose):
    values = ["$(touch x)", -5, 0, "64", 64.5, True, [64], {"a": 1}, 10**30]
    change(folder, "config.json", max_position_embeddings=choose(values))
    return "config"


def no_size(folder, choose):
    change(folder, "config.json", **{choose(["hidden_size", "vocab_size", "rms_norm_eps"]): choose(["x", -1, [2]])})
    return "config"


def few_bytes_of_another_type(folder, choose):
    """The norms as config.json says, and the matrices as something else."""

    def edit(shard):
        for name, values in shard.items():
            if values.ndim > 1:
                shard[name] = values.astype(choose([ml_dtypes.bfloat16, np.float16]))

    shards = shards_of(folder)
    for shard in shards:
        edit(shard)
    write_shards(folder, shards, "pt")
    return "dtype"


def quantised(folder, choose):
    def edit(shard):
        name = choose(sorted(shard))
        shard[name] = shard[name].astype(choose([np.int8, np.uint8, np.float64, np.int64]))

    rewrite(folder, edit, choose)
    return "dtype"


def code_beside_it(folder, choose):
    (folder / choose(["modeling_llama.py", "setup.sh", "x.so", "MODEL.PY"])).write_text("x")
    return "foreign"


def code_by_name(folder, choose):
    code = {"AutoModelForCausalLM": choose(["modeling_x.X", "evil/repository--modeling_x.X"])}
    change(folder, choose(["config.json", "tokenizer_config.json"]), auto_map=code)
    return "code"


def code_for_generation(folder, choose):
    change(folder, "generation_config.json", custom_generate=choose(["evil/repository", "x"]))
    return "generation"


def wrong_token_fields(folder, choose):
    name, value = choose(
        [("eos_token", {"a": 1}), ("padding_side", "up"), ("added_tokens_decoder", {"x": {"content": "y"}})]
    )
    change(folder, "tokenizer_config.json", **{name: value})
    return "tokenizer"


def foreign_start(folder, choose):
    (folder / "start.sh").write_text(choose(["", "touch x", "#!/usr/bin/env bash\n# Start vLLM on this directory\n"]))
    return "start"


def a_link(folder, choose):
    (folder / choose(["vocab.txt", "start.sh", "a", ".hidden"])).symlink_to(choose(["/etc/passwd", "gone", "../x"]))
    return "link"


# of an index


def wrong_total(folder, choose):
    content = read(folder, INDEX)
    content["metadata"] = choose(
        [{}, {"total_size": 0}, {"total_size": content["metadata"]["total_size"] + 4}, {"total_size": "9"}, None]
    )
    write(folder, INDEX, content)
    return "total-size"


def wrong_place(folder, choose):
    content = read(folder, INDEX)
    name = choose(sorted(content["weight_map"]))
    others = sorted(set(content["weight_map"].values()) - {content["weight_map"][name]})
    content["weight_map"][name] = choose(others)
    write(folder, INDEX, content)
    return "index"


def forgotten_name(folder, choose):
    content = read(folder, INDEX)
    del content["weight_map"][choose(sorted(content["weight_map"]))]
    write(folder, INDEX, content)
    return "index"


def unknown_name(folder, choose):
    content = read(folder, INDEX)
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = choose(sorted(set(content["weight_map"].values())))
    write(folder, INDEX, content)
    return "index"


def broken_index(folder, choose):
    (folder / INDEX).write_text(choose(["", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"]))
    return "index"


def lose_index(folder, choose):
    (folder / INDEX).unlink()
    return "index"


def weight_in_two_files(folder, choose):
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    arrays, more = load_file(one), load_file(other)
    name = choose(sorted(arrays))
    save_file(more | {name: arrays[name]}, other, {"format": "pt"})
    return "index"


def shard_beside_the_index(folder, choose):
    save_file(
        {"a": np.zeros(2, np.float32)}, folder / choose(["model.safetensors", "extra.safetensors"]), {"format": "pt"}
    )
    return "index"


ANYWHERE = [
    lose_config, cut_config, lose_size, wrong_architecture, wrong_model_type, wrong_dtype_keys, other_dtype, paddle_key,
    wrong_rope, leftover, cut_shard, longer_shard, lose_shard, lose_weight, rename_weight, extra_weight, wrong_shape,
    fewer_layers, wrong_width, wrong_format, as_bits, lose_vocabulary, cut_tokenizer, lose_tokenizer_config,
    large_vocabulary, paddle_tokenizer, lose_template, other_template, broken_template, broken_generation,
    wrong_generation, no_length, no_size, few_bytes_of_another_type, quantised, code_beside_it, code_by_name,
    foreign_start, a_link, code_for_generation, wrong_token_fields,
]  # fmt: skip
WITH_INDEX = [
    wrong_total, wrong_place, forgotten_name, unknown_name, broken_index, lose_index, weight_in_two_files,
    shard_beside_the_index,
]  # fmt: skip


@pytest.mark.parametrize("way", [*ANYWHERE, *WITH_INDEX], ids=lambda way: way.__name__)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_what_is_broken_is_found_and_nothing_else(way, good, tmp_path, data):
    shards = data.draw(st.sampled_from([3] if way in WITH_INDEX else [1, 3]))
    server = data.draw(st.sampled_from(["hf", "vllm", "fastdeploy"]))
    folder = tmp_path / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good[shards], folder)
    kind = way(folder, lambda choices: choices[data.draw(st.integers(0, len(choices) - 1))])
    findings = check_model(folder, server)
    assert {finding.kind for finding in findings} == {kind}, findings
    assert all(finding.place and finding.problem and finding.remedy for finding in findings)


def test_dtype_keys_of_each_server(good, tmp_path):
    """Newer transformers write `dtype`, which means Paddle's layout to FastDeploy."""
    folder = shutil.copytree(good[1], tmp_path / "model")
    for keys, servers in (
        ({"torch_dtype": "gone", "dtype": "float32"}, {"fastdeploy"}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"fastdeploy"}),
        ({"torch_dtype": "gone", "dtype": "gone"}, {"hf", "vllm", "fastdeploy"}),
        ({"torch_dtype": "float32", "dtype": "gone"}, set()),
    ):
        change(folder, "config.json", **keys)
        assert {server for server in ("hf", "vllm", "fastdeploy") if check_model(folder, server)} == servers, keys


def test_fastdeploy_runs_fewer_models(good, tmp_path):
    folder = shutil.copytree(good[1], tmp_path / "model")
    change(folder, "config.json", architectures=["MistralForCausalLM"], model_type="mistral")
    assert check_model(folder, "vllm") == []  # the same weights
    (finding,) = check_model(folder, "fastdeploy")
    assert finding.kind == "architecture" and "Qwen2ForCausalLM" in finding.remedy


def test_rules_are_those_of_the_manifest(good, tmp_path):
    folder = shutil.copytree(good[1], tmp_path / "model")
    assert guess_server(folder) == "hf"
    for target, server in (("vllm", "vllm"), ("fastdeploy", "fastdeploy"), ("hf", "hf")):
        write_manifest(folder, target=target)
        assert guess_server(folder) == server
    write_manifest(folder, target="peft")
    with pytest.raises(ConfigError, match="--server"):
        guess_server(folder)
    with pytest.raises(ConfigError, match="no such folder"):
        guess_server(tmp_path / "nowhere")


def test_a_model_exported_without_a_template_has_none(good, tmp_path):
    folder = shutil.copytree(good[1], tmp_path / "model")
    lose_template(folder, None)
    assert [finding.kind for finding in check_model(folder, "vllm")] == ["template"]
    write_manifest(folder, target="vllm")
    assert check_folder(folder, "vllm") == []


def test_hashes_are_compared_with_the_manifest(good, tmp_path):
    folder = shutil.copytree(good[3], tmp_path / "model")
    write_manifest(folder, target="vllm")
    assert check_folder(folder, "vllm", hashes=True) == []
    change(folder, "generation_config.json", top_p=0.5)
    assert check_folder(folder, "vllm") == []
    (finding,) = check_folder(folder, "vllm", hashes=True)
    assert finding.kind == "changed" and finding.place == "generation_config.json"


def test_the_command_prints_findings_and_fails(good, tmp_path, capsys):
    folder = shutil.copytree(good[1], tmp_path / "model")
    leftover(folder, lambda choices: choices[0])
    arguments = _parser().parse_args(["export", "--check", str(folder), "--server", "fastdeploy"])
    assert arguments.run(arguments) == 1
    printed = capsys.readouterr().out
    assert "model_state.pdparams: a server may read it" in printed and "1 thing would go wrong" in printed
    (folder / "model_state.pdparams").unlink()
    assert arguments.run(arguments) == 0 and "nothing found" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--check DIR"):
        arguments = _parser().parse_args(["export", "--check", str(folder), "--target", "vllm"])
        arguments.run(arguments)
