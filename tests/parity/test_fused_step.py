"""Training with the fused ops has the losses of training without them, with any other options."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from helpers import make_norms_and_biases_nontrivial
from oarlock.decoder.model import defer_logits
from oarlock.model_config.load import find_config_class, find_model_class
from oarlock.ops import install, library
from oarlock.ops.linear_cross_entropy import DeferredLogits
from oarlock.peft.lora import LoRA
from oarlock.train.step.loss import TokenCrossEntropy

pytestmark = [
    pytest.mark.usefixtures("paddles_own_ops"),
    pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing()),
]
SIZES = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "use_cache": False, "use_flash_attention": False,
    "use_fast_layer_norm": False, "seq_length": 48,
}  # fmt: skip
SOME = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
ALL = (*SOME, "k_proj", "up_proj")  # fused
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},  # with biases
    "mistral": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 10},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 10},  # queries and keys are normed
    "gemma2": {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 7},  # norms after layers, capped logits
}


def train_four_steps(family, lora=(), recompute=False, fuse=False):
    """Losses of four steps, each on another padded batch, and the last output of the model's head."""
    more = {"fuse_attention_qkv": True, "fuse_attention_ffn": True} if fuse else {}
    config = find_config_class(family)(**SIZES, **FAMILIES[family], **more, recompute=recompute)
    paddle.seed(5)
    model = make_norms_and_biases_nontrivial(find_model_class(config)(config))
    if lora:
        method = LoRA(r=4, alpha=8.0, targets=lora)
        method.attach(model)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.set_value(paddle.randn(parameter.shape) * 0.1)
    if recompute:
        model.recompute_enable()
    model.train()
    defer_logits(model)
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=trained, weight_decay=0.1)
    criterion, random, found = TokenCrossEntropy(), np.random.default_rng(3), []
    for _ in range(4):
        ids, lengths = random.integers(1, 96, (3, 48)), random.integers(9, 49, 3)
        text = np.arange(48) < lengths[:, None]
        labels = paddle.to_tensor(np.where(text, np.roll(ids, -1, 1), -100))
        criterion.normalizer = int(text.sum())
        output = model(paddle.to_tensor(ids * text), attention_mask=paddle.to_tensor(text.astype("int64")))
        loss = criterion(output, labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        found.append(loss.item())
    return found, output


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, {"lora": targets}) for family in ("llama", "qwen2") for targets in (SOME, ALL)),
        ("llama", {"recompute": True}),
        ("llama", {"lora": ALL, "recompute": True}),
        ("llama", {"fuse": True}),
    ],
    ids=str,
)
def test_losses_do_not_change(family, settings):
    install.use(False)
    plain, scores = train_four_steps(family, **settings)
    assert isinstance(scores, paddle.Tensor) and len({round(value, 4) for value in plain}) == 4
    install.use(True)
    fused, held = train_four_steps(family, **settings)
    np.testing.assert_allclose(fused, plain, rtol=1e-5)
    assert isinstance(held, DeferredLogits) == (family != "gemma2")


def test_logits_are_computed_where_they_are_used():
    """In evaluation, without gradients, and for a loss that does not know deferred logits."""
    install.use(True)
    config = find_config_class("llama")(**SIZES)
    model, ids = find_model_class(config)(config), paddle.arange(20).reshape([2, 10])
    model.train()
    assert model(ids).shape == [2, 10, 96]
    defer_logits(model)
    assert isinstance(model(ids), DeferredLogits)
    with paddle.no_grad():
        assert model(ids).shape == [2, 10, 96]
    model.eval()
    assert model(ids).shape == [2, 10, 96]
