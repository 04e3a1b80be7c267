"""The load of experts in the log, and the balancing loss of a step of several micro-batches."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import paddle
import pytest

from oarlock.decoder.classes import make_model_class
from oarlock.model_config.load import make_config
from oarlock.parallel.plan import ParallelPlan
from oarlock.train.reporters.console import _format_training_row
from oarlock.train.step.expert_balance import ExpertBalance

CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_only_layers": [1], "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}  # fmt: skip


@pytest.fixture
def model():
    paddle.seed(0)
    found = make_model_class("qwen3_moe")(make_config(dict(CONFIG), "config.json"))
    found.train()
    return found


def test_the_load_is_that_of_the_tokens_that_are_no_padding(model):
    mixtures = [model.decoder.layers[i].mlp for i in (0, 2)]
    for mixture in mixtures:
        mixture.gate.weight.set_value(paddle.zeros([32, 4]))  # all go to the same two experts
    balance = ExpertBalance(model, ParallelPlan())
    ids = paddle.ones([2, 6], "int64")
    balance.begin_step([{"input_ids": ids}], [paddle.to_tensor([6, 3])], 9.0, None, False)
    model(ids).sum().backward()
    chosen = [mixture.balance._totals.numpy() for mixture in mixtures]
    assert all(totals[:4].tolist() in ([9, 9, 0, 0], [0, 0, 9, 9]) for totals in chosen) and chosen[0][-1] == 9
    row = balance.read()
    assert row == pytest.approx(
        {"aux_loss": 2.0, "expert_load_max": 2.0, "expert_load_entropy": math.log(2) / math.log(4)}
    )
    others = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 10.0}
    assert "busiest expert 2.0x" in _format_training_row(others | row)


def keep_logits(seen, layer, inputs, logits):
    seen.append(logits)


def test_micro_batches_weigh_as_their_tokens(model):
    """The gradient for the routers is that of factor / layers x the mean of the micro-batches' losses over tokens."""
    balance, random = ExpertBalance(model, ParallelPlan()), np.random.default_rng(1)
    ids = [paddle.to_tensor(random.integers(0, 64, shape)) for shape in ((2, 6), (1, 4))]
    lengths = [paddle.to_tensor([6, 2]), paddle.to_tensor([4])]
    balance.begin_step([{"input_ids": each} for each in ids], lengths, 12.0, None, False)
    for each in ids:
        (model(each) * 0.0).sum().backward()
    router = model.decoder.layers[2].mlp.gate  # no other loss comes after it
    found = router.weight.grad.numpy()
    balance.read()
    model.clear_gradients()
    for each, tokens, keep in zip(ids, (8, 4), ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3]), strict=True):
        seen: list[paddle.Tensor] = []
        hook = router.register_forward_post_hook(partial(keep_logits, seen))
        model(each)
        hook.remove()
        logits = paddle.gather(seen[0], paddle.to_tensor(keep))
        probabilities = paddle.nn.functional.softmax(logits, axis=-1)
        share = paddle.nn.functional.one_hot(paddle.topk(probabilities, 2)[1], 4).sum(1).mean(0)
        loss = 4 * (share * probabilities.mean(0)).sum()
        (0.5 / 2 * tokens / 12 * loss).backward()
    np.testing.assert_allclose(found, router.weight.grad.numpy(), rtol=1e-4, atol=1e-7)
    assert np.abs(found).max() > 1e-5


def test_a_dense_model_logs_nothing(model):
    dense = make_config(CONFIG | {"mlp_only_layers": [0, 1, 2]}, "config.json")
    assert ExpertBalance(make_model_class("qwen3_moe")(dense), ParallelPlan()).read() == {}
