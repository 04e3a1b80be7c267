"""Scenarios of cpu_ranks.py in which every operation succeeds; expected values come from NumPy."""

from __future__ import annotations

import itertools
import time

import numpy as np
from cpu_messages import (
    check_batches,
    check_direct_calls,
    check_messages,
    check_statistics,
    check_sub_groups,
    check_too_many_messages,
)
from cpu_ranks import RANKS
from cpu_tensors import CASES, have_same_bits, make, reduce_in_rank_order, tensor_of


def fleet(rank: int) -> None:
    import paddle
    import paddle.distributed as dist
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 2, "pp_degree": 2, "sharding_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    hybrid = fleet.get_hybrid_communicate_group()
    group = hybrid.get_model_parallel_group()
    tensor = paddle.to_tensor([float(rank)])
    dist.all_reduce(tensor, group=group)
    assert float(tensor) == sum(group.ranks)
    from oarlock.cpu_ranks.process_group import groups

    by_ranks = {tuple(each.ranks): each.statistics() for each in groups()}
    assert by_ranks[tuple(group.ranks)]["all_reduce"][0] >= 1
    assert len(groups()) > 3 and groups()[0].ranks == [0, 1, 2, 3]


def operations(rank: int) -> None:
    import paddle

    for check in (
        check_reductions, check_copies, check_all_to_all, check_layouts, check_objects, check_messages, check_batches,
        check_too_many_messages, check_sub_groups, check_direct_calls, check_statistics,
    ):  # fmt: skip
        begun = time.monotonic()
        check(rank, np.random.default_rng(7))
        paddle.distributed.barrier()
        print(f"{check.__name__} {time.monotonic() - begun:.2f} s")
    print("all operations are right")


def check_reductions(rank: int, rng) -> None:
    import paddle.distributed as dist

    for number, (kind, shape) in enumerate(CASES):
        values = make(rng, kind, shape)
        for operation in ("SUM", "MAX", "MIN", "PROD", "AVG"):
            if (kind == "bool" and operation == "AVG") or (kind == "complex64" and operation != "SUM"):
                continue
            if values.size > 1_000_000 and operation not in ("SUM", "AVG"):
                continue
            op, expected = getattr(dist.ReduceOp, operation), reduce_in_rank_order(values, operation, kind)
            tensor = tensor_of(values[rank], kind)
            dist.stream.all_reduce(tensor, op=op)  # dist.all_reduce queries NCCL's version for AVG
            have_same_bits(tensor, expected, kind, f"all_reduce {operation} {shape}")
            tensor, root = tensor_of(values[rank], kind), number % RANKS
            dist.stream.reduce(tensor, dst=root, op=op)
            have_same_bits(tensor, expected if rank == root else values[rank], kind, f"reduce {operation} {shape}")
        if shape:
            rows = make(rng, kind, (RANKS * shape[0], *shape[1:]))
            expected = reduce_in_rank_order(rows, "SUM", kind)[rank * shape[0] : (rank + 1) * shape[0]]
            out = tensor_of(np.zeros_like(expected), kind)
            dist.reduce_scatter(out, [tensor_of(each, kind) for each in np.split(rows[rank], RANKS)])
            have_same_bits(out, expected, kind, f"reduce_scatter {shape}")
            whole = tensor_of(rows[rank], kind)
            dist.stream.reduce_scatter(out, whole, use_calc_stream=True)
            have_same_bits(out, expected, kind, f"reduce_scatter of one tensor {shape}")
            if shape[0]:  # into a slice of the input, as in Fleet's fused buffers
                part = whole._slice(rank * shape[0], (rank + 1) * shape[0])
                dist.stream.reduce_scatter(part, whole)
                have_same_bits(part, expected, kind, f"reduce_scatter in place {shape}")


def check_copies(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    for number, (kind, shape) in enumerate([*CASES, ("float8_e4m3fn", (3, 5))]):
        if kind.startswith("float8"):
            values = rng.integers(0, 100, (RANKS, *shape)).astype(np.uint8)
            tensor, kind = paddle.to_tensor(values[rank]).view("float8_e4m3fn"), "uint8"
            outs = [paddle.empty_like(tensor) for _ in range(RANKS)]
            dist.all_gather(outs, tensor)
            for out, value in zip(outs, values, strict=True):
                have_same_bits(out.view("uint8"), value, kind, "float8")
            continue
        values, root = make(rng, kind, shape), number % RANKS
        tensor = tensor_of(values[rank], kind)
        dist.broadcast(tensor, src=root)
        have_same_bits(tensor, values[root], kind, f"broadcast {shape}")

        outs, tensor = [], tensor_of(values[rank], kind)
        dist.all_gather(outs, tensor)
        for out, value in zip(outs, values, strict=True):
            have_same_bits(out, value, kind, f"all_gather {shape}")
        outs = [] if rank == root else None
        dist.gather(tensor, outs, dst=root)
        for out, value in zip(outs or (), values, strict=False):
            have_same_bits(out, value, kind, f"gather {shape}")
        out = paddle.empty_like(tensor)
        dist.scatter(out, [tensor_of(value, kind) for value in values] if rank == root else None, src=root)
        have_same_bits(out, values[rank], kind, f"scatter {shape}")
        if shape and shape[0]:
            joined = np.concatenate(values)
            out = paddle.empty([RANKS * shape[0], *shape[1:]], dtype=tensor.dtype)
            dist.stream.all_gather(out, tensor, use_calc_stream=bool(number % 2))
            have_same_bits(out, joined, kind, f"all_gather into a tensor {shape}")
            out = paddle.empty_like(tensor)
            dist.stream.scatter(out, tensor_of(joined, kind) if rank == root else None, src=root)
            have_same_bits(out, values[rank], kind, f"scatter of a tensor {shape}")


def check_all_to_all(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    for kind, rows in itertools.product(("float32", "bfloat16", "int64"), (1, 3, 70_000)):
        values = make(rng, kind, (RANKS, rows, 3))  # [from, to, rows, 3]
        outs: list = []
        dist.alltoall(outs, [tensor_of(value, kind) for value in values[rank]])
        for sender, out in enumerate(outs):
            have_same_bits(out, values[sender, rank], kind, "alltoall")
        out = paddle.empty([RANKS * rows, 3], dtype=outs[0].dtype)
        dist.stream.alltoall(out, tensor_of(values[rank].reshape(-1, 3), kind), use_calc_stream=True)
        have_same_bits(out, values[:, rank].reshape(-1, 3), kind, "alltoall of tensors")
        dist.alltoall_single(out, tensor_of(values[rank].reshape(-1, 3), kind))
        have_same_bits(out, values[:, rank].reshape(-1, 3), kind, "alltoall_single")

        sizes = rng.integers(0, rows + 2, (RANKS, RANKS))  # rows from, to
        sent = [make(rng, kind, (int(sizes[i].sum()), 3))[i] for i in range(RANKS)]
        begin = np.concatenate((np.zeros((RANKS, 1), int), sizes.cumsum(axis=1)), axis=1)
        expected = np.concatenate([sent[i][begin[i, rank] : begin[i, rank + 1]] for i in range(RANKS)])
        out = paddle.empty(list(expected.shape), dtype=outs[0].dtype)
        mine = tensor_of(sent[rank], kind)
        dist.alltoall_single(out, mine, sizes[rank].tolist(), sizes[:, rank].tolist(), sync_op=False).wait()
        have_same_bits(out, expected, kind, "alltoall_single, uneven")


def check_layouts(rank: int, rng) -> None:
    """Slices, transposed tensors, tensors without memory, and the version that autograd looks at."""
    import paddle
    import paddle.distributed as dist

    values = rng.standard_normal((RANKS, 6, 10), dtype=np.float32)
    total = reduce_in_rank_order(values, "SUM", "float32")
    tensor = paddle.to_tensor(values[rank])
    turned = tensor.T
    assert not turned.is_contiguous()
    dist.all_reduce(turned)
    have_same_bits(turned, total.T, "float32", "transposed")
    have_same_bits(tensor, total, "float32", "what it is a view of")
    tensor = paddle.to_tensor(values[rank])
    columns, before = tensor[:, 2:5], tensor.inplace_version
    dist.broadcast(columns, src=1)
    expected = values[rank].copy()
    expected[:, 2:5] = values[1][:, 2:5]
    have_same_bits(tensor, expected, "float32", "columns")
    outs = [paddle.zeros([10, 6]).T for _ in range(RANKS)]
    dist.all_gather(outs, paddle.to_tensor(values[rank]))
    for out, value in zip(outs, values, strict=True):
        have_same_bits(out, value, "float32", "all_gather into transposed")
    part = tensor._slice(1, 3)
    dist.all_reduce(part)
    assert tensor.inplace_version == before  # as with Paddle's own groups
    cleared = paddle.zeros([6, 10])
    cleared._clear_data()
    if rank == 2:
        cleared = paddle.to_tensor(values[2])
    dist.broadcast(cleared, src=2)
    have_same_bits(cleared, values[2], "float32", "without memory")
    infinite = paddle.to_tensor([np.nan, np.inf, 3e38, 1.0])
    dist.all_reduce(infinite)
    assert str(infinite.numpy()) == "[nan inf inf  4.]"
    halves = paddle.to_tensor([np.nan, np.inf, 3e38, 1.0]).astype("bfloat16")
    dist.all_reduce(halves)
    assert str(halves.astype("float32").numpy()) == "[nan inf inf  4.]"


def check_objects(rank: int, rng) -> None:
    import paddle.distributed as dist

    found: list = []
    dist.all_gather_object(found, {"rank": rank, "text": "x" * (10 ** (rank + 1))})
    assert [len(each["text"]) for each in found] == [10, 100, 1000, 10000]
    words = ["from 2", [1, 2]] if rank == 2 else [None, None]
    dist.broadcast_object_list(words, src=2)
    assert words == ["from 2", [1, 2]]


OPERATIONS = (operations, fleet)
