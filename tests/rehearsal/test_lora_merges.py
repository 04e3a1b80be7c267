"""`--merge_weights` under tensor 2 x pipeline 2 gives the merged model of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from helpers import LLM, ROOT


def test_merged_models_do_not_depend_on_the_plan(tmp_path, tiny_model):
    program = Path(__file__).with_name("lora_merges.py")
    environment = os.environ | {"PYTHONPATH": f"{LLM}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(tiny_model), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    base = load_file(tiny_model / "model.safetensors")
    one, four = (load_file(tmp_path / plan / "merged" / "model.safetensors") for plan in ("one", "four"))
    assert one.keys() == four.keys() == base.keys()
    for name, weight in one.items():
        assert np.abs(weight - four[name]).max() < 1e-5, name
        if "proj" in name:
            assert np.abs(weight - base[name]).max() > 1e-3, f"{name} was not trained"
        else:
            assert np.array_equal(four[name], base[name]), f"{name} has no LoRA"
    for plan in ("one", "four"):
        folder = tmp_path / plan / "merged"
        assert json.loads((folder / "merge.json").read_text())["proof"]["effect"] > 1e-3
        for name in ("chat_template.jinja", "tokenizer.json"):
            assert (folder / name).read_text() == (tmp_path / plan / name).read_text()
        assert not [path.name for path in (tmp_path / plan).iterdir() if path.name.startswith(".")]
