"""Recipes: a YAML file with an include, read into a training configuration."""

from __future__ import annotations

import os
from pathlib import Path

from harness import Harness

from oarlock.config.load import load_config
from oarlock.config.pretrain import PretrainConfig
from oarlock.errors import ConfigError

# The kinds of files next to the recipe that it may include.
BESIDE = {
    "itself.yaml": "include: recipe.yaml\n",
    "other.yaml": "include: third.yaml\nmax_steps: 7\n",
    "third.yaml": "learning_rate: 1.0e-4\n",
    "bytes.yaml": "\x00\x01",
}


def target(data: bytes, folder: Path) -> None:
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
        for name, text in BESIDE.items():
            (folder / name).write_text(text)
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(data)
    try:
        load_config(PretrainConfig, [str(recipe), "--do_train"])
    except ConfigError as error:
        assert str(folder) in str(error) or "--" in str(error), error
        raise


def seeds() -> list[bytes]:
    recipes = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))
    own = [
        "include: other.yaml\nmax_steps: 3\n",
        "include: [other.yaml, third.yaml, pipe]\nmodel:\n  model_name_or_path: x\n",
        "a: &a [x, x]\nb: [*a, *a]\nmax_steps: *a\n",
        "data:\n  input_dir:\n    data/a: 0.3\n    data/b: 0.7\n",
        "data:\n  input_dir:\n  - {path: data/a, weight: 2}\n  - 0.7 data/b\n",
        "output_dir: 2024-02-29\nseed: 0x10\nlearning_rate: .inf\nbf16: yes\n",
        '{"max_steps": 3, "output_dir": "x\\u00e9"}',
    ]
    return [*(path.read_bytes() for path in recipes[:12]), *(text.encode() for text in own)]


HARNESS = Harness(
    target,
    seeds,
    tokens=[
        b"include: ",
        b"*a",
        b"&a ",
        b"<<: *a",
        b"!!int ",
        b"!!python/object:os.system ",
        b"---\n",
        b"? ",
        b"- " * 40,
        b"[" * 40,
        b"2024-02-30",
        b"9" * 60,
        b"0x",
        b"1:2:3",
        b"|\n ",
        b">-\n ",
        b"\\0",
        b"\\ud800",
        b"pipe",
        b"/dev/zero",
        b"itself.yaml",
        b".",
        b"%TAG ! x\n",
        b"\xff",
        b"\xef\xbb\xbf",
        b"{a: 1, a: 2}",
        b"1e999",
        b".nan",
    ],
)
