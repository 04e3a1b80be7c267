"""Mixtures of experts: uneven loads, padding, recomputation, static graphs. tests/parity/test_moe_layers.py has the values."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from oarlock.decoder.attention import LayerContext
from oarlock.decoder.block import DecoderLayer
from oarlock.decoder.moe import MixtureOfExperts
from oarlock.families.architecture import MLP, Architecture, Attention, DecoderBlock, MoE
from oarlock.ops.attention import make_mask

HIDDEN, EXPERTS = 16, 8
SPEC = MoE(EXPERTS, 2, MLP(24), aux_loss=0.1)
CONFIG = SimpleNamespace(
    tensor_parallel_degree=1, tensor_parallel_rank=0, expert_parallel_degree=1, expert_parallel_rank=0,
    sequence_parallel=False, use_fused_rms_norm=False,
    use_flash_attention=False, recompute_granularity="full", recompute_use_reentrant=False,
)  # fmt: skip


@pytest.fixture
def layer():
    paddle.seed(1)
    return MixtureOfExperts(SPEC, HIDDEN, CONFIG)


def test_no_token_is_dropped_when_all_go_to_the_same_experts(layer):
    weight = np.zeros([HIDDEN, EXPERTS], np.float32)
    weight[:, 2], weight[:, 5] = 1.0, 0.5
    layer.gate.weight.set_value(weight)
    x = paddle.rand([4, 32, HIDDEN])
    first = paddle.nn.functional.sigmoid(0.5 * x.sum(-1, keepdim=True))  # softmax of two logits
    expected = first * layer.experts["2"](x) + (1 - first) * layer.experts["5"](x)
    np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), atol=1e-5)
    assert layer.balance.pop()[:EXPERTS] == [0, 0, 128, 0, 0, 128, 0, 0]


def test_experts_without_tokens_get_gradients_of_zero(layer):
    layer(paddle.randn([1, 1, HIDDEN])).sum().backward()
    idle = [expert for expert in layer.experts.values() if not float(expert.down_proj.weight.grad.abs().sum())]
    assert len(idle) == EXPERTS - SPEC.top_k
    assert all(float(weight.grad.abs().sum()) == 0 for expert in idle for weight in expert.parameters())


def test_the_correction_changes_the_choice_but_not_the_weights():
    layer = MixtureOfExperts(dataclasses.replace(SPEC, bias_corrected=True, renormalize=False), HIDDEN, CONFIG)
    layer.gate.weight.set_value(paddle.zeros([HIDDEN, EXPERTS]))
    layer.gate.e_score_correction_bias.set_value(paddle.to_tensor([0.0, 0, 0, 9, 0, 0, 9, 0]))
    x = paddle.randn([1, 5, HIDDEN])
    expected = (layer.experts["3"](x) + layer.experts["6"](x)) / EXPERTS
    np.testing.assert_allclose(layer(x).numpy(), expected.numpy(), atol=1e-6)
    assert layer.gate.e_score_correction_bias.stop_gradient


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_static_graph_computes_the_same(layer, tokens, tmp_path):
    layer.eval()
    spec = [paddle.static.InputSpec([None, None, HIDDEN], "float32")]
    x = paddle.randn([1, tokens, HIDDEN])
    with paddle.no_grad():
        expected = layer(x).numpy()
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=spec, full_graph=True), str(tmp_path / "layer"))
    np.testing.assert_allclose(paddle.jit.load(str(tmp_path / "layer"))(x).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_micro_batches_keep_their_masks(recompute):
    """Under a pipeline, backward passes come after the forward passes of later micro-batches."""
    paddle.seed(2)
    block = DecoderBlock(Attention(2, 2, 8, 1.0), SPEC)
    model = Architecture("model", 32, HIDDEN, (block,), 1e-6, 64)
    layer = DecoderLayer(block, model, CONFIG)
    layer.enable_recompute = recompute
    inputs = [paddle.randn([2, 6, HIDDEN]) for _ in range(2)]
    masks = [paddle.arange(6) < paddle.to_tensor([[3], [6]]), paddle.arange(6) < paddle.to_tensor([[6], [1]])]
    given = LayerContext(None, make_mask(None, None, flash=False), 6, 6)

    def gradient(order):
        layer.clear_gradients()
        layer.mlp.balance.begin_step(1.0, [masks[i] for i in order])
        outputs = []
        for i in order:
            x = inputs[i].clone()
            x.stop_gradient = False
            outputs.append(layer(x, given)[0])
        for output in outputs:
            output.backward(paddle.zeros_like(output))
        return layer.mlp.gate.weight.grad.numpy()

    both, other_way = gradient([0, 1]), gradient([1, 0])
    np.testing.assert_allclose(both, other_way, rtol=1e-4, atol=1e-6)
    masks.reverse()
    assert np.abs(both - gradient([0, 1])).max() > 1e-3  # the masks matter
