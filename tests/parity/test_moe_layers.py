"""Mixtures of experts beside transformers' layers: routers of every kind, outputs, gradients, the balancing loss."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from oarlock.decoder.moe import MixtureOfExperts
from oarlock.families.architecture import MLP, MoE
from oarlock.ops import patch

HIDDEN, EXPERT = 16, MLP(24)
SPECS = {
    "mixtral": MoE(8, 3, EXPERT),
    "qwen2_moe": MoE(
        8, 3, EXPERT, renormalize=False, shared=MLP(20), shared_gate=True, names=("gate", "shared_expert")
    ),
    "qwen3_moe": MoE(8, 3, EXPERT),
    "deepseek_v3": MoE(
        8, 3, EXPERT, router="sigmoid", weight_scale=2.5, groups=4, top_groups=2, group_score="top2_sum",
        bias_corrected=True, shared=MLP(48),
    ),
}  # fmt: skip
ALONE = SimpleNamespace(
    tensor_parallel_degree=1, tensor_parallel_rank=0, expert_parallel_degree=1, expert_parallel_rank=0,
    sequence_parallel=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, parity_python):
    out = tmp_path_factory.mktemp("moe") / "out.npz"
    command = [parity_python, str(Path(__file__).with_name("moe_peer.py")), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as arrays:
        return dict(arrays)


def own_layout(name: str, array: np.ndarray) -> np.ndarray:
    return array.T if name.endswith(".weight") else array


def make_layer(kind: str, theirs: dict[str, np.ndarray]) -> MixtureOfExperts:
    layer = MixtureOfExperts(SPECS[kind], HIDDEN, ALONE)
    for name, parameter in layer.named_parameters():
        parameter.set_value(np.ascontiguousarray(own_layout(name, theirs[f"{kind}/weight/{name}"])))
    return layer


@pytest.mark.parametrize("fused", [False, True], ids=["paddle", "fused"])
@pytest.mark.parametrize("kind", SPECS)
def test_outputs_and_gradients_are_those_of_transformers(theirs, kind, fused, monkeypatch):
    monkeypatch.setattr(patch, "_is_enabled", fused)
    layer = make_layer(kind, theirs)
    assert {name for name, _ in layer.named_parameters()} == {
        name.removeprefix(f"{kind}/weight/") for name in theirs if name.startswith(f"{kind}/weight/")
    }
    x = paddle.to_tensor(theirs[f"{kind}/x"], stop_gradient=False)
    y = layer(x)
    np.testing.assert_allclose(y.numpy(), theirs[f"{kind}/y"], atol=2e-5)
    y.backward(paddle.to_tensor(theirs[f"{kind}/upstream"]))
    np.testing.assert_allclose(x.grad.numpy(), theirs[f"{kind}/gradient/x"], atol=5e-5)
    for name, parameter in layer.named_parameters():
        if name != "gate.e_score_correction_bias":
            expected = own_layout(name, theirs[f"{kind}/gradient/{name}"])
            np.testing.assert_allclose(parameter.grad.numpy(), expected, atol=5e-5, err_msg=name)


@pytest.mark.parametrize("kind", [kind for kind, spec in SPECS.items() if spec.router == "softmax"])
def test_the_balancing_loss_is_that_of_transformers(theirs, kind):
    layer, factor = make_layer(kind, theirs), 0.25
    mask = paddle.to_tensor(theirs[f"{kind}/mask"]).astype("bool")
    tokens = float(mask.sum())
    layer.balance.begin_step(factor / tokens, [mask])
    x = paddle.to_tensor(theirs[f"{kind}/x"])
    layer(x, layer.next_mask()).backward(paddle.zeros_like(x))  # so that the loss alone has a gradient
    expected = factor * theirs[f"{kind}/loss_gradient"].T
    np.testing.assert_allclose(layer.gate.weight.grad.numpy(), expected, atol=1e-6)
    *chosen, loss, counted = layer.balance.pop()
    assert (sum(chosen), counted) == (3 * tokens, tokens)
    assert loss / tokens == pytest.approx(float(theirs[f"{kind}/loss"]), rel=1e-5)
