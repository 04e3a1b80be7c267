"""Fused linear layers compared with separate ones."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle.nn.functional import silu
from paddlenlp.peft.lora.lora_layers import LoRALinear
from paddlenlp.transformers import LlamaConfig

from oarlock.decoder.attention import LayerContext
from oarlock.decoder.block import DecoderLayer
from oarlock.families.registry import FAMILIES
from oarlock.ops import decoder_layer, install, library, lora_linear, rms_norm
from oarlock.ops.attention import make_mask
from op_checks import check_same, draw_normal

pytestmark = [
    pytest.mark.usefixtures("paddles_own_ops"),
    pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing()),
]


def check_layer(rows):
    x, scale, weights = draw_normal(*rows, 33), draw_normal(33), [draw_normal(33, size) for size in (48, 16, 21)]
    check_same(
        lambda *given: decoder_layer.fused_layer_start(*given, 1e-6)[:4],
        lambda x, scale, *weights: [
            *(rms_norm.reference_rms_norm(x, scale, 1e-6) @ weight for weight in weights),
            x * 1,
        ],
        [x, scale, *weights],
    )

    check_same(
        lambda x, *turned: decoder_layer.fused_layer_start(x, scale, *(weight.t() for weight in turned), 1e-6)[:3],
        lambda x, *turned: [rms_norm.reference_rms_norm(x, scale, 1e-6) @ weight.t() for weight in turned],
        [x, *(draw_normal(size, 33) for size in (48, 16, 21))],
    )

    def end(attended, kept, output, scale, gate, up, down):
        total = kept + attended @ output
        normed = rms_norm.reference_rms_norm(total, scale, 1e-6)
        return total + (silu(normed @ gate) * (normed @ up)) @ down

    attended, kept = draw_normal(*rows, 24), draw_normal(*rows, 33, seed=1)
    weights = [draw_normal(24, 33), scale, draw_normal(33, 67), draw_normal(33, 67, seed=1), draw_normal(67, 33)]
    check_same(lambda *given: decoder_layer.fused_layer_end(*given, 1e-6), end, [attended, kept, *weights])


def test_a_partly_used_fused_projection():
    x, scale, weights = draw_normal(2, 9, 33), draw_normal(33), [draw_normal(33, 16, seed=seed) for seed in range(3)]
    query, _, value, kept, _ = decoder_layer.fused_layer_start(x, scale, *weights, 1e-6)
    gradients = paddle.grad([query + value], [x, *weights], [draw_normal(2, 9, 16)], retain_graph=True)
    normed = rms_norm.reference_rms_norm(x, scale, 1e-6)
    wanted = paddle.grad([normed @ weights[0] + normed @ weights[2]], [x, *weights[::2]], [draw_normal(2, 9, 16)])
    for found, expected in zip([*gradients[:2], gradients[3]], wanted, strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-4)
    assert not gradients[2].any()
    gradients = paddle.grad([kept], [x, scale, *weights], [draw_normal(2, 9, 33, seed=1)])
    np.testing.assert_array_equal(gradients[0].numpy(), draw_normal(2, 9, 33, seed=1).numpy())
    assert not any(gradient.any() for gradient in gradients[1:])


def lora_of(*shapes):
    """Weights of these shapes, their LoRA matrices of rank 8, and the scaling."""
    weights = [draw_normal(*shape).detach() for shape in shapes]
    a = [draw_normal(shape[0], 8, seed=seed) for seed, shape in enumerate(shapes)]
    b = [draw_normal(8, shape[1], seed=seed) for seed, shape in enumerate(shapes)]
    return weights, a, b, [0.5, 1.0, 2.0]


def check_lora(rows):
    x, out = draw_normal(*rows, 33), (48, 16, 21)
    weights, a, b, scalings = lora_of(*((33, size) for size in out))
    check_same(
        lambda x, *ab: lora_linear.fused_lora_projections(x, lora_linear.LoraTriple(weights, ab[:3], ab[3:], scalings)),
        lambda x, *ab: [x @ weights[i] + (x @ ab[i] @ ab[3 + i]) * scalings[i] for i in range(3)],
        [x, *a, *b],
    )
    weights, a, b, scalings = lora_of((33, 67), (33, 67), (67, 21))

    def mlp(x, *ab):
        gate, up = ((x @ weights[i] + (x @ ab[i] @ ab[3 + i]) * scalings[i]) for i in (0, 1))
        inner = silu(gate) * up
        return inner @ weights[2] + (inner @ ab[2] @ ab[5]) * scalings[2]

    check_same(
        lambda x, *ab: lora_linear.fused_lora_mlp(x, lora_linear.LoraTriple(weights, ab[:3], ab[3:], scalings)),
        mlp,
        [x / 8, *a, *b],
    )


@pytest.mark.parametrize("rows", [(2, 9), (300,), (0, 4), (1, 1)])
def test_fused_linears(rows):
    check_lora(rows)
    check_layer(rows)


def test_an_unused_lora_projection():
    x, (weights, a, b, scalings) = draw_normal(2, 9, 33), lora_of(*[(33, 16)] * 3)
    made = lora_linear.fused_lora_projections(x, lora_linear.LoraTriple(weights, a, b, scalings))
    gradients = paddle.grad([made[1]], [x, a[0], b[0], b[1]], [draw_normal(2, 9, 16)])
    plain = x @ weights[1] + x @ a[1] @ b[1]
    for found, wanted in zip(gradients[::3], paddle.grad([plain], [x, b[1]], [draw_normal(2, 9, 16)]), strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-4)
    assert not gradients[1].any() and not gradients[2].any()


@pytest.fixture
def operators(monkeypatch):
    """Every operator that is called, in order."""
    called, run = [], library.run
    monkeypatch.setattr(library, "run", lambda name, *arguments: called.append(name) or run(name, *arguments))
    return called


def layer_and_its_use(operators):
    """A layer of a small Llama, and a function that runs it and returns the operators it called."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48)
    model = FAMILIES["llama"].decoder(config)
    layer = DecoderLayer(model.blocks[0], model, config)
    x, given = draw_normal(2, 5, 32), LayerContext(None, make_mask(), 5, 5)

    def used():
        operators.clear()
        layer(x, given)
        return [name for name in operators if name not in ("fused_rotary", "oarlock_attention", "fused_swiglu")]

    return layer, used


def test_projections_are_fused(operators):
    """Only plain trained layers without hooks."""
    assert install.install()
    layer, used = layer_and_its_use(operators)
    assert used() == ["fused_layer_start", "fused_layer_end"]
    with paddle.no_grad():
        assert used() == ["fused_rms_norm"] * 2
    apart, seen = ["fused_rms_norm_kept", "fused_add_rms_norm"], []
    for hooked, wanted in (
        (layer.mlp, apart),
        (layer.self_attn.o_proj, apart),
        (layer.self_attn.v_proj, apart),
        (layer.input_layernorm, ["fused_rms_norm"] * 2),
    ):
        hook = hooked.register_forward_post_hook(lambda *call: seen.append(call))
        assert used() == wanted and seen
        hook.remove()
        seen.clear()
    layer.mlp.up_proj.weight.stop_gradient = True
    assert used() == apart
    layer.mlp.up_proj.weight.stop_gradient = False
    assert used() == ["fused_layer_start", "fused_layer_end"]
    layer.self_attn.k_proj = paddle.nn.Sequential(layer.self_attn.k_proj)
    assert used() == apart


def test_lora_projections_are_fused(operators):
    assert install.install()
    layer, used = layer_and_its_use(operators)
    names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    for owner, name in [(layer.self_attn, name) for name in names[0]] + [(layer.mlp, name) for name in names[1]]:
        before = getattr(owner, name)
        with_lora = LoRALinear(*before.weight.shape, r=8, lora_alpha=16, bias_attr=False)
        with_lora.weight.stop_gradient = True
        setattr(owner, name, with_lora)
    norms = "fused_rms_norm_kept", "fused_add_rms_norm"
    assert used() == [norms[0], "fused_lora_projections", "fused_lora_linear", norms[1], "fused_lora_mlp"]
    up = layer.mlp.up_proj
    up.forward = lambda x: x @ draw_normal(32, 48).detach()  # as in QLoRA, which no longer has a weight
    weight = up._parameters.pop("weight")
    assert used() == [norms[0], "fused_lora_projections", "fused_lora_linear", norms[1], *["fused_lora_linear"] * 2]
    del up.forward
    up.weight = weight
    layer.mlp.up_proj.disable_lora = True
    assert used() == [norms[0], "fused_lora_projections", "fused_lora_linear", norms[1], *["fused_lora_linear"] * 2]
    layer.self_attn.k_proj = paddle.nn.Linear(32, 32, bias_attr=False)
    assert used() == [norms[0], *["fused_lora_linear"] * 3, norms[1], *["fused_lora_linear"] * 2]


@pytest.mark.parametrize("turned", [False, True])
def test_lora_linear(turned):
    weight = draw_normal(21, 33).t() if turned else draw_normal(33, 21)
    assert weight.is_contiguous() is not turned
    weight = weight.detach()
    check_same(
        lambda x, a, b: lora_linear.fused_lora_linear(x, weight, a, b, 2.0),
        lambda x, a, b: x @ weight + (x @ a @ b) * 2.0,
        [draw_normal(2, 9, 33), draw_normal(33, 8), draw_normal(8, 21)],
    )


def test_lora_of_an_input_without_a_gradient(monkeypatch):
    """As in a first layer: half of the backward pass is skipped, and the other gradients are unchanged."""
    x, weight, asked = draw_normal(2, 9, 33).detach(), draw_normal(33, 21).detach(), []
    run = library.run
    monkeypatch.setattr(library, "run", lambda *arguments: asked.append(arguments[-1]) or run(*arguments))
    check_same(
        lambda a, b: lora_linear.fused_lora_linear(x, weight, a, b, 2.0),
        lambda a, b: x @ weight + (x @ a @ b) * 2.0,
        [draw_normal(33, 8), draw_normal(8, 21)],
    )
    lora_linear.fused_lora_linear(
        draw_normal(2, 9, 33), weight, draw_normal(33, 8), draw_normal(8, 21), 2.0
    ).sum().backward()
    weights, a, b, scalings = lora_of((33, 67), (33, 67), (67, 33))
    check_same(
        lambda *ab: sum(
            lora_linear.fused_lora_projections(x, lora_linear.LoraTriple([weight] * 3, ab[:3], ab[3:], scalings))
        ),
        lambda *ab: sum(x @ weight + (x @ ab[i] @ ab[3 + i]) * scalings[i] for i in range(3)),
        [draw_normal(33, 8, seed=seed) for seed in range(3)] + [draw_normal(8, 21, seed=seed) for seed in range(3)],
    )
    lora_linear.fused_lora_mlp(x, lora_linear.LoraTriple(weights, a, b, scalings)).sum().backward()
    assert x.grad is None and asked == [False, True, False, False] and a[0].grad.any()


def test_refusals():
    x, wide, weight = draw_normal(5, 4), draw_normal(5, 6), draw_normal(4, 6)

    def start(scale, *weights):
        return decoder_layer.fused_layer_start(x, scale, *weights, 1e-6)

    def end(kept, *mlp):
        return decoder_layer.fused_layer_end(x, kept, weight, draw_normal(6), *mlp, 1e-6)

    for call, words in (
        (lambda: start(draw_normal(4), weight, draw_normal(5, 4), weight), r"\[4, out\]; got \[5, 4\]"),
        (lambda: start(draw_normal(5), weight, weight, weight), r"scale has to be of x's last axis, \[4\]; got \[5\]"),
        (
            lambda: end(x, draw_normal(6, 6), draw_normal(6, 6), draw_normal(6, 6)),
            r"kept has to be \[5, 6\], as the layer's output; got \[5, 4\]",
        ),
        (
            lambda: end(wide, draw_normal(6, 6), draw_normal(6, 5), draw_normal(6, 6)),
            r"of one shape; got \[6, 6\] and \[6, 5\]",
        ),
        (
            lambda: end(wide, draw_normal(6, 7), draw_normal(6, 7), draw_normal(6, 6)),
            r"down has to be \[7, out\]; got \[6, 6\]",
        ),
        (
            lambda: lora_linear.fused_lora_projections(
                x,
                lora_linear.LoraTriple(
                    [weight] * 3,
                    [draw_normal(4, 2)] * 3,
                    [draw_normal(2, 6), draw_normal(2, 6), draw_normal(3, 6)],
                    [1.0] * 3,
                ),
            ),
            "do not fit together",
        ),
        (
            lambda: lora_linear.fused_lora_linear(x, weight, draw_normal(4, 2), draw_normal(3, 6), 1.0),
            "do not fit together",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
