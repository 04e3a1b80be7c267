"""Every field declared by transformers' configuration class of a family: a changed value is honoured or refused by
name.

What changes nothing there changes nothing here. transformers runs in the Python of scripts/parity_env.sh, in one
process for all models (config_fields_peer.py).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import logits_of
from oarlock.errors import ModelError
from oarlock.model_config.load import read_config
from oarlock.models.build import ModelSource, build_model

PEER = Path(__file__).with_name("config_fields_peer.py")
IDS = np.concatenate([np.zeros([2, 1], np.int64), np.random.default_rng(3).integers(0, 96, (2, 11))], 1)  # 0: pads too
_TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "mistral": _SIZES,
    "gemma": _SIZES | {"head_dim": 8, "pad_token_id": 3},
    "opt": _TOKENS
    | {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 3,
       "max_position_embeddings": 64, "init_std": 0.1},
    "bloom": _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "gptj": _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "initializer_range": 0.1},
}  # fmt: skip
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu", "silu", "quick_gelu", "relu2", "tanh"]
# "field" or "family.field" -> other values.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [112], "hidden_size": [48], "n_embd": [48], "intermediate_size": [96], "ffn_dim": [96],
    "num_hidden_layers": [3], "n_layer": [3], "num_attention_heads": [2], "n_head": [2], "num_key_value_heads": [1, 4, None],
    "max_position_embeddings": [128], "n_positions": [128], "initializer_range": [0.2], "init_std": [0.2],
    "rms_norm_eps": [0.3], "layer_norm_epsilon": [1e-3], "tie_word_embeddings": [True, False],
    "hidden_act": _ACTIVATIONS, "activation_function": _ACTIVATIONS,
    "attention_bias": [True], "mlp_bias": [True], "attention_dropout": [0.5], "dropout": [0.5], "layerdrop": [0.5],
    "hidden_dropout": [0.5], "attn_pdrop": [0.5], "embd_pdrop": [0.5], "resid_pdrop": [0.5],
    "head_dim": [16, 8], "bos_token_id": [5, None], "eos_token_id": [7, [2, 9]], "pad_token_id": [0, 4, None],
    "use_cache": [False], "pretraining_tp": [2], "chunk_size_feed_forward": [3], "slow_but_exact": [True],
    "is_encoder_decoder": [True], "output_hidden_states": [True], "return_dict": [False],
    "id2label": [{"0": "a", "1": "b", "2": "c"}], "problem_type": ["regression"], "dtype": ["bfloat16", "float16"],
    "sliding_window": [4, 64, None], "use_sliding_window": [True], "max_window_layers": [1], "rotary_dim": [8],
    "layer_types": [["full_attention", "sliding_attention"], ["full_attention", "full_attention"]], "n_inner": [48],
    "use_bidirectional_attention": [True], "word_embed_proj_dim": [16, 32], "do_layer_norm_before": [False],
    "_remove_final_layer_norm": [True], "enable_bias": [False], "layer_norm_elementwise_affine": [False],
    "apply_residual_connection_post_layernorm": [True],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.5] * 4, "long_factor": [2.0] * 4,
         "original_max_position_embeddings": 16, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 1e4, **_LLAMA3},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ],
}  # fmt: skip
# Fields that need a second field to have an effect.
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 2}),
    (
        "mistral",
        {"num_key_value_heads": 4, "head_dim": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
    (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 8,
        },
    ),
]
NOT_CHANGED = {"architectures", "label2id", "transformers_version"}  # written by transformers itself


@pytest.fixture(scope="module")
def result(tmp_path_factory, parity_python) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("fields")
    # Qwen2 uses a window only if use_sliding_window is set.
    values = VALUES | {"qwen2.sliding_window": [64, None]}
    job = {"root": str(root), "ids": IDS.tolist(), "families": BASES, "values": values, "together": TOGETHER}
    (root / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [parity_python, str(PEER), str(root / "job.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "result.json").read_text())


def compute_logits(folder: Path) -> np.ndarray:
    config = read_config(folder)
    model = build_model(ModelSource(folder, config, from_weights=True))
    return logits_of(model, IDS)


def remove_stamp(folder: Path) -> None:
    """Remove the fields that name the writing program and the dtype of the weights."""
    content = json.loads((folder / "config.json").read_text())
    for name in ("transformers_version", "dtype", "torch_dtype", "architectures"):
        content.pop(name, None)
    if "rope_parameters" in content:  # with the field names before transformers 5
        rope = dict(content.pop("rope_parameters") or {})
        content["rope_theta"] = rope.pop("rope_theta", 1e4)
        content["rope_scaling"] = rope if rope.get("rope_type") != "default" or len(rope) > 1 else None
    (folder / "config.json").write_text(json.dumps(content))


def describe_outcome(folder: Path) -> np.ndarray | str:
    try:
        return compute_logits(folder)
    except ModelError as error:
        return str(error)


@pytest.mark.parametrize("family", BASES)
def test_every_declared_field_is_honoured_or_refused_by_name(result, family):
    assert not set(result["declared"][family]) - set(VALUES) - NOT_CHANGED, "fields that this test does not change"
    wrong, followed, refused = [], 0, set()
    for case in (case for case in result["cases"] if case["family"] == family and "folder" in case):
        folder, what = Path(case["folder"]), f"{case['field']} = {case['value']}"
        theirs = np.load(folder / "scores.npy")
        ours = describe_outcome(folder)
        if isinstance(ours, str):
            refused.add(case["field"])
            names = {case["field"], "rope_scaling"} if case["field"] == "rope_parameters" else {case["field"]}
            if "window" in case["field"] or case["field"] == "layer_types":
                names.add("sliding_window")
            if not any(name in ours for name in names):
                wrong.append(f"{what}: refused without its name: {ours}")
        elif not np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max()):
            wrong.append(f"{what}: scores differ by {np.abs(ours - theirs).max():.1e}")
        else:
            followed += 1
        remove_stamp(folder)
        again = describe_outcome(folder)
        if isinstance(ours, str) != isinstance(again, str):
            wrong.append(f"{what}: another outcome without the stamp: {again if isinstance(again, str) else 'read'}")
        elif not isinstance(ours, str) and not np.array_equal(ours, again):
            wrong.append(f"{what}: other scores without the stamp")
    assert not wrong, "\n".join(wrong)
    assert followed > 15 and "" not in refused and len(refused) < 12, refused
