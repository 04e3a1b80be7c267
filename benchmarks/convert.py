"""Memory and time of converting a generated Llama between Paddle's and Hugging Face's layout, beside copying its files.

    python benchmarks/convert.py [--size 1GB]

`over` is the process's peak (VmHWM: all pages, those of mapped files included) above what it held after its imports;
the `bound` is twice the largest tensor + 300 MB. Every row is a process of its own, in turns; copying writes through to
the disk, as converting does, and converting also hashes what it writes. `speed` is that of copying = 1.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import free_of_noise, report
from load_weights import SIZES, generate, in_child
from merge import MB, beside_copying, measured

# Generated form -> where it goes; "fused" is Paddle's with fuse_attention_qkv and fuse_attention_ffn.
WAYS = {"paddle": "hf", "hugging_face": "paddle", "bfloat16": "paddle", "fused": "hf"}


def generate_fused(folder: Path, sizes: dict[str, int]) -> None:
    """As generate() does it, with q, k, v and gate, up side by side."""
    import json

    import numpy as np
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM
    from safetensors.numpy import save_file

    from oarlock.models.construct import without_values

    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads // 4, architectures=["LlamaForCausalLM"],
        fuse_attention_qkv=True, fuse_attention_ffn=True,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    with without_values():
        shapes = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    random, shards = np.random.default_rng(0), [{}]
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02) + (len(shape) == 1)
        if sum(array.nbytes for array in shards[-1].values()) + values.nbytes > 400 * MB:
            shards.append({})
        shards[-1][name] = values
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "np"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def converted(source: Path, output: Path, to: Any, proof: bool) -> dict[str, Any]:
    from oarlock.export.convert import ConvertOptions, convert

    options = ConvertOptions(proof=proof, shard_bytes=400 * MB)
    return measured(lambda: convert(source, output, to, options).proof)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1GB")
    parser.add_argument("--only", choices=WAYS, help="one of the forms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="for the generated weights; by default the system's temporary folder")
    words = parser.parse_args()
    from oarlock.environment.cpu import available_cores
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle(available_cores())
    import paddlenlp.transformers  # noqa: F401

    import oarlock.export.convert  # noqa: F401

    set_paddlenlp_log_level("error")
    rows = []
    for form, to in WAYS.items():
        if words.only not in (None, form):
            continue
        with tempfile.TemporaryDirectory(prefix="oarlock-convert-", dir=words.folder) as name:
            source, output = (Path(name) / part for part in ("source", "output"))
            make = generate_fused if form == "fused" else partial(generate, form=form)
            in_child(partial(make, source, sizes=SIZES[words.size]))
            run = partial(converted, source, output, to)
            ways = {f"to {to}": partial(run, False), f"to {to}, with proof": partial(run, True)}
            rows += [{"files": form} | row for row in beside_copying(source, output, ways, words.repeats)]
    ways_of_ours = [row for row in rows if row["way"] != "copy"]
    report(
        "converting",
        rows,
        within_bound=all(row["over MB"] <= row["bound MB"] for row in ways_of_ours),
        half_of_copying=all(row["speed"] >= 0.5 for row in ways_of_ours if "proof" not in row["way"]),
        repeats=words.repeats,
        load_average=free_of_noise(),
    )


if __name__ == "__main__":
    main()
