"""The fused parts of a training step compared with Paddle's and PaddleNLP's: values, gradients, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from helpers import LLM
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import EnvironmentProblem
from oarlock.ops import install, library, linear_cross_entropy, rotary, self_check, swiglu
from op_checks import check_same, draw_normal

import_paddle()
import paddle  # noqa: E402
from paddle.nn.functional import cross_entropy  # noqa: E402
from paddlenlp.transformers.llama import modeling as llama  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("paddles_own_ops"),
    pytest.mark.skipif(bool(library.why_missing()), reason=library.why_missing()),
]
IGNORED = -100


def check_rotary(dim, heads, kv_heads, packed):
    q, k = draw_normal(2, 37, heads, dim), draw_normal(2, 37, kv_heads, dim)
    cos, sin = llama.LlamaRotaryEmbedding(dim, 64)(q, seq_len=50)
    positions = paddle.to_tensor(np.random.default_rng(1).integers(0, 50, (2, 37))) if packed else None
    check_same(
        lambda q, k: rotary.fused_rotary(q, k, cos, sin, positions),
        lambda q, k: llama.apply_rotary_pos_emb(q, k, cos, sin, positions),
        [q, k],
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 4, 4), (128, 6, 2), (10, 3, 1), (2, 1, 1)])
def test_rotary(dim, heads, kv_heads, packed):
    check_rotary(dim, heads, kv_heads, packed)


def check_swiglu(shape):
    check_same(swiglu.fused_swiglu, llama.swiglu, [draw_normal(*shape) * 4, draw_normal(*shape, seed=1)])
    check_same(swiglu.fused_swiglu, llama.swiglu, [draw_normal(*shape[:-1], 2 * shape[-1]) * 4])


@pytest.mark.parametrize("shape", [(3, 5, 67), (2, 640), (1,), (300, 48), (0, 8)])
def test_swiglu(shape):
    check_swiglu(shape)


def test_swiglu_of_large_inputs():
    gate = paddle.to_tensor([-1e30, -200.0, -87.5, 0.0, 87.5, 88.5, 200.0, 1e30, float("nan")] * 4)
    y, wanted = swiglu.fused_swiglu(gate, paddle.ones_like(gate)), paddle.nn.functional.silu(gate)
    np.testing.assert_allclose(y.numpy(), wanted.numpy(), rtol=1e-6, atol=1e-36)


def check_cross_entropy(transposed, classes=77, rows=(4, 50)):
    hidden, weight = draw_normal(*rows, 32), draw_normal(*((classes, 32) if transposed else (32, classes)))
    labels = paddle.to_tensor(np.random.default_rng(2).integers(0, classes, rows))
    labels[1, 3:] = IGNORED
    check_same(
        lambda h, w: linear_cross_entropy.fused_linear_cross_entropy(h, w, labels, transposed, 1 / 13, IGNORED) * 3,
        lambda h, w: cross_entropy(
            paddle.matmul(h, w, transpose_y=transposed), labels, ignore_index=IGNORED, reduction="sum"
        ) * (3 / 13),
        [hidden, weight],
    )  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scores", [1, 77 * 7, 2**25])
def test_cross_entropy(monkeypatch, transposed, scores):
    """In chunks of one row, of seven (the last is shorter), and in one chunk."""
    monkeypatch.setattr(linear_cross_entropy, "MAX_LOGITS", scores)
    check_cross_entropy(transposed)


def test_cross_entropy_computes_only_requested_outputs():
    hidden, weight, labels = draw_normal(6, 8), draw_normal(8, 20), paddle.arange(6)

    def loss():
        return linear_cross_entropy.fused_linear_cross_entropy(hidden, weight, labels, False, 1.0, IGNORED)

    whole = loss()
    whole.backward()
    of_hidden = hidden.grad.numpy()
    weight.stop_gradient = True  # LoRA
    hidden.clear_gradient(False)
    loss().backward()
    np.testing.assert_array_equal(hidden.grad.numpy(), of_hidden)
    with paddle.no_grad():
        assert loss().stop_gradient and abs(float(loss()) - float(whole)) < 1e-5


def test_cross_entropy_of_large_logits():
    """The largest logit is subtracted before exp."""
    hidden, weight = paddle.to_tensor([[1e4, -1e4]]), paddle.eye(2)
    for label, wanted in ((0, 0.0), (1, 2e4)):
        loss = linear_cross_entropy.fused_linear_cross_entropy(
            hidden, weight, paddle.to_tensor([label]), False, 1.0, IGNORED
        )
        assert float(loss) == wanted


def optimizers(count=5):
    """Two AdamW over equal parameters."""
    made = []
    for _ in range(2):
        parameters = []
        for i, shape in enumerate([(7,), (33, 65), (3, 5, 2), (20000,), (1,)][:count]):
            attribute = paddle.ParamAttr(learning_rate=2.0 if i == 1 else 1.0)
            parameters.append(paddle.create_parameter(list(shape), "float32", attr=attribute))
            parameters[-1].set_value(draw_normal(*shape).detach())
        rate = paddle.optimizer.lr.NoamDecay(64, 3, learning_rate=0.1)
        undecayed = parameters[2].name
        made.append((parameters, rate, paddle.optimizer.AdamW(
            rate, 0.8, 0.95, 1e-6, parameters, weight_decay=0.1,
            apply_decay_param_fun=lambda name, undecayed=undecayed: name != undecayed,
        )))  # fmt: skip
    return made


def check_adamw():
    """Five steps of Paddle's and of our optimizer: parameters, and everything a checkpoint stores."""
    states = []
    for fused, (parameters, rate, optimizer) in zip((False, True), optimizers(), strict=True):
        install.use(fused)
        for number in range(5):
            for i, parameter in enumerate(parameters):
                if (i, number) != (4, 2):  # one without a gradient in one step
                    (parameter * draw_normal(*parameter.shape, seed=number)).sum().backward()
            optimizer.step()
            optimizer.clear_grad(set_to_zero=False)
            rate.step()
        kept = [optimizer._accumulators[name][p.name] for name in sorted(optimizer._accumulators) for p in parameters]
        states.append([*parameters, *kept])
    assert len(states[0]) == 5 * 5
    for found, wanted in zip(*states, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-6, atol=1e-7)


def test_adamw():
    check_adamw()


def test_adamw_leaves_other_optimizers_alone(monkeypatch):
    """A subclass, parameter groups, and gradients other than float32 use Paddle's code."""
    install.install()
    monkeypatch.setattr(install, "fused_adamw", lambda *_: pytest.fail("the fused step was taken"))
    parameter = paddle.create_parameter([4], "float32")

    class Other(paddle.optimizer.AdamW):
        pass

    for optimizer in (
        Other(0.1, parameters=[parameter]),
        paddle.optimizer.AdamW(0.1, parameters=[{"params": [parameter]}]),
        paddle.optimizer.AdamW(0.1, parameters=[parameter], amsgrad=True),
    ):
        before = parameter.numpy()
        parameter.sum().backward()
        optimizer.step()
        assert (parameter.numpy() != before).all()


def test_refusals():
    q, cos = draw_normal(1, 4, 2, 8), draw_normal(3, 8)
    x, weight, labels = draw_normal(5, 4), draw_normal(4, 6), paddle.arange(5)
    for call, words in (
        (lambda: rotary.fused_rotary(q, q, cos, cos, None), "have 3 positions, x has 4"),
        (
            lambda: rotary.fused_rotary(q, q, cos, cos, paddle.to_tensor([[0, 1, 2, 3]])),
            "position 3 is not among the 3",
        ),
        (lambda: rotary.fused_rotary(q, q, cos, cos, paddle.to_tensor([0, 1, 2])), r"int64 \[batch, length\]"),
        (lambda: rotary.fused_rotary(q[0], q, cos, cos, None), r"\[batch, length, heads, even dim\]; got \[4, 2, 8\]"),
        (lambda: swiglu.fused_swiglu(x, weight), r"of one shape; got \[5, 4\] and \[4, 6\]"),
        (lambda: swiglu.fused_swiglu(x.astype("float64"), x), "gate has to be float32; got float64"),
        (lambda: swiglu.fused_swiglu(draw_normal(2, 3)), r"beside each other; got \[2, 3\]"),
        (
            lambda: linear_cross_entropy.fused_linear_cross_entropy(x, weight, labels + 2, False, 1.0, IGNORED),
            "label 6 is not among",
        ),
        (
            lambda: linear_cross_entropy.fused_linear_cross_entropy(x, weight, labels[:4], False, 1.0, IGNORED),
            "each of the 5 rows",
        ),
        (
            lambda: linear_cross_entropy.fused_linear_cross_entropy(x, weight, labels, True, 1.0, IGNORED),
            r"\[classes, 4\]; got",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_training_with_a_wrong_library_is_refused(monkeypatch):
    self_check.check_training_ops.__wrapped__()
    right = swiglu.fused_swiglu
    monkeypatch.setattr(self_check, "fused_swiglu", lambda gate, up: right(gate, up) * 1.01)
    with pytest.raises(EnvironmentProblem, match="fused SwiGLU gives wrong results"):
        self_check.check_training_ops.__wrapped__()


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_lower_instruction_sets(isa):
    """The code for CPUs without AVX-512; it is chosen once per process."""
    code = """
import test_step_ops as ops
import test_linear_ops
ops.check_rotary(10, 3, 1, True)
ops.check_swiglu((3, 5, 67))
test_linear_ops.check_lora((2, 9))
test_linear_ops.check_layer((2, 9))
ops.check_cross_entropy(False)
ops.check_adamw()
"""
    paths = f"{LLM}:{os.path.dirname(__file__)}:{LLM.parent}/tests"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OARLOCK_ISA": isa, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


def test_patched_names_are_restored():
    before = [getattr(patch.owners()[0], patch.name) for patch in install.PATCHES]
    assert install.install() and install.install()
    assert all(
        getattr(p.owners()[0], p.name) is not original for p, original in zip(install.PATCHES, before, strict=True)
    )
    install.use(False)
    assert [getattr(patch.owners()[0], patch.name) for patch in install.PATCHES] == before


def test_a_paddle_without_mkl_keeps_its_own_operators(monkeypatch, capsys):
    install.uninstall()
    monkeypatch.setattr(library, "has_products", lambda: False)
    own = paddle.optimizer.AdamW._create_optimization_pass
    assert not install.install() and paddle.optimizer.AdamW._create_optimization_pass is own
    assert "without MKL" in capsys.readouterr().out
