"""Ways to break the index of an exported directory, as in broken_exports.py."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file, save_file

from support.small_exports import (
    INDEX,
    read,
    write,
)


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


WITH_INDEX = [
    wrong_total, wrong_place, forgotten_name, unknown_name, broken_index, lose_index, weight_in_two_files,
    shard_beside_the_index,
]  # fmt: skip
