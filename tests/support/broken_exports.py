"""Ways to break an exported directory: (folder, choose) -> the expected kind of finding; choose(list) picks one."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from support.broken_tokenizers import (
    broken_generation,
    broken_template,
    cut_tokenizer,
    large_vocabulary,
    lose_template,
    lose_tokenizer_config,
    lose_vocabulary,
    other_template,
    paddle_tokenizer,
    wrong_generation,
)
from support.small_exports import (
    INDEX,
    change,
    list_shards,
    rewrite,
    some_shard,
    write_shards,
)


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
    write_shards(folder, list_shards(folder), choose(["np", None, "tf"]))
    return "format"


def as_bits(folder, choose):
    def edit(shard):
        name = choose(sorted(shard))
        shard[name] = shard[name].astype(ml_dtypes.bfloat16).view(np.uint16)

    rewrite(folder, edit, choose)
    return "u16"


def no_length(folder, choose):
    values = ["$(touch x)", -5, 0, "64", 64.5, True, [64], {"a": 1}, 10**30]
    change(folder, "config.json", max_position_embeddings=choose(values))
    return "config"


def no_size(folder, choose):
    change(folder, "config.json", **{choose(["hidden_size", "vocab_size", "rms_norm_eps"]): choose(["x", -1, [2]])})
    return "config"


def few_bytes_of_another_type(folder, choose):
    """The norms have the dtype of config.json, and the matrices another one."""

    def edit(shard):
        for name, values in shard.items():
            if values.ndim > 1:
                shard[name] = values.astype(choose([ml_dtypes.bfloat16, np.float16]))

    shards = list_shards(folder)
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


ANYWHERE = [
    lose_config, cut_config, lose_size, wrong_architecture, wrong_model_type, wrong_dtype_keys, other_dtype, paddle_key,
    wrong_rope, leftover, cut_shard, longer_shard, lose_shard, lose_weight, rename_weight, extra_weight, wrong_shape,
    fewer_layers, wrong_width, wrong_format, as_bits, lose_vocabulary, cut_tokenizer, lose_tokenizer_config,
    large_vocabulary, paddle_tokenizer, lose_template, other_template, broken_template, broken_generation,
    wrong_generation, no_length, no_size, few_bytes_of_another_type, quantised, code_beside_it, code_by_name,
    foreign_start, a_link, code_for_generation, wrong_token_fields,
]  # fmt: skip
