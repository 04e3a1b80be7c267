"""A small exported directory, and helpers that change its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

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
    """Parameter shapes as in files written by transformers 4."""
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


def list_shards(folder: Path) -> list[dict[str, np.ndarray]]:
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


Choose = Callable[[list[Any]], Any]


def change(folder: Path, name: str, **values: Any) -> None:
    content = read(folder, name) | values
    write(folder, name, {key: value for key, value in content.items() if value != "gone"})


def some_shard(folder: Path, choose: Choose) -> Path:
    return choose(sorted(folder.glob("*.safetensors")))


def rewrite(folder: Path, edit: Callable[[dict[str, np.ndarray]], None], choose: Choose, metadata: str = "pt") -> None:
    shards = list_shards(folder)
    edit(choose(shards))
    write_shards(folder, shards, metadata)
