"""Scenarios of cpu_ranks.py in which a rank fails, dies, hangs, or calls another operation than the others."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
from cpu_ranks import SHORT_S


def all_reduce_forever() -> None:
    import paddle
    import paddle.distributed as dist

    tensor = paddle.ones([300_000])
    while True:
        dist.all_reduce(tensor)
        tensor.fill_(1.0)


def die(after_s: float = 0.5) -> None:
    time.sleep(after_s)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_waiting(rank: int) -> None:
    die() if rank == 2 else all_reduce_forever()


def killed_while_computing(rank: int) -> None:
    from oarlock.cpu_ranks import failure_detector

    failure_detector._GRACE_S = 2.0  # nothing here ends by itself
    if rank == 2:
        die()
    matrix = np.ones((200, 200))
    while True:
        matrix = matrix @ matrix / 200


def raises(rank: int) -> None:
    if rank == 1:
        time.sleep(0.3)
        raise ValueError("the data is broken")
    all_reduce_forever()


def announces(rank: int) -> None:
    from oarlock.errors import DataError

    if rank == 3:
        raise DataError("no such corpus")
    all_reduce_forever()


def fails_in_backward(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    class Wrong(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, tensor):
            return tensor * 2

        @staticmethod
        def backward(ctx, grad):
            dist.all_reduce(grad if rank == 1 else paddle.ones([9]))
            return grad

    tensor = paddle.ones([4])
    tensor.stop_gradient = False
    Wrong.apply(tensor).sum().backward()


def wait_for_a_complaint() -> None:
    """Wait until another rank reports an error (each rank writes standard error to its own file)."""
    folder = Path(os.readlink("/proc/self/fd/2")).parent
    while not any("oarlock: error" in path.read_text() for path in folder.glob("*.err")):
        time.sleep(0.02)


def late(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    dist.barrier()
    if rank == 3:
        wait_for_a_complaint()
    dist.all_reduce(paddle.ones([3, 5]))


def late_in_a_sub_group(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    group = dist.new_group([1, 3])
    if rank == 3 or rank != 1:
        wait_for_a_complaint()
    if rank in group.ranks:
        dist.broadcast(paddle.ones([7], "int64"), src=3, group=group)
    dist.barrier()


def late_sender(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    if rank == 1:
        wait_for_a_complaint()
    elif rank == 0:
        dist.recv(paddle.ones([2]), src=1)
    else:
        wait_for_a_complaint()
    dist.barrier()


def nobody_receives(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    if rank == 0:
        for i in range(2000):
            dist.send(paddle.to_tensor([i]), dst=1)
    wait_for_a_complaint()
    dist.barrier()


def different_operations(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    if rank == 0:
        dist.all_reduce(paddle.ones([1024, 1024]))
    else:
        dist.broadcast(paddle.ones([16]), src=1)


def different_sizes(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    dist.all_gather([], paddle.ones([11 if rank == 2 else 10], "int64"))


def different_splits(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    sizes = [2, 3, 2, 2] if rank == 0 else [2, 2, 2, 2]
    out = paddle.zeros([8], "int64")
    dist.alltoall_single(out, paddle.zeros([sum(sizes)], "int64"), sizes, [2, 2, 2, 2])
    dist.barrier()


def different_messages(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    if rank == 0:
        dist.send(paddle.zeros([12]), dst=1)
    elif rank == 1:
        dist.recv(paddle.zeros([2, 4]), src=0)
    dist.barrier()


def ends_early(rank: int) -> None:
    import paddle
    import paddle.distributed as dist

    if rank != 1:
        dist.all_reduce(paddle.ones([1]))


def several_machines(rank: int) -> None:
    raise AssertionError("the start must have failed")


def fake_addresses_on_two_machines(rank: int) -> dict[str, str]:
    """Ranks 0 to 2 on one machine and 3 on another, as each of them would see it: only its own address is one of its
    machine. The other is of a network for documentation."""
    here = "127.0.0.1", "192.0.2.1"
    first, second = here if rank < 3 else here[::-1]
    endpoints = [f"{first}:7000", f"{first}:7001", f"{first}:7002", f"{second}:7003"]
    return {"PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints), "PADDLE_CURRENT_ENDPOINT": endpoints[rank]}


several_machines.environment = fake_addresses_on_two_machines


def use_long_timeout(seconds: float, *scenarios):
    """Scenarios with a long timeout."""
    for each in scenarios:
        each.patience_s = seconds
    return scenarios


FAILURES = (
    killed_while_waiting, killed_while_computing, raises, announces, fails_in_backward, different_operations, different_sizes,
    different_splits, different_messages, ends_early, several_machines,
    *use_long_timeout(SHORT_S, late, late_in_a_sub_group, late_sender, nobody_receives),
)  # fmt: skip
