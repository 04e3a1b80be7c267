"""Checks of cpu_operations.py other than collectives: messages, sub-groups, and Fleet's direct calls of a group."""

from __future__ import annotations

import itertools
import time

import numpy as np
from cpu_ranks import RANKS
from cpu_tensors import have_same_bits, make, reduce_in_rank_order, tensor_of


def check_messages(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    right, left = (rank + 1) % RANKS, (rank - 1) % RANKS
    for kind, shape in itertools.product(("float32", "bfloat16", "int64", "bool"), ((), (0,), (5,), (1000, 1000))):
        values = make(rng, kind, shape)
        dist.send(tensor_of(values[rank], kind), dst=right)  # all send before any receives
        out = tensor_of(np.zeros_like(values[rank]), kind)
        dist.recv(out, src=left)
        have_same_bits(out, values[left], kind, f"ring {shape}")
    # Both directions between all pairs, in random order and sizes; the order within a pair is kept.
    plan = np.random.default_rng(11).integers(1, 200_000, (RANKS, RANKS, 12))
    tasks, received = [], []
    for i, other in itertools.product(range(12), (j for j in range(RANKS) if j != rank)):
        out = paddle.zeros([int(plan[other, rank, i])], "int32")
        received.append((out, other * 100 + i))
        tasks.append(dist.irecv(out, src=other))
        sent = paddle.full([int(plan[rank, other, i])], rank * 100 + i, "int32")
        dist.isend(sent, dst=other)
        sent.zero_()  # the message was copied
    for i in np.random.default_rng(rank).permutation(len(tasks)):
        tasks[i].wait()
        assert tasks[i].is_completed()
        assert bool((received[i][0] == received[i][1]).all())
    # A column of a larger tensor.
    table = paddle.zeros([4, 3])
    dist.send(paddle.full([4], float(rank)), dst=right)
    dist.recv(table[:, 1], src=left)
    assert table.numpy().sum(axis=0).tolist() == [0, 4.0 * left, 0]


def check_batches(rank: int, rng) -> None:
    """Receives are posted before sends, as in the batches of a pipeline."""
    import paddle
    import paddle.distributed as dist
    from paddle.distributed.communication.batch_isend_irecv import P2POp, batch_isend_irecv
    from paddle.distributed.fleet.meta_parallel.pp_utils import p2p_communication as pp

    world = dist.collective._get_default_group()
    right, left = (rank + 1) % RANKS, (rank - 1) % RANKS
    outs = [paddle.zeros([3]) for _ in range(4)]
    sends = [paddle.full([3], rank * 10.0 + i) for i in range(4)]
    tasks = batch_isend_irecv(
        [
            *(P2POp(dist.irecv, outs[i], peer) for i, peer in enumerate((left, right, left))),
            *(P2POp(dist.isend, sends[i], peer) for i, peer in enumerate((right, left, right))),
        ]
    )
    for task in tasks:
        task.wait()
    assert [float(out[0]) for out in outs[:3]] == [left * 10, right * 10 + 1, left * 10 + 2]
    pp.batch_send_recv_on_calc_stream(
        [
            pp.P2PonCalcStream(pp._recv_on_calc_stream, outs[0], left, world),
            pp.P2PonCalcStream(pp._recv_on_calc_stream, outs[1], right, world),
            pp.P2PonCalcStream(pp._send_on_calc_stream, sends[3], right, world),
            pp.P2PonCalcStream(pp._send_on_calc_stream, sends[0], left, world),
        ]
    )
    assert [float(out[0]) for out in outs[:2]] == [left * 10 + 3, right * 10]
    # Splitting and joining.
    values = rng.standard_normal((RANKS, 8), dtype=np.float32)
    for part in range(2):
        pp._send_on_calc_stream(paddle.to_tensor(values[rank]), world, right, nranks=2, rank_id=part)
    out = paddle.zeros([8])
    for part in range(2):
        pp._recv_on_calc_stream(out, world, left, nranks=2, rank_id=part)
    have_same_bits(out, values[left], "float32", "parts")
    whole = paddle.to_tensor(np.where(np.arange(8) // 2 == rank, values[0], 0))
    pp.allgather_partial(whole, nranks=RANKS, rank_id=rank, group=world)
    have_same_bits(whole, values[0], "float32", "all_gather_partial")


def check_too_many_messages(rank: int, rng) -> None:
    """Senders wait while too much is unreceived, and memory is reused."""
    import paddle
    import paddle.distributed as dist

    from oarlock.cpu_ranks import point_to_point

    limit, point_to_point.OUTSTANDING_BYTES = point_to_point.OUTSTANDING_BYTES, 3_000_000
    heap = next(iter(point_to_point._heaps.values()))
    if rank == 0:
        for i in range(20):
            dist.send(paddle.full([250_000], float(i)), dst=1 + i % 2)
            assert heap.outstanding <= point_to_point.OUTSTANDING_BYTES
        for i in range(3000):
            dist.send(paddle.to_tensor([i]), dst=3)
    elif rank == 3:
        time.sleep(0.2)
        out = paddle.to_tensor([-1])
        for i in range(3000):
            dist.recv(out, src=0)
            assert int(out) == i
    else:
        time.sleep(0.2 * rank)
        out = paddle.zeros([250_000])
        for i in range(10):
            dist.recv(out, src=0)
            assert float(out[-1]) == 2 * i + rank - 1
    dist.barrier()
    if rank == 0:
        for each in heap.users:
            each.collect()
        assert heap.outstanding == 0
    point_to_point.OUTSTANDING_BYTES = limit


def check_sub_groups(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    pairs = [dist.new_group([i, j]) for i in range(RANKS) for j in range(i + 1, RANKS)]
    pairs += [dist.new_group([0, 3]), dist.new_group([0, 1, 3]), dist.new_group([1, 2, 3])]
    for turn in range(2):
        for number, group in enumerate(pairs):
            if rank not in group.ranks:
                continue
            tensor = paddle.full([1000 + number], float(rank))
            dist.all_reduce(tensor, group=group)
            assert float(tensor[-1]) == sum(group.ranks)
            tensor = paddle.full([3], rank + 100 * number)
            dist.broadcast(tensor, src=group.ranks[turn], group=group)
            assert int(tensor[0]) == group.ranks[turn] + 100 * number
    # Several groups of one pair: each keeps its own order.
    both = [group for group in pairs if group.ranks == [0, 3]]
    if rank == 0:
        for i, group in enumerate(both):
            dist.send(paddle.to_tensor([i]), dst=3, group=group)
    if rank == 3:
        out = paddle.to_tensor([-1])
        for i, group in reversed(list(enumerate(both))):
            dist.recv(out, src=0, group=group)
            assert int(out) == i
    assert dist.get_backend() == "CPU"


def check_direct_calls(rank: int, rng) -> None:
    """Check what Fleet calls on the group itself."""
    import paddle
    import paddle.distributed as dist
    from paddle.base import core

    group = dist.collective._get_default_group().process_group
    twins = [name for name in dir(core.ProcessGroup) if not name.startswith("__") and name != "_pybind11_conduit_v1_"]
    assert [name for name in twins if not hasattr(group, name)] == []
    assert (group.rank(), group.size(), group.ranks) == (rank, RANKS, [0, 1, 2, 3])
    values = rng.standard_normal((RANKS, 6), dtype=np.float32)
    mine = paddle.to_tensor(values[rank])
    out = paddle.empty([RANKS * 6])
    group.all_gather(mine, out).wait()
    have_same_bits(out, values.reshape(-1), "float32", "all_gather(in, out)")
    buffer = paddle.zeros([RANKS * 6])
    part = buffer._slice(rank * 6, rank * 6 + 6)
    paddle.assign(mine, part)
    group.all_gather(part, buffer).synchronize()
    have_same_bits(buffer, values.reshape(-1), "float32", "all_gather in place")
    total = paddle.to_tensor(values[rank])
    assert group.allreduce(total).is_completed()
    have_same_bits(total, reduce_in_rank_order(values, "SUM", "float32"), "float32", "allreduce")
    table = rng.standard_normal((RANKS, RANKS, 2), dtype=np.float32)
    out = paddle.empty([RANKS, 2])
    group.alltoall(paddle.to_tensor(table[rank]), out).wait()
    have_same_bits(out, table[:, rank], "float32", "alltoall(in, out)")
    out = paddle.empty([2])
    group.scatter(paddle.to_tensor(table[1]), out, 1).wait()
    have_same_bits(out, table[1, rank], "float32", "scatter(in, out, src)")
    group._reduce_scatter_base(out, paddle.to_tensor(table[rank]), core.ReduceOp.SUM)
    have_same_bits(out, reduce_in_rank_order(table, "SUM", "float32")[rank], "float32", "_reduce_scatter_base")
    group.barrier()
    dist.collective.shutdown_process_group()
    dist.collective.restart_process_group()


def check_statistics(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    group = dist.collective._get_default_group().process_group
    dist.barrier()
    group.reset_statistics()
    dist.all_reduce(paddle.ones([10]))
    dist.all_reduce(paddle.ones([5], "float64"))
    if rank == 0:
        dist.send(paddle.ones([3], "bfloat16"), dst=1)
    if rank == 1:
        dist.recv(paddle.ones([3], "bfloat16"), src=0)
    message = {"send": (1, 6)} if rank == 0 else {"recv": (1, 6)} if rank == 1 else {}
    assert group.statistics() == {"all_reduce": (2, 80), **message}
