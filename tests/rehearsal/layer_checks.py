"""Fleet's operators and layers on two tensor-parallel ranks must give the results of one process or of NumPy."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import paddle
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import (
    ColumnParallelLinear,
    ParallelCrossEntropy,
    PipelineLayer,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_optimizer_stage2 import GroupShardedOptimizerStage2
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage2 import GroupShardedStage2
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage3 import GroupShardedStage3
from paddle.distributed.fleet.utils import hybrid_parallel_util, timer_helper
from paddle.distributed.fleet.utils import sequence_parallel_utils as sequence
from paddle.nn import functional as F

from oarlock.cpu_ranks.fleet_patches import building_group_sharded
from oarlock.environment.ranks import rank
from oarlock.ops import library
from oarlock.ops import linear_cross_entropy as fused


def array(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def variable(values: np.ndarray):
    return paddle.to_tensor(np.ascontiguousarray(values), stop_gradient=False)


def mine(whole: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.split(whole, 2, axis)[rank()]


def same(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-6)


def backward(result, upstream: np.ndarray) -> None:
    (result * paddle.to_tensor(upstream)).sum().backward()


def hcg():
    return fleet.get_hybrid_communicate_group()


def group():
    return hcg().get_model_parallel_group()


# Operators.


def identity() -> None:
    x = variable(array(0, 3, 4))
    y = mp_ops._c_identity(x, group=group())
    same(y, x)
    backward(y, array(1 + rank(), 3, 4))
    same(x.grad, array(1, 3, 4) + array(2, 3, 4))


def all_reduce() -> None:
    x = variable(array(rank(), 3, 4))
    y = mp_ops._mp_allreduce(x * 2, group=group())
    same(y, 2 * (array(0, 3, 4) + array(1, 3, 4)))
    backward(y, array(5, 3, 4))
    same(x.grad, 2 * array(5, 3, 4))


def concat(module=mp_ops) -> None:
    for shape in ((3, 8), (2, 3, 8)):
        x = variable(mine(array(0, *shape)))
        y = module._c_concat(x, group=group())
        same(y, array(0, *shape))
        backward(y, array(1, *shape))
        same(x.grad, mine(array(1, *shape)))


def split(module=mp_ops) -> None:
    for shape in ((3, 8), (2, 3, 8)):
        x = variable(array(0, *shape))
        y = module._c_split(x, group=group())
        same(y, mine(array(0, *shape)))
        backward(y, mine(array(1, *shape)))
        same(x.grad, array(1, *shape))


def names_of_paddlenlp() -> None:
    """PaddleNLP calls these through paddle.distributed.collective."""
    concat(collective)
    split(collective)
    cross_entropy(collective)


def cross_entropy(module=mp_ops) -> None:
    values = 8 * array(0, 3, 5, 16)
    labels = np.random.default_rng(1).integers(0, 16, (3, 5))
    labels[0, :3] = -100
    labels[1, 2:] = 4
    for ignored in (-100, 4):
        ids = np.where(labels == -100, 9, labels) if ignored == 4 else labels
        whole, part = variable(values), variable(mine(values))
        expected = F.cross_entropy(whole, paddle.to_tensor(ids)[..., None], reduction="none", ignore_index=ignored)
        backward(expected, array(2, 3, 5, 1))
        for shape in ((3, 5), (3, 5, 1)):
            part.clear_gradient()
            label = paddle.to_tensor(ids.reshape(shape))
            options = {"group": group(), "ignore_index": ignored, "return_softmax": True}
            loss, softmax = module._c_softmax_with_cross_entropy(part, label, **options)
            same(softmax, mine(F.softmax(whole).numpy()))
            same(loss, expected)
            same(ParallelCrossEntropy(ignore_index=ignored)(part, label), expected)
            backward(loss, array(2, 3, 5, 1))
            same(part.grad, mine(whole.grad.numpy()))


def fused_cross_entropy() -> None:
    """For a sharded head, in chunks of 6 rows and in one: the fused loss equals that of the full logits on one process."""
    if library.why_missing():
        return
    labels = np.random.default_rng(1).integers(0, 16, (3, 5))
    labels[0, :3] = -100
    for transposed, scores in itertools.product((False, True), (6 * 8, 2**25)):
        axis = 0 if transposed else 1
        hidden, weight = array(0, 3, 5, 4) * 4, array(1, *((16, 4) if transposed else (4, 16)))
        whole, part = ((variable(hidden), variable(each)) for each in (weight, mine(weight, axis)))
        logits = paddle.matmul(*whole, transpose_y=transposed)
        expected = F.cross_entropy(logits, paddle.to_tensor(labels), reduction="sum") / 7
        held = fused.DeferredLogits(mp_ops._c_identity(part[0], group=group()), part[1], transposed, group())
        with mock.patch.object(fused, "MAX_LOGITS", scores):
            found = held.cross_entropy(paddle.to_tensor(labels), 1 / 7, -100)
        same(found, expected)
        for result in (found, expected):
            (result * 3).backward()
        same(part[0].grad, whole[0].grad)
        same(part[1].grad, mine(whole[1].grad.numpy(), axis))
    far = fused.DeferredLogits(paddle.to_tensor([[1e4, -1e4]]), paddle.eye(2)[:, rank() : rank() + 1], False, group())
    assert [float(far.cross_entropy(paddle.to_tensor([label]), 1.0, -100)) for label in (0, 1)] == [0.0, 2e4]


def broadcast_input_data() -> None:
    batch = {"ids": paddle.full([2, 3], rank()), "rest": [paddle.full([3], rank()), None, ("text", 7)]}
    mask = paddle.full([1], rank() == 1)
    hybrid_parallel_util.broadcast_input_data(hcg(), batch, mask=mask)
    same(batch["ids"], np.zeros([2, 3]))
    same(batch["rest"][0], np.zeros([3]))
    same(mask, [False])
    assert batch["rest"][1:] == [None, ("text", 7)]


# Layers.


def embedding() -> None:
    layer = VocabParallelEmbedding(8, 6)
    layer.weight.set_value(mine(array(0, 8, 6), axis=0))
    whole = variable(array(0, 8, 6))
    ids = paddle.to_tensor([[0, 3, 4], [7, 4, 1]])
    found, expected = layer(ids), F.embedding(ids, whole)
    same(found, expected)
    for result in (found, expected):
        backward(result, array(1, 2, 3, 6))
    same(layer.weight.grad, mine(whole.grad.numpy(), axis=0))


def column_linear(gather: bool = True, overlap: bool = False) -> None:
    layer = ColumnParallelLinear(6, 8, has_bias=True, gather_output=gather)
    layer.mp_async_allreduce = overlap
    linear(layer, axis=1, cut_bias=True, cut_result=not gather)


def overlapped_column_linear() -> None:
    column_linear(gather=False, overlap=True)


def row_linear() -> None:
    for cut_input in (True, False):
        layer = RowParallelLinear(6, 8, has_bias=True, input_is_parallel=cut_input)
        linear(layer, axis=0, cut_input=cut_input)


def linear(layer, axis: int, cut_bias: bool = False, cut_input: bool = False, cut_result: bool = False) -> None:
    def part(whole, is_cut: bool, axis: int = -1):
        return mine(np.asarray(whole), axis) if is_cut else np.asarray(whole)

    plain = paddle.nn.Linear(6, 8)
    plain.weight.set_value(array(0, 6, 8))
    plain.bias.set_value(array(1, 8))
    layer.weight.set_value(part(plain.weight, True, axis))
    layer.bias.set_value(part(plain.bias, cut_bias))
    whole, x = variable(array(2, 2, 3, 6)), variable(part(array(2, 2, 3, 6), cut_input))
    expected, found = plain(whole), layer(x)
    same(found, part(expected, cut_result))
    backward(expected, array(3, 2, 3, 8))
    backward(found, part(array(3, 2, 3, 8), cut_result))
    same(x.grad, part(whole.grad, cut_input))
    same(layer.weight.grad, part(plain.weight.grad, True, axis))
    same(layer.bias.grad, part(plain.bias.grad, cut_bias))


def sequence_operators() -> None:
    parts = [array(i, 4, 2, 3) for i in range(2)]
    upstream = [array(5 + i, 4, 2, 3) for i in range(2)]
    both, both_upstream = np.concatenate(parts), np.concatenate(upstream)
    cases = [  # operator, input, output, upstream of this rank, gradient
        (sequence.ScatterOp, parts[0], mine(parts[0], 0), mine(upstream[0], 0), upstream[0]),
        (sequence.GatherOp, parts[rank()], both, both_upstream, upstream[rank()]),
        (sequence.AllGatherOp, parts[rank()], both, both_upstream * (1 + rank()), 3 * upstream[rank()]),
        (sequence.ReduceScatterOp, parts[rank()], mine(sum(parts), 0), mine(upstream[0], 0), upstream[0]),
    ]
    for operator, values, output, above, gradient in cases:
        x = variable(values)
        y = operator.apply(x)
        same(y, output)
        backward(y, above)
        same(x.grad, gradient)


def tensor_parallel_wrapper() -> None:
    """The wrapper gives every rank the weights and inputs of the first."""
    layer = paddle.nn.Linear(4, 4)
    layer.weight.set_value(array(rank(), 4, 4))
    wrapped = TensorParallel(layer, hcg(), strategy=None)
    same(layer.weight, array(0, 4, 4))
    same(wrapped(paddle.to_tensor(array(7 + rank(), 2, 4))), array(7, 2, 4) @ array(0, 4, 4))


def pipeline_layer() -> None:
    layer = PipelineLayer([paddle.nn.Linear(4, 4)], topology=hcg().topology())
    assert [tuple(p.shape) for p in layer.parameters()] == [(4, 4), (4,)]


def timers() -> None:
    """The timers of a pipeline's phases."""
    timer = timer_helper._Timer("forward")
    timer.start()
    timer.stop()
    assert timer.elapsed() > 0


def synchronize() -> None:
    paddle.device.synchronize()


def plain_model():
    layers = [paddle.nn.Linear(6, 8), paddle.nn.Tanh(), paddle.nn.Linear(8, 4)]
    for i in (0, 2):
        layers[i].weight.set_value(array(i, *layers[i].weight.shape))
    return paddle.nn.Sequential(*layers)


def sharded(stage: int) -> None:
    """Two steps on halves of a batch equal two steps on the full batch."""
    plain, model = plain_model(), plain_model()
    optimizers = [paddle.optimizer.AdamW(0.05, parameters=each.parameters()) for each in (plain, model)]
    common = {"group": group(), "device": "cpu"}
    with building_group_sharded():
        if stage == 2:
            optimizer = GroupShardedOptimizerStage2(params=list(model.parameters()), optim=optimizers[1], **common)
            wrapped = GroupShardedStage2(model, optimizer, **common)
        else:
            optimizer = optimizers[1]
            wrapped = GroupShardedStage3(model, optimizer=optimizer, segment_size=8, **common)
    for step in range(2):
        batch = array(10 + step, 8, 6)
        for each, own, rows in ((plain, optimizers[0], batch), (wrapped, optimizer, mine(batch, 0))):
            each(paddle.to_tensor(rows)).square().mean().backward()
            own.step()
            own.clear_grad()
    if stage == 3:
        wrapped.get_all_parameters()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        same(found, expected)


def stage_2() -> None:
    sharded(2)


def stage_3() -> None:
    sharded(3)
