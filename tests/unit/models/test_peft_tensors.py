"""PEFT folders whose tensors do not match adapter_config.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from oarlock.errors import ModelError
from oarlock.export.peft import check_expert_names
from oarlock.peft.hf_peft_folder import open_peft

Q, V = (f"base_model.model.model.layers.{i}.self_attn.{name}_proj" for i, name in ((0, "q"), (1, "v")))


def write(folder: Path, tensors: dict | None = None, **fields) -> Path:
    rng = np.random.default_rng(0)
    pairs = {
        f"{layer}.lora_{which}.weight": rng.normal(size=shape).astype(np.float32)
        for layer in (Q, V)
        for which, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    for name, array in (tensors or {}).items():
        pairs[name] = array
    save_file({name: array for name, array in pairs.items() if array is not None}, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("tensors", "fields", "words"),
    [
        ({}, {"r": 16}, "q_proj.lora_A.weight has rank 4, adapter_config.json says 16"),
        ({}, {"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A.weight has rank 4, adapter_config.json says 2"),
        ({}, {"rank_pattern": {".*q_proj": 2}}, "rank_pattern '.*q_proj': only layer names are supported"),
        ({f"{Q}.lora_B.weight": None}, {}, "model.layers.0.self_attn.q_proj has only A"),
        ({f"{Q}.lora_B.weight": np.ones((8, 4, 1), np.float32)}, {}, r"float32 \[8, 4, 1\], not a LoRA matrix"),
        ({f"{Q}.lora_B.weight": np.ones((8, 4), np.int8)}, {}, r"int8 \[8, 4\], not a LoRA matrix"),
        ({}, {"target_modules": ["q_proj"]}, "v_proj.lora_A.weight exists, but target_modules"),
        ({}, {"layers_to_transform": [0]}, "v_proj.lora_A.weight exists, but layers_to_transform"),
        ({}, {"layers_to_transform": 1}, "q_proj.lora_A.weight exists, but layers_to_transform"),
        ({}, {"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({}, {"lora_alpha": float("nan")}, "NaN is not a JSON number"),
        ({}, {"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object"),
        ({}, {"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern.q_proj must be a number; got '8'"),
        ({}, {"lora_dropout": "0.1"}, "lora_dropout must be a number; got '0.1'"),
    ],
)
def test_two_files_that_disagree_are_refused_by_name(tmp_path, tensors, fields, words):
    with pytest.raises(ModelError, match=words):
        open_peft(write(tmp_path, tensors, **fields))


def test_valid_tensors_are_read_and_layers_without_tensors_are_reported(tmp_path, capsys):
    found = open_peft(
        write(tmp_path, target_modules=["q_proj", "self_attn.v_proj", "gate_proj"], layers_to_transform=[0, 1])
    )
    assert len(found.names) == 4 and found.settings["r"] == 4
    assert "adapter_config.json names gate_proj, and the file has no tensor of it" in capsys.readouterr().out


def test_non_finite_values_are_refused(tmp_path):
    from dataclasses import replace

    bad = f"{Q}.lora_B.weight"
    found = open_peft(write(tmp_path, {bad: np.full((8, 4), np.nan, np.float32)}))
    with pytest.raises(ModelError, match="holds values that are not finite numbers"):
        replace(found, places={"b": (bad, 1.0)}).value("b", (4, 8))


def test_adapters_of_experts_and_of_dense_layers_with_their_names_are_not_exported():
    """PEFT 0.21 with transformers 5 computes another model from them."""

    def name(part: str) -> str:
        return f"base_model.model.model.layers.1.{part}.lora_A.weight"

    experts = [name(f"mlp.experts.{i}.{part}_proj") for i in (0, 1) for part in ("gate", "up", "down")]
    check_expert_names([*experts, name("self_attn.q_proj")], Path("x"))
    check_expert_names([name("mlp.gate_proj"), name("self_attn.q_proj")], Path("x"))
    with pytest.raises(ModelError, match=r"x: .*model.layers.1.mlp.shared_experts.up_proj, which has the name"):
        check_expert_names([*experts, name("mlp.shared_experts.up_proj")], Path("x"))
