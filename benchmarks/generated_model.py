"""Llamas of random weights, in shards of every form that people have them in."""

from __future__ import annotations

import json
from pathlib import Path

from common import MB

SHARD_BYTES = 400 * MB
FORMS = ("paddle", "hugging_face", "bfloat16")  # float32 in either layout; bfloat16 as on the hub
SIZES = {
    "50MB": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12},
    "1GB": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18},
    "3GB": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 13},
}


def generate(folder: Path, form: str, sizes: dict[str, int]) -> None:
    """Write a model.

    Args:
        form: of FORMS, or "fused": Paddle's layout with q, k, v and gate, up side by side, and grouped key/value heads.
    """
    import ml_dtypes
    import numpy as np
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM
    from safetensors.numpy import save_file

    from oarlock.models.construct import without_values

    heads, is_fused = sizes["hidden_size"] // 64, form == "fused"
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads // 4 if is_fused else heads,
        architectures=["LlamaForCausalLM"],
        **({"fuse_attention_qkv": True, "fuse_attention_ffn": True} if is_fused else {}),
    )  # fmt: skip
    config.save_pretrained(str(folder))
    with without_values():
        shapes = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    random = np.random.default_rng(0)
    in_paddles_layout = form in ("paddle", "fused")
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes.items():
        if not in_paddles_layout:
            shape = shape[::-1] if "proj" in name or "lm_head" in name else shape
            name = name.replace("llama.", "model.")
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)  # as models begin
        values += len(shape) == 1  # weights of norms
        values = values.astype(ml_dtypes.bfloat16) if form == "bfloat16" else values
        if sum(array.nbytes for array in shards[-1].values()) + values.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = values
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "np" if in_paddles_layout else "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
