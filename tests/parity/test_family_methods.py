"""LoRA, prefix tuning and p-tuning of every family."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from families import family_model
from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.peft.lora import LoRA
from oarlock.peft.p_tuning import PTuning
from oarlock.peft.prefix_tuning import Prefix
from support.family_checks import (
    NAMES,
    TEXT,
    WITH_PREFIX,
    all_have_gradients,
    check_generation,
    compute_logits,
    randomize_trained,
    with_method,
)

# LoRA


@pytest.mark.parametrize("name", NAMES)
def test_lora_covers_every_linear_layer_and_equals_its_sum(name):
    method = LoRA(2, 4)
    model = with_method(name, method)
    linear = {path for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    lora = {path for path, layer in model.named_sublayers() if hasattr(layer, "lora_A")}
    assert lora and {path for path in linear | lora if "lm_head" not in path and path[-4:] != "gate"} == lora
    randomize_trained(model)
    all_have_gradients(model)
    model.eval()
    tuned = compute_logits(model, TEXT).numpy()
    plain = with_method(name)
    plain.eval()
    layers = dict(plain.named_sublayers())
    for path in lora:
        layer = dict(model.named_sublayers())[path]
        layers[path].weight.set_value(layers[path].weight + method.scaling * (layer.lora_A @ layer.lora_B))
    assert np.allclose(compute_logits(plain, TEXT).numpy(), tuned, atol=2e-4, rtol=1e-4)
    assert np.abs(compute_logits(with_method(name), TEXT).numpy() - tuned).max() > 1e-3


# prefix tuning


def compute_prefix(model, name: str, ids: list[list[int]]) -> np.ndarray:
    """Keys and values of a text as a prefix: [tokens, 2 x layers, heads, size]."""
    outputs = model(input_ids=paddle.to_tensor(ids), use_cache=True)
    past = outputs[1]
    if isinstance(past, tuple) and len(past) == 1:
        past = past[0]
    axes = FAMILIES[name].kv_axes
    order = [axes.index(axis) for axis in ("batch", "token", "head")] + [3]
    keys, values = ([pair[i].transpose(order)[0].numpy() for pair in past] for i in (0, 1))
    return np.stack([*keys, *values], axis=1)


@pytest.mark.parametrize("name", WITH_PREFIX)
def test_a_prefix_with_the_keys_and_values_of_a_text_acts_as_that_text(name):
    first, plain = [50, 60, 70], with_method(name)
    plain.eval()
    model = with_method(name, Prefix(3))
    model.eval()
    model.prefix_encoder.weight.set_value(compute_prefix(plain, name, [first]))
    # Positions restart after a prefix unless the model counts them itself.
    places = paddle.to_tensor([[*range(3), *range(len(TEXT[0]))]] * 2)
    if name == "chatglm":
        places = paddle.stack([places, paddle.zeros_like(places)], axis=1)
    given = {} if name in ("opt", "bloom") else {"position_ids": places}
    whole = compute_logits(plain, [first + row for row in TEXT], **given).numpy()
    assert np.allclose(compute_logits(model, TEXT).numpy(), whole[:, 3:], atol=1e-5)
    assert np.abs(compute_logits(plain, TEXT).numpy() - whole[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("name", WITH_PREFIX)
def test_prefix_tuning(name):
    model = with_method(name, Prefix(3))
    randomize_trained(model)
    all_have_gradients(model)
    layers = model.prefix_encoder.weight.grad.abs().sum(axis=[0, 2, 3]).numpy()
    assert (layers > 0).all(), "keys or values of a layer are not trained"
    check_generation(model)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_PREFIX])
def test_families_without_prefix_tuning_give_the_reason(name):
    with pytest.raises(ModelError, match=rf"--prefix_tuning: {name} has none: .*; use --lora or --p_tuning$"):
        with_method(name, Prefix(3))


# p-tuning


@pytest.mark.parametrize("name", NAMES)
def test_virtual_tokens_with_word_embeddings_act_as_those_words(name):
    first, plain = [50, 60, 70], with_method(name)
    plain.eval()
    model = with_method(name, PTuning(3, "mlp"))
    model.eval()
    words = plain.get_input_embeddings().weight[paddle.to_tensor(first)].detach()
    model.prompt_encoder.forward = lambda: words
    whole = compute_logits(plain, [first + row for row in TEXT]).numpy()
    assert np.allclose(compute_logits(model, TEXT).numpy(), whole[:, 3:], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_p_tuning(name):
    model = with_method(name, PTuning(3, "lstm" if name == "llama" else "mlp"))
    randomize_trained(model)
    all_have_gradients(model)
    check_generation(model)


def test_tied_embeddings_keep_their_output_layer():
    model = with_method("llama", LoRA(2, 4), tie_word_embeddings=True)
    randomize_trained(model)
    all_have_gradients(model)
    check_generation(with_method("llama", None, tie_word_embeddings=True))
    assert family_model("llama").config.model_type == "llama"
