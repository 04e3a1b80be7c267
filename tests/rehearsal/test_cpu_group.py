"""CPU process groups: every operation against NumPy on four ranks, and what happens when a rank fails, dies or hangs.

This file is also the program that the tests drive: it imports Paddle once and forks the ranks of one scenario after
the other, so that a scenario costs half a second instead of four imports.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

LLM = Path(__file__).resolve().parents[2] / "llm"
RANKS = 4
# Ranks that are still there by then are killed and the test fails; those that wait for one that never comes wait longer.
LIMIT_S, PATIENCE_S = 300.0, 900.0
SHORT_S = 4  # until a rank that is late is complained of, where that is what a scenario is about


# The tests.


class Driver:
    """The program below, with a line in and a line out for each scenario."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(LLM), "OMP_NUM_THREADS": "1", "GLOG_minloglevel": "2"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, scenario: str) -> dict:
        self.process.stdin.write(scenario + "\n")
        self.process.stdin.flush()
        result = json.loads(self.process.stdout.readline())
        assert not result["left"], f"still running after {LIMIT_S} s: {result}"
        assert not result["memory_left"], result["memory_left"]
        return result

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def run():
    before = set(os.listdir("/dev/shm"))
    driver = Driver()
    try:
        yield driver
    finally:
        driver.close()
    new = set(os.listdir("/dev/shm")) - before
    # A server's regions are another program's (the smoke test of scripts/test.sh starts one meanwhile).
    assert not {name for name in new if "oarlock" in name and not name.startswith("oarlock-serve-")}, new


def errors(result: dict) -> list[str]:
    """What people would see: lines on stderr that tell of an error, of all ranks."""
    return [
        line
        for text in result["stderr"]
        for line in text.splitlines()
        if line.startswith(("oarlock: error", "Traceback")) or "Error: " in line
    ]


def test_operations_against_numpy(run):
    result = run("operations")
    assert result["codes"] == [0] * RANKS, result["stderr"]
    assert result["stdout"][0].splitlines()[-1] == "all operations are right"


def test_fleet_starts_on_it(run):
    result = run("fleet")
    assert result["codes"] == [0] * RANKS, result["stderr"]


@pytest.mark.parametrize("what", ["waiting", "computing"])
def test_a_killed_rank_stops_all(run, what):
    result = run(f"killed_while_{what}")
    assert result["codes"] == [1, 1, -signal.SIGKILL, 1]
    found = errors(result)
    assert len(found) == 1 and "rank 2 (pid" in found[0] and "died without a word" in found[0], found
    assert "died without a word" in result["stderr"][0]  # the lowest rank's, which the launcher shows


def test_an_exception_is_shown_once(run):
    result = run("raises")
    assert result["codes"] == [1] * RANKS
    found = errors(result)
    assert found == ["Traceback (most recent call last):", "ValueError: the data is broken"]
    assert "Traceback" in result["stderr"][1]


def test_an_announced_failure_is_shown_once(run):
    result = run("announces")
    assert result["codes"] == [1] * RANKS
    assert errors(result) == ["oarlock: error (rank 3): no such corpus"]


def test_failure_inside_a_backward_pass(run):
    result = run("fails_in_backward")
    assert result["codes"] == [1] * RANKS
    found = errors(result)
    assert len(found) == 1 and "rank 1 all_reduce (sum) of float32, 16 bytes" in found[0], result["stderr"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("late", [f"waited {SHORT_S} s in all_reduce of float32 [3, 5] in the group of ranks [0, 1, 2, 3]", "rank 3 did not arrive"]),
        ("late_in_a_sub_group", [f"waited {SHORT_S} s in broadcast of int64 [7] in the group of ranks [1, 3]", "rank 3 did not arrive"]),
        ("late_sender", [f"waited {SHORT_S} s in recv of float32 [2] from rank 1 in the group of ranks [0, 1, 2, 3]"]),
        ("nobody_receives", [f"waited {SHORT_S} s in send of int64 [1] in the group of ranks [0, 1, 2, 3]; rank 1 did not arrive"]),
        ("different_operations", ["rank 0 all_reduce (sum) of float32, 4,194,304 bytes", "broadcast of float32, 64 bytes with rank 1 of the group as root"]),
        ("different_sizes", ["all_gather of int64, 80 bytes", "all_gather of int64, 88 bytes"]),
        ("different_splits", ["rank 0 sends 24 bytes to rank 1, who expects 16"]),
        ("different_messages", ["rank 1 expects 32 bytes of float32", "rank 0 has sent 48 bytes of float32"]),
        ("ends_early", ["rank 1 has ended its program while rank"]),
        ("several_machines", ["CPU groups work on one host: rank 0 runs on", "and rank 3 runs on"]),
    ],
)  # fmt: skip
def test_error_texts(run, scenario, words):
    result = run(scenario)
    assert sum(map(bool, result["codes"])) >= 3, result
    shown = [line for line in errors(result) if line.startswith("oarlock: error")]
    assert len(shown) == len(errors(result)) == (2 if scenario == "several_machines" else 1), result["stderr"]
    assert all(word in shown[0] for word in words), shown


def test_a_card_of_an_earlier_launch_is_left_aside():
    sys.path.insert(0, str(LLM))
    from oarlock.parallel import rendezvous
    from oarlock.parallel.failures import started_at

    own = rendezvous._Card(os.getpid(), started_at(os.getpid()), 3, rendezvous._machine(), "here")

    cards = [own._replace(started=own.started - 1), own._replace(pid=2**22 + 1), own._replace(descriptor=9)]

    class Store:
        def add(self, key, number):
            return 1

        def get(self, key):
            return json.dumps(cards.pop(0))

    assert rendezvous._first_card(Store(), own, 1, time.monotonic() + 10).descriptor == 9


# The program.


def drive() -> None:
    """Read scenarios, run each, write what became of it."""
    from oarlock.environment import import_paddle

    import_paddle(1)
    import paddle.distributed  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run_ranks(SCENARIOS[line.strip()])), flush=True)


def run_ranks(scenario) -> dict:
    sockets = [socket.socket() for _ in range(RANKS + 1)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    with tempfile.TemporaryDirectory() as name:
        limit, pids = time.monotonic() + LIMIT_S, []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                become_rank(rank, ports, Path(name), scenario)
            pids.append(pid)
        codes: dict[int, int] = {}
        while len(codes) < RANKS and time.monotonic() < limit:
            for rank in set(range(RANKS)) - set(codes):
                # Left uncollected, as a launcher may for a while: zombies must count as dead.
                ended = os.waitid(os.P_PID, pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended:
                    codes[rank] = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            time.sleep(0.02)
        left = sorted(set(range(RANKS)) - set(codes))
        for rank in left:
            os.kill(pids[rank], signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        texts = [[(Path(name) / f"{rank}.{stream}").read_text() for rank in range(RANKS)] for stream in ("out", "err")]
    return {
        "codes": [codes.get(rank) for rank in range(RANKS)],
        "left": left,
        "memory_left": users_of_memory(),
        "stdout": texts[0],
        "stderr": texts[1],
    }


def users_of_memory() -> list[str]:
    """Processes of ours that still hold ranks' memory (this program itself never does)."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{descriptor.parts[2]}/stat").read_text().rpartition(")")[2].split()[1]
            if "oarlock-ranks" in os.readlink(descriptor) and int(parent) == os.getpid():
                found.append(str(descriptor))
    return found


def become_rank(rank: int, ports: list[int], folder: Path, scenario) -> None:
    # Two nodes on one machine, as two launchers would say it.
    endpoints = [f"127.0.0.{1 + i // 2}:{port}" for i, port in enumerate(ports[:RANKS])]
    os.environ |= {
        "PADDLE_MASTER": f"127.0.0.1:{ports[RANKS]}", "PADDLE_TRAINER_ID": str(rank), "PADDLE_TRAINERS_NUM": str(RANKS),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints), "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_LOCAL_SIZE": str(RANKS), "PADDLE_DISTRI_BACKEND": "gloo",
    }  # fmt: skip
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    atexit._clear()
    code = 1
    try:
        try:
            start(scenario)
            scenario(rank)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            show(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(scenario) -> None:
    import paddle.distributed

    from oarlock.parallel import cpu_group, rendezvous

    if scenario is several_machines and os.environ["PADDLE_TRAINER_ID"] == "3":
        rendezvous._machine = lambda: "another"
    is_short = scenario in (late, late_in_a_sub_group, late_sender, nobody_receives)
    cpu_group.install(float(SHORT_S) if is_short else PATIENCE_S)
    paddle.distributed.init_parallel_env()


def show(kind, error, trace) -> None:
    """What exit_with and Python do with an error."""
    from oarlock.errors import OarlockError, report
    from oarlock.parallel.cpu_group import announce_failure

    if isinstance(error, OarlockError):
        announce_failure(str(error))
        report(error)
    else:
        sys.excepthook(kind, error, trace)


# Scenarios: what each rank does.


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
    """Until another rank has said what is wrong (standard error is a file beside those of the others)."""
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
    from oarlock.parallel.cpu_group import groups

    by_ranks = {tuple(each.ranks): each.statistics() for each in groups()}
    assert by_ranks[tuple(group.ranks)]["all_reduce"][0] >= 1
    assert len(groups()) > 3 and groups()[0].ranks == [0, 1, 2, 3]


def operations(rank: int) -> None:
    import paddle

    for check in (
        check_reductions, check_copies, check_all_to_all, check_layouts, check_objects, check_messages, check_batches,
        check_full_mailbox, check_sub_groups, check_direct_calls, check_statistics,
    ):  # fmt: skip
        begun = time.monotonic()
        check(rank, np.random.default_rng(7))
        paddle.distributed.barrier()
        print(f"{check.__name__} {time.monotonic() - begun:.2f} s")
    print("all operations are right")


KINDS = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64")
SHAPES: tuple[tuple[int, ...], ...] = ((), (0, 3), (1,), (7,), (3, 5), (64, 17))
# Through the large path, in more than one round for the wider kinds.
CASES = [
    *itertools.product(KINDS, SHAPES),
    *itertools.product(("float32", "bfloat16", "int8"), ((129, 1027), (700_001,))),
]


def make(rng, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of the kind, every rank's in the first axis; bfloat16 as float32 that it can hold."""
    shape = (RANKS, *shape)
    if kind == "bool":
        return np.resize(rng.integers(0, 2, 10_007).astype(bool), shape)
    if "int" in kind:
        return np.resize(rng.integers(0, 5, 10_007).astype(kind), shape)
    values = np.resize(rng.standard_normal(10_007, dtype=np.float32), shape)
    if kind == "complex64":
        return (values + 1j * values[::-1]).astype(kind)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if kind == "bfloat16" else values.astype(kind)


def tensor_of(values: np.ndarray, kind: str):
    import paddle

    tensor = paddle.to_tensor(values)
    return tensor.astype(kind) if kind == "bfloat16" else tensor


def same(tensor, expected: np.ndarray, kind: str, what: str) -> None:
    """The same bits (bfloat16 is widened, which loses none)."""
    import paddle

    found = (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()
    assert found.shape == expected.shape and found.dtype == expected.dtype, (what, kind, found.shape, expected.shape)
    assert found.tobytes() == expected.tobytes(), (what, kind, found, expected)


def reduced(values: np.ndarray, operation: str, kind: str) -> np.ndarray:
    """In rank order, halves in float32 with one rounding by Paddle."""
    combine = {"MAX": np.maximum, "MIN": np.minimum, "PROD": np.multiply}.get(operation, np.add)
    parts = values.astype(np.float32) if kind in ("float16", "bfloat16") else values
    total = parts[0].copy()
    for part in parts[1:]:
        total = np.asarray(combine(total, part), total.dtype)
    if operation == "AVG":
        total = np.asarray(total // RANKS if "int" in kind else total / np.float32(RANKS), total.dtype)
    if kind in ("float16", "bfloat16"):
        import paddle

        return paddle.to_tensor(total).astype(kind).astype("float32").numpy().astype(values.dtype)
    return total


def check_reductions(rank: int, rng) -> None:
    import paddle.distributed as dist

    for number, (kind, shape) in enumerate(CASES):
        values = make(rng, kind, shape)
        for operation in ("SUM", "MAX", "MIN", "PROD", "AVG"):
            if (kind == "bool" and operation == "AVG") or (kind == "complex64" and operation != "SUM"):
                continue
            if values.size > 1_000_000 and operation not in ("SUM", "AVG"):
                continue
            op, expected = getattr(dist.ReduceOp, operation), reduced(values, operation, kind)
            tensor = tensor_of(values[rank], kind)
            dist.stream.all_reduce(tensor, op=op)  # dist.all_reduce asks for NCCL's version when it is AVG
            same(tensor, expected, kind, f"all_reduce {operation} {shape}")
            tensor, root = tensor_of(values[rank], kind), number % RANKS
            dist.stream.reduce(tensor, dst=root, op=op)
            same(tensor, expected if rank == root else values[rank], kind, f"reduce {operation} {shape}")
        if shape:
            rows = make(rng, kind, (RANKS * shape[0], *shape[1:]))
            expected = reduced(rows, "SUM", kind)[rank * shape[0] : (rank + 1) * shape[0]]
            out = tensor_of(np.zeros_like(expected), kind)
            dist.reduce_scatter(out, [tensor_of(each, kind) for each in np.split(rows[rank], RANKS)])
            same(out, expected, kind, f"reduce_scatter {shape}")
            whole = tensor_of(rows[rank], kind)
            dist.stream.reduce_scatter(out, whole, use_calc_stream=True)
            same(out, expected, kind, f"reduce_scatter of one tensor {shape}")
            if shape[0]:  # into a part of the input, as Fleet's fused buffers have it
                part = whole._slice(rank * shape[0], (rank + 1) * shape[0])
                dist.stream.reduce_scatter(part, whole)
                same(part, expected, kind, f"reduce_scatter in place {shape}")


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
                same(out.view("uint8"), value, kind, "float8")
            continue
        values, root = make(rng, kind, shape), number % RANKS
        tensor = tensor_of(values[rank], kind)
        dist.broadcast(tensor, src=root)
        same(tensor, values[root], kind, f"broadcast {shape}")

        outs, tensor = [], tensor_of(values[rank], kind)
        dist.all_gather(outs, tensor)
        for out, value in zip(outs, values, strict=True):
            same(out, value, kind, f"all_gather {shape}")
        outs = [] if rank == root else None
        dist.gather(tensor, outs, dst=root)
        for out, value in zip(outs or (), values, strict=False):
            same(out, value, kind, f"gather {shape}")
        out = paddle.empty_like(tensor)
        dist.scatter(out, [tensor_of(value, kind) for value in values] if rank == root else None, src=root)
        same(out, values[rank], kind, f"scatter {shape}")
        if shape and shape[0]:
            joined = np.concatenate(values)
            out = paddle.empty([RANKS * shape[0], *shape[1:]], dtype=tensor.dtype)
            dist.stream.all_gather(out, tensor, use_calc_stream=bool(number % 2))
            same(out, joined, kind, f"all_gather into a tensor {shape}")
            out = paddle.empty_like(tensor)
            dist.stream.scatter(out, tensor_of(joined, kind) if rank == root else None, src=root)
            same(out, values[rank], kind, f"scatter of a tensor {shape}")


def check_all_to_all(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    for kind, rows in itertools.product(("float32", "bfloat16", "int64"), (1, 3, 70_000)):
        values = make(rng, kind, (RANKS, rows, 3))  # [from, to, rows, 3]
        outs: list = []
        dist.alltoall(outs, [tensor_of(value, kind) for value in values[rank]])
        for sender, out in enumerate(outs):
            same(out, values[sender, rank], kind, "alltoall")
        out = paddle.empty([RANKS * rows, 3], dtype=outs[0].dtype)
        dist.stream.alltoall(out, tensor_of(values[rank].reshape(-1, 3), kind), use_calc_stream=True)
        same(out, values[:, rank].reshape(-1, 3), kind, "alltoall of tensors")
        dist.alltoall_single(out, tensor_of(values[rank].reshape(-1, 3), kind))
        same(out, values[:, rank].reshape(-1, 3), kind, "alltoall_single")

        sizes = rng.integers(0, rows + 2, (RANKS, RANKS))  # rows from, to
        sent = [make(rng, kind, (int(sizes[i].sum()), 3))[i] for i in range(RANKS)]
        begin = np.concatenate((np.zeros((RANKS, 1), int), sizes.cumsum(axis=1)), axis=1)
        expected = np.concatenate([sent[i][begin[i, rank] : begin[i, rank + 1]] for i in range(RANKS)])
        out = paddle.empty(list(expected.shape), dtype=outs[0].dtype)
        mine = tensor_of(sent[rank], kind)
        dist.alltoall_single(out, mine, sizes[rank].tolist(), sizes[:, rank].tolist(), sync_op=False).wait()
        same(out, expected, kind, "alltoall_single, uneven")


def check_layouts(rank: int, rng) -> None:
    """Slices, transposed tensors, tensors without memory, and the version that autograd looks at."""
    import paddle
    import paddle.distributed as dist

    values = rng.standard_normal((RANKS, 6, 10), dtype=np.float32)
    total = reduced(values, "SUM", "float32")
    tensor = paddle.to_tensor(values[rank])
    turned = tensor.T
    assert not turned.is_contiguous()
    dist.all_reduce(turned)
    same(turned, total.T, "float32", "transposed")
    same(tensor, total, "float32", "what it is a view of")
    tensor = paddle.to_tensor(values[rank])
    columns, before = tensor[:, 2:5], tensor.inplace_version
    dist.broadcast(columns, src=1)
    expected = values[rank].copy()
    expected[:, 2:5] = values[1][:, 2:5]
    same(tensor, expected, "float32", "columns")
    outs = [paddle.zeros([10, 6]).T for _ in range(RANKS)]
    dist.all_gather(outs, paddle.to_tensor(values[rank]))
    for out, value in zip(outs, values, strict=True):
        same(out, value, "float32", "all_gather into transposed")
    part = tensor._slice(1, 3)
    dist.all_reduce(part)
    assert tensor.inplace_version == before  # as with Paddle's own groups
    cleared = paddle.zeros([6, 10])
    cleared._clear_data()
    if rank == 2:
        cleared = paddle.to_tensor(values[2])
    dist.broadcast(cleared, src=2)
    same(cleared, values[2], "float32", "without memory")
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


def check_messages(rank: int, rng) -> None:
    import paddle
    import paddle.distributed as dist

    right, left = (rank + 1) % RANKS, (rank - 1) % RANKS
    for kind, shape in itertools.product(("float32", "bfloat16", "int64", "bool"), ((), (0,), (5,), (1000, 1000))):
        values = make(rng, kind, shape)
        dist.send(tensor_of(values[rank], kind), dst=right)  # all send before any receives
        out = tensor_of(np.zeros_like(values[rank]), kind)
        dist.recv(out, src=left)
        same(out, values[left], kind, f"ring {shape}")
    # Both directions between all pairs, in random order and sizes; order between a pair is kept.
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
    """Receives before sends, as pipelines do it in one batch."""
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
    # Parts, and putting them together.
    values = rng.standard_normal((RANKS, 8), dtype=np.float32)
    for part in range(2):
        pp._send_on_calc_stream(paddle.to_tensor(values[rank]), world, right, nranks=2, rank_id=part)
    out = paddle.zeros([8])
    for part in range(2):
        pp._recv_on_calc_stream(out, world, left, nranks=2, rank_id=part)
    same(out, values[left], "float32", "parts")
    whole = paddle.to_tensor(np.where(np.arange(8) // 2 == rank, values[0], 0))
    pp.allgather_partial(whole, nranks=RANKS, rank_id=rank, group=world)
    same(whole, values[0], "float32", "all_gather_partial")


def check_full_mailbox(rank: int, rng) -> None:
    """Senders wait when too much lies unreceived, and memory is used again."""
    import paddle
    import paddle.distributed as dist

    from oarlock.parallel import mailbox

    limit, mailbox.OUTSTANDING_BYTES = mailbox.OUTSTANDING_BYTES, 3_000_000
    heap = next(iter(mailbox._heaps.values()))
    if rank == 0:
        for i in range(20):
            dist.send(paddle.full([250_000], float(i)), dst=1 + i % 2)
            assert heap.outstanding <= mailbox.OUTSTANDING_BYTES
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
        for each in heap.mailboxes:
            each.collect()
        assert heap.outstanding == 0
    mailbox.OUTSTANDING_BYTES = limit


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
    # Several groups of one pair: each has its own order.
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
    """What Fleet calls on the group itself."""
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
    same(out, values.reshape(-1), "float32", "all_gather(in, out)")
    buffer = paddle.zeros([RANKS * 6])
    part = buffer._slice(rank * 6, rank * 6 + 6)
    paddle.assign(mine, part)
    group.all_gather(part, buffer).synchronize()
    same(buffer, values.reshape(-1), "float32", "all_gather in place")
    total = paddle.to_tensor(values[rank])
    assert group.allreduce(total).is_completed()
    same(total, reduced(values, "SUM", "float32"), "float32", "allreduce")
    table = rng.standard_normal((RANKS, RANKS, 2), dtype=np.float32)
    out = paddle.empty([RANKS, 2])
    group.alltoall(paddle.to_tensor(table[rank]), out).wait()
    same(out, table[:, rank], "float32", "alltoall(in, out)")
    out = paddle.empty([2])
    group.scatter(paddle.to_tensor(table[1]), out, 1).wait()
    same(out, table[1, rank], "float32", "scatter(in, out, src)")
    group._reduce_scatter_base(out, paddle.to_tensor(table[rank]), core.ReduceOp.SUM)
    same(out, reduced(table, "SUM", "float32")[rank], "float32", "_reduce_scatter_base")
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


SCENARIOS = {
    each.__name__: each
    for each in (
        operations, fleet, killed_while_waiting, killed_while_computing, raises, announces, fails_in_backward, late,
        late_in_a_sub_group, late_sender, nobody_receives, different_operations, different_sizes, different_splits, different_messages,
        ends_early, several_machines,
    )
}  # fmt: skip

if __name__ == "__main__":
    drive()
