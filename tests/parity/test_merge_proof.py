"""The verification of a merge."""

from __future__ import annotations

import numpy as np
import pytest
from paddlenlp.transformers import AutoConfig
from safetensors.numpy import load_file

from helpers import make_adapter
from oarlock.errors import ModelError
from oarlock.merge import deltas, verify
from oarlock.merge.inputs import AdapterMix
from oarlock.merge.merge import merge
from oarlock.model_config.load import find_model_class
from oarlock.models import layer_offload
from oarlock.models.build import ModelSource, build_model
from oarlock.models.layer_offload import make_empty_model
from support.merge_models import IDS, compute_logits

# verification


def test_layer_by_layer_logits_equal_the_full_model(bases):
    config = AutoConfig.from_pretrained(str(bases["llama"]))
    arrays = load_file(bases["llama"] / "model.safetensors")
    model = make_empty_model(find_model_class(config), config)
    most = 0

    def read(name, into):
        nonlocal most
        most = max(most, sum(parameter._is_initialized() for parameter in model.parameters()))
        return arrays[name]

    found = layer_offload.stream_logits(model, read, set(arrays), IDS)
    whole = build_model(ModelSource(bases["llama"], config, from_weights=True))
    assert np.array_equal(found, compute_logits(whole))
    assert most == 1  # the layer being read
    assert not any(parameter._is_initialized() for parameter in model.parameters())


@pytest.mark.parametrize("wrong", ["scaling", "one layer"])
def test_a_wrong_merge_is_detected(bases, adapter, tmp_path, monkeypatch, wrong):
    right = deltas.LoraDelta.read_matrices

    def matrices(self):
        a, b = right(self)
        wrong_here = wrong == "scaling" or self.layer.endswith("layers.1.self_attn.k_proj")
        return (a, b * np.float32(1.02)) if wrong_here else (a, b)

    monkeypatch.setattr(deltas.LoraDelta, "read_matrices", matrices)
    with pytest.raises(ModelError, match="the merged model is not base \\+ adapters"):
        merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "new" / "merged")
    assert not list(tmp_path.glob("new/*")) and not list(tmp_path.glob("new/.*"))


def test_differences_that_the_check_accepts():
    tuned = np.linspace(-2, 2, 100, dtype=np.float32).reshape(1, 2, 50)
    plain, random = tuned + np.float32(0.1), np.random.default_rng(0)
    noise = random.uniform(-1, 1, tuned.shape).astype(np.float32)
    judge = verify.judge
    assert judge(tuned, plain, tuned + 1.5e-4 * noise, "float32").difference < 1e-4
    assert "--dtype" not in judge(tuned, plain, tuned, "float32").text()
    with pytest.raises(ModelError, match="differ by"):
        judge(tuned, plain, tuned + 1e-3 * noise, "float32")
    assert judge(tuned, plain, tuned + 1e-3 * noise, "bfloat16").allowed == 2.0**-5
    with pytest.raises(ModelError, match="differ by"):
        judge(tuned, plain, tuned + 0.1 * noise, "bfloat16")
    # an adapter so weak that its absence is within 1e-4
    with pytest.raises(ModelError, match="differ by"):
        judge(tuned, tuned + np.float32(1e-4), tuned + np.float32(1e-4), "float32")
    with pytest.raises(ModelError, match="too coarse"):
        judge(tuned, tuned + np.float32(1e-3), tuned + np.float32(1e-3), "bfloat16")
    assert "loses much" in judge(tuned, tuned + np.float32(1e-3), tuned + np.float32(9e-4), "bfloat16").text()
    for broken in ((tuned * np.nan, tuned), (tuned, tuned * np.inf)):
        with pytest.raises(ModelError, match="not finite"):
            judge(broken[0], plain, broken[1], "float32")


def test_an_adapter_of_zeros_is_reported(bases, tmp_path, capsys):
    adapter = make_adapter(bases["llama"], tmp_path / "adapter", std=0.0)
    merge(bases["llama"], AdapterMix.open([adapter]), tmp_path / "merged")
    assert "the adapters change nothing" in capsys.readouterr().out
