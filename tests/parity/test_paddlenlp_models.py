"""Our decoder computes what PaddleNLP's own models compute, with the same weights under the same names."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddlenlp.transformers
import pytest
from paddle.nn.functional import cross_entropy

from families import family_config
from helpers import make_norms_and_biases_nontrivial
from oarlock.families.registry import FAMILIES
from oarlock.model_config.load import find_model_class
from oarlock.ops import install, library
from oarlock.weights.layout import parameter_shards

pytestmark = pytest.mark.usefixtures("paddles_own_ops")
FUSED = {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, packed matrices": ("llama", FUSED),
    "llama, linear scaling": ("llama", {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0}),
    "llama, ntk scaling": ("llama", {"rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, packed matrices": ("qwen2", FUSED),
    # PaddleNLP's ignores windows, and on one card it neither reads nor trains the row of the padding.
    "mistral": ("mistral", {"sliding_window": None, "pad_token_id": None}),
    "gemma": ("gemma", {"hidden_act": "gelu"}),  # PaddleNLP's always computes the exact function
    "gemma, packed matrices": ("gemma", {"hidden_act": "gelu", **FUSED}),
}
IDS = np.random.default_rng(4).integers(1, 512, (2, 24))
MASK = np.ones_like(IDS)
MASK[1, 17:] = 0


def run(model: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and gradients of the weights."""
    model.train()
    ids, mask = paddle.to_tensor(IDS), paddle.to_tensor(MASK)
    outputs = model(input_ids=ids, attention_mask=mask)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    losses = cross_entropy(logits[:, :-1].astype("float32"), ids[:, 1:], reduction="none")
    (losses.squeeze(-1) * mask[:, 1:].astype("float32")).sum().backward()
    return logits.numpy(), {
        shard.name: shard.tensor.grad.numpy() for shard in parameter_shards(model) if not shard.tensor.stop_gradient
    }


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_paddlenlp(case, fused):
    if fused and library.why_missing():
        pytest.skip(library.why_missing())
    family, changes = CASES[case]
    config = family_config(family, use_cache=False, **changes)
    paddle.seed(6)
    theirs = make_norms_and_biases_nontrivial(getattr(paddlenlp.transformers, FAMILIES[family].architecture)(config))
    ours = find_model_class(config)(config)
    state = theirs.state_dict()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    ours.set_state_dict(state)
    wanted, gradients_wanted = run(theirs)
    install.use(fused)
    found, gradients = run(ours)
    np.testing.assert_allclose(found[MASK > 0], wanted[MASK > 0], rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert gradients.keys() == gradients_wanted.keys()
    for name, gradient in gradients_wanted.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
