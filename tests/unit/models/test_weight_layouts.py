"""Weights in Paddle's and in Hugging Face's layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

from helpers import TINY_LLAMA, make_norms_and_biases_nontrivial
from oarlock.errors import ModelError
from oarlock.models.build import build_model, count_parameters, set_parameter
from oarlock.weights.weight_folder import WeightFolder

# weights


def save_as_hugging_face(model, folder: Path, shards: int = 1, bf16: bool = False) -> None:
    """Save the same weights as transformers would: [out, in], model.* names, format pt."""
    import ml_dtypes
    from safetensors.numpy import save_file

    tensors = {}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name.endswith("proj.weight") or name == "lm_head.weight":
            array = np.ascontiguousarray(array.T)
        tensors[name.replace("llama.", "model.")] = array.astype(ml_dtypes.bfloat16) if bf16 else array
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        part = {n: tensors[n] for n in names[i::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def source(folder: Path, config: LlamaConfig):
    from oarlock.models.build import ModelSource

    return ModelSource(folder, config, from_weights=True)


@pytest.mark.parametrize(
    ("layout", "shards", "bf16"), [("np", 1, False), ("pt", 1, False), ("pt", 3, False), ("pt", 1, True)]
)
def test_weights_load_from_either_layout(tmp_path, layout, shards, bf16):
    config = LlamaConfig(**TINY_LLAMA)
    model = make_norms_and_biases_nontrivial(LlamaForCausalLM(config))
    if layout == "np":
        model.save_pretrained(str(tmp_path), safe_serialization=True)
    else:
        save_as_hugging_face(model, tmp_path, shards, bf16)
    before = sorted(p.name for p in tmp_path.iterdir())
    loaded = build_model(source(tmp_path, config))
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing is written into the source folder
    for name, value in model.state_dict().items():
        expected = value.numpy()
        if bf16:
            import ml_dtypes

            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(loaded.state_dict()[name].numpy(), expected), name


def test_half_precision_parameters_accept_any_array():
    import paddle

    values = np.asarray([[1.5, -2.25]], np.float32)
    for dtype in ("bfloat16", "float16", "float32"):
        parameter = paddle.zeros([1, 2], dtype)
        set_parameter(parameter, values)
        assert parameter.astype("float32").tolist() == values.tolist()
        number = paddle.zeros([], dtype)  # GPT-J stores its scale like this
        set_parameter(number, np.asarray(1.5, np.float32))
        assert number.astype("float32").item() == 1.5


def test_invalid_weight_folders_are_refused(tmp_path):
    config = LlamaConfig(**TINY_LLAMA)
    with pytest.raises(ModelError, match=r"no model.safetensors"):
        WeightFolder.open(tmp_path)
    (tmp_path / "model_state.pdparams").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pickle format that can run code.*--allow_pickle_weights"):
        WeightFolder.open(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a safetensors file, or a truncated one"):
        WeightFolder.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match=r"names gone.safetensors, which does not exist"):
        WeightFolder.open(tmp_path)
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | {"num_hidden_layers": 1}))).save_pretrained(
        str(other), safe_serialization=True
    )
    with pytest.raises(ModelError, match=r"says 2 layers, and the weights next to it have 1"):
        build_model(source(other, config))
    with pytest.raises(ModelError, match=r"vocabulary of 600 .* has 512 rows of 32"):
        build_model(source(other, LlamaConfig(**(TINY_LLAMA | {"num_hidden_layers": 1, "vocab_size": 600}))))


def test_tied_embeddings_count_once():
    model = LlamaForCausalLM(LlamaConfig(**(TINY_LLAMA | {"tie_word_embeddings": True})))
    untied = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
    assert count_parameters(untied)[0] - count_parameters(model)[0] == 512 * 32
    assert math.prod(model.lm_head.weight.shape) == 512 * 32
