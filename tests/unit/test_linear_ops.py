"""Linear layers that are made together, beside the same one by one."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddlenlp.transformers.llama import modeling as llama

from oarlock.ops import install, library, linears
from op_checks import normal, same

pytestmark = [
    pytest.mark.usefixtures("paddles_own_ops"),
    pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing()),
]


def check_linears(rows):
    x, out = normal(*rows, 33), (48, 16, 21)
    weights = [normal(33, size) for size in out]
    same(linears.fused_projections, lambda x, *weights: [x @ weight for weight in weights], [x, *weights])
    same(
        linears.fused_mlp,
        lambda x, gate, up, down: llama.swiglu(x @ gate, x @ up) @ down,
        [x, normal(33, 67), normal(33, 67, seed=1), normal(67, 21)],
    )


@pytest.mark.parametrize("rows", [(2, 9), (300,), (0, 4), (1, 1)])
def test_linears(rows):
    check_linears(rows)


def test_linears_of_turned_weights():
    x, weights = normal(2, 9, 33), [normal(16, 33) for _ in range(3)]
    same(
        lambda x, *turned: linears.fused_projections(x, *(weight.t() for weight in turned)),
        lambda x, *turned: [x @ weight.t() for weight in turned],
        [x, *weights],
    )


def test_a_projection_that_nobody_uses():
    x, weights = normal(2, 9, 33), [normal(33, 16, seed=seed) for seed in range(3)]
    made = linears.fused_projections(x, *weights)
    gradients = paddle.grad([made[0] + made[2]], [x, weights[1]], [normal(2, 9, 16)])
    wanted = paddle.grad([x @ weights[0] + x @ weights[2]], [x], [normal(2, 9, 16)])
    np.testing.assert_allclose(gradients[0].numpy(), wanted[0].numpy(), rtol=1e-5, atol=1e-5)
    assert not gradients[1].any()


@pytest.fixture
def operators(monkeypatch):
    """Every operator that is called, in order."""
    called, run = [], library.run
    monkeypatch.setattr(library, "run", lambda name, *arguments: called.append(name) or run(name, *arguments))
    return called


def test_layers_that_are_made_together(operators):
    """Plain trained ones, and only where nobody looks into one of them."""
    assert install.install()
    layer = llama.LlamaDecoderLayer(
        llama.LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, use_flash_attention=False)
    )
    x, ends = normal(2, 5, 32), paddle.full([2, 5], 5, "int32")

    def used():
        operators.clear()
        layer(x, attention_mask=ends)
        return [name for name in operators if name in ("fused_projections", "fused_mlp")]

    assert used() == ["fused_projections", "fused_mlp"]
    with paddle.no_grad():
        assert used() == []
    layer.mlp.up_proj.weight.stop_gradient = True
    assert used() == ["fused_projections"]
    seen = []
    hook = layer.self_attn.v_proj.register_forward_post_hook(lambda *call: seen.append(call))
    assert used() == [] and len(seen) == 1
    hook.remove()
    layer.self_attn.k_proj = paddle.nn.Sequential(layer.self_attn.k_proj)
    assert used() == []


@pytest.mark.parametrize("turned", [False, True])
def test_lora_linear(turned):
    weight = normal(21, 33).t() if turned else normal(33, 21)
    assert weight.is_contiguous() is not turned
    weight = weight.detach()
    same(
        lambda x, a, b: linears.fused_lora_linear(x, weight, a, b, 2.0),
        lambda x, a, b: x @ weight + (x @ a @ b) * 2.0,
        [normal(2, 9, 33), normal(33, 8), normal(8, 21)],
    )


def test_lora_linear_of_an_input_without_a_gradient(monkeypatch):
    """A first layer's: half of the backward is left out, the others' gradients are the same."""
    x, weight, asked = normal(2, 9, 33).detach(), normal(33, 21).detach(), []
    run = library.run
    monkeypatch.setattr(library, "run", lambda *arguments: asked.append(arguments[-1]) or run(*arguments))
    same(
        lambda a, b: linears.fused_lora_linear(x, weight, a, b, 2.0),
        lambda a, b: x @ weight + (x @ a @ b) * 2.0,
        [normal(33, 8), normal(8, 21)],
    )
    linears.fused_lora_linear(normal(2, 9, 33), weight, normal(33, 8), normal(8, 21), 2.0).sum().backward()
    assert x.grad is None and asked == [False, True]


def test_refusals():
    x, weight = normal(5, 4), normal(4, 6)
    for call, words in (
        (lambda: linears.fused_projections(x, weight, normal(5, 4), weight), r"\[4, out\]; got \[5, 4\]"),
        (lambda: linears.fused_mlp(x, weight, normal(4, 5), weight), r"of one shape; got \[4, 6\] and \[4, 5\]"),
        (lambda: linears.fused_mlp(x, weight, weight, weight), r"down has to be \[6, out\]; got \[4, 6\]"),
        (lambda: linears.fused_lora_linear(x, weight, normal(4, 2), normal(3, 6), 1.0), "do not fit together"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
