"""Freezing parameters does not change the gradients of the trained ones, with adapters, in every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle.nn import functional as F

from families import family_model
from oarlock.families.registry import FAMILIES as REGISTRY
from oarlock.ops import install
from oarlock.peft.lora import LoRA
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from oarlock.peft.quantization import Quantization
from support.family_checks import NAMES

pytestmark = pytest.mark.usefixtures("paddles_own_ops")
TEXT = [[9, 30, 41, 100, 7, 88, 33, 12], [400, 5, 17, 23, 310, 6, 44, 219]]
METHODS: dict[str, Any] = {
    "lora": LoRA(2, 4.0),
    "qlora": LoRA(2, 4.0, quantization=Quantization(block_size=16)),
    "prefix": Prefix(3),
    "p_tuning": PTuning(3, "lstm"),
}
CASES = [(name, method) for name in NAMES for method in METHODS if method != "prefix" or REGISTRY[name].kv_axes]


def compute_gradients(model) -> dict[str, np.ndarray]:
    """Gradients of the trained parameters for non-uniform gradients of the logits."""
    model.train()
    outputs = model(input_ids=paddle.to_tensor(TEXT))
    scores = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    loss = F.cross_entropy(scores.astype("float32"), paddle.to_tensor(TEXT), reduction="none")
    (loss * paddle.arange(1, 9, dtype="float32")).sum().backward()
    found = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


def make_model_with_adapter(name: str, method: str, **changes: Any):
    """A model with an adapter of random values."""
    model = family_model(name, 3, METHODS[method], use_cache=False, **changes)
    paddle.seed(5)
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            parameter.set_value(parameter + paddle.randn(parameter.shape) * 0.2)
    return model


def check_adapter(model) -> None:
    trained = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    frozen_base = compute_gradients(model)
    assert set(frozen_base) == trained
    for parameter in model.parameters():
        parameter.stop_gradient = False
    nothing_frozen = compute_gradients(model)
    assert len(nothing_frozen) > len(trained)
    for name in trained:
        expected = nothing_frozen[name]
        np.testing.assert_allclose(
            frozen_base[name], expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max(), err_msg=name
        )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_freezing_the_base_does_not_change_adapter_gradients(name, method, fused):
    install.use(fused)
    check_adapter(make_model_with_adapter(name, method))


@pytest.mark.parametrize("name", ["opt", "bloom", "chatglm", "glm", "gptj"])
def test_adapters_with_recomputation(name):
    model = make_model_with_adapter(name, "lora", recompute=True)
    model.recompute_enable()
    again = make_model_with_adapter(name, "lora")
    for (key, found), expected in zip(compute_gradients(model).items(), compute_gradients(again).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_have_norms_and_biases_that_matter(name):
    """With norms of 1 and biases of 0, the tests could not detect a fault."""
    vectors = {key: p.numpy() for key, p in family_model(name).named_parameters() if len(p.shape) == 1}
    assert vectors
    for key, values in vectors.items():
        assert np.ptp(values) > 0.1, key
