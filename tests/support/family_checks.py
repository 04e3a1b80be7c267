"""Tiny models of every family, and checks of them."""

from __future__ import annotations

from types import SimpleNamespace

import paddle
from paddle import nn

from families import FAMILIES as TINY
from families import family_model
from oarlock.families.registry import FAMILIES
from oarlock.models.generate import generate_ids

# PaddleNLP's configurations, and of our own decoder's the ones that differ most from each other.
NAMES = [*TINY, "gemma2", "phi3", "smollm3", "qwen3_moe", "deepseek_v3"]
WITH_PREFIX = [name for name in NAMES if FAMILIES[name].kv_axes]
TOKENIZER = SimpleNamespace(eos_token_id=511, pad_token_id=0, bos_token_id=0)
TEXT = [[9, 30, 41, 100, 7, 88, 33, 12], [400, 5, 17, 23, 310, 6, 44, 219]]
ROWS = [[5, 9, 30], [7], [40, 41, 42, 43, 44, 45, 46, 47], [3, 300, 12, 14]]


def with_method(name: str, method=None, **changes):
    return family_model(name, 3, method, use_cache=False, **changes)


def compute_logits(model, ids, **kwargs) -> paddle.Tensor:
    """Logits [batch, tokens, vocabulary], as the trainer computes them."""
    outputs = model(input_ids=paddle.to_tensor(ids), **kwargs)
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def decode_greedily(model, row: list[int], count: int) -> list[int]:
    """Greedy ids of one row, each from a full forward pass without a cache."""
    found: list[int] = []
    with paddle.no_grad():
        while len(found) < count:
            found.append(int(compute_logits(model, [row + found])[0, -1].argmax()))
    return found[: found.index(TOKENIZER.eos_token_id)] if TOKENIZER.eos_token_id in found else found


def check_generation(model, rows=ROWS) -> None:
    """A padded batch with a cache gives each row the ids of a single row without one."""
    model.eval()
    expected = [decode_greedily(model, row, 6) for row in rows]
    assert generate_ids(model, TOKENIZER, rows, 6) == expected
    assert len({tuple(row) for row in expected}) > 1


def randomize_trained(model, keep: str = "") -> None:
    """Set trained parameters to random values: a fresh adapter may have no effect."""
    paddle.seed(5)
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient and keep not in name.split("."):
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)


def all_have_gradients(model, ids=TEXT) -> None:
    """Every trained parameter; of the experts, those that tokens go to."""
    model.train()
    nn.functional.cross_entropy(compute_logits(model, ids).astype("float32"), paddle.to_tensor(ids)).backward()
    unused, experts = set(), set()
    for name, parameter in model.named_parameters():
        if parameter.stop_gradient:
            assert parameter.grad is None, name
            continue
        if ".experts." in name:
            experts.add(name)
        if parameter.grad is None or float(parameter.grad.abs().sum()) == 0:
            unused.add(name)
    assert not unused - experts
    assert not experts or unused < experts
