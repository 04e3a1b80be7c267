"""--use_fused_rms_norm: models train alike with and without the fused op; its absence is reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from helpers import LLM, TINY_LLAMA, make_flags, make_norms_and_biases_nontrivial, read_rows, run_program
from oarlock.environment.paddle_import import import_paddle
from oarlock.model_config.load import find_config_class, find_model_class
from op_checks import built

import_paddle()
import paddle  # noqa: E402


def loss_and_gradients(model, ids):
    logits = model(ids)
    loss = paddle.nn.functional.cross_entropy(logits[:, :-1], ids[:, 1:])
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    model.clear_gradients()
    return float(loss), gradients


@built
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_same_loss_and_gradients(family, recompute, paddles_own_ops):
    ids, found = paddle.randint(3, 512, [2, 33]), {}
    for fused in (False, True):
        config = find_config_class(family)(
            **(TINY_LLAMA | {"head_dim": 8}), use_fused_rms_norm=fused, recompute=recompute
        )
        paddle.seed(3)
        made = make_norms_and_biases_nontrivial(find_model_class(config)(config))
        made.train()
        if recompute:
            made.recompute_enable()
        found[fused] = loss_and_gradients(made, ids)
    assert abs(found[True][0] - found[False][0]) < 1e-5
    for name, gradient in found[False][1].items():
        largest = max(abs(gradient).max(), 1e-3)
        assert abs(found[True][1][name] - gradient).max() < 1e-5 * max(1, largest), name


@built
def test_paddlenlp_imports_the_fused_module():
    import fused_ln

    x, scale = paddle.randn([3, 8]), paddle.ones([8])
    y, invvar = fused_ln.fused_rms_norm(x, scale, 1e-6)
    z, mean, _ = fused_ln.fused_ln(x, scale, paddle.zeros([8]), 1e-6)
    assert list(y.shape) == list(z.shape) == [3, 8] and list(invvar.shape) == list(mean.shape) == [3]


@built
def test_the_published_command_with_and_without_the_op(tmp_path, corpus, tiny_config):
    """The losses are equal; a checkout in which the op is not built reports it once."""
    bare = tmp_path / "llm"
    shutil.copytree(LLM, bare, ignore=shutil.ignore_patterns("*.so", "*.stamp", "__pycache__", "*.egg-info"))
    losses, outputs = [], []
    for tree in (LLM, bare):
        words = make_flags(
            model_name_or_path=tiny_config, input_dir=corpus, output_dir=tmp_path / f"out{len(losses)}", max_steps=4,
            max_seq_length=32, use_fused_rms_norm=1, logging_steps=1, do_train=True, device="cpu",
        )  # fmt: skip
        result = run_program(tree / "run_pretrain.py", *words, env={"PYTHONPATH": str(tree)})
        assert result.returncode == 0, result.stderr[-2000:]
        outputs.append(result.stdout)
        lines = read_rows(tmp_path / f"out{len(losses)}" / "metrics.jsonl")
        losses.append([row["loss"] for row in lines if "loss" in row])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert "RMSNorm" not in outputs[0]
    assert outputs[1].count("the fused ops are not built") == 1 and "Paddle's own ops are used" in outputs[1]
    result = subprocess.run(
        [sys.executable, "-c", "import fused_ln"], cwd=bare, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(bare)},
    )  # fmt: skip
    assert result.returncode == 1 and "ImportError: the fused ops are not built (" in result.stderr
