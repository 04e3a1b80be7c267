"""Fills a model's parameters: one rank per node reads the weights and sends the others their slices.

No rank holds more than its own part of the model, one or two whole tensors (the reader) and a few chunks. The order of
messages follows from what the ranks hold and from the reader's order of names. All ranks know both, so they never
deadlock.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.base.framework import EagerParamBase

from oarlock.environment.console import make_progress_bar
from oarlock.environment.paddle_import import import_paddle
from oarlock.errors import ModelError
from oarlock.parallel.nodes import Node, find_node
from oarlock.parallel.object_collectives import run_on_all_ranks
from oarlock.weights.buffers import all_finite, array_type, row_ranges
from oarlock.weights.copy_into_params import ParameterBuffer, cut_rows, to_tensor, type_name
from oarlock.weights.layout import ParameterShard, TensorSlice, parameter_shards
from oarlock.weights.sources import WeightSource

CHUNK_BYTES = 4 << 20  # size of a message
_COPY_BYTES, _COPY_ROWS = 2 << 20, 192  # minimum that a thread copies at a time; fewer rows are slow to transpose
STATUS_BYTES = 64 << 20  # sent before the ranks ask whether the reader failed
_MAX_THREADS = 4


@dataclass(frozen=True)
class Request:
    """A tensor that a rank needs.

    Attributes:
        name: of the whole tensor.
        slice: the slice of it that the rank needs.
        dtype: Paddle's name of the type to fill it with.
        optional: keeps its value if the source lacks it (buffers that their layer computes).
    """

    name: str
    slice: TensorSlice
    dtype: str
    optional: bool


def load_distributed(
    model: nn.Layer, open_source: Callable[[], WeightSource], wanted: Callable[[ParameterShard], bool] = lambda _: True
) -> None:
    """Fill the parameters of this rank's unwrapped model. Every rank of the run has to call it.

    Names and shapes are checked before the first tensor is read. Parameters without memory (paddle.LazyGuard) are
    allocated when their values arrive. Then their attribute `when_filled` is called, if they have one.

    Args:
        model: plain, tensor-parallel or pipeline.
        open_source: opens the source of the weights. Only ranks that read call it.
        wanted: selects parameters; all by default.

    Raises:
        ModelError: naming the parameters without a tensor, the first of another shape, or what could not be read; on
            the first rank that fails. StoppedWithOthers on the others.
    """
    node = find_node()
    mine = _requests(parameter for parameter in parameter_shards(model) if wanted(parameter))
    requests = node.all_gather_objects([request for request, _ in mine])
    with ExitStack() as stack:
        source: WeightSource | None = None
        names: list[str] = []

        def prepare() -> None:
            nonlocal source, names
            if node.is_reader:
                source = stack.enter_context(closing(open_source()))
                names = check_source(source, [request for of_rank in requests for request in of_rank])

        run_on_all_ranks(prepare)
        names = node.all_gather_objects(names)[0]
        error = _Transfer(node, mine, requests, names, source).run()

        def finish() -> None:
            if error is not None:
                raise error

        run_on_all_ranks(finish)


def check_source(source: WeightSource, requests: list[Request]) -> list[str]:
    """Check that a source has all requested tensors, in the right shapes.

    Returns:
        The names of the tensors to read, in the source's order.

    Raises:
        ModelError: for tensors that are missing or of another shape.
    """
    wanted = {request.name: request for request in requests}
    missing = [name for name, request in wanted.items() if name not in source.shapes and not request.optional]
    if missing:
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ModelError(f"{source.place}: no weights for {len(missing)} of {len(wanted)} parameters ({shown})")
    names = [name for name in source.shapes if name in wanted]
    for name in names:
        shape = source.shapes[name]
        if shape is not None:
            _check_shape(source, name, shape, wanted[name].slice)
    return names


def _check_shape(source: WeightSource, name: str, shape: tuple[int, ...], tensor_slice: TensorSlice) -> None:
    if shape != tensor_slice.shape:
        raise ModelError(f"{source.place}: {name} is {list(shape)}, the model expects {list(tensor_slice.shape)}")


def _requests(held: Iterable[ParameterShard]) -> list[tuple[Request, paddle.Tensor]]:
    found = []
    for parameter in held:
        optional = not isinstance(parameter.tensor, EagerParamBase)
        found.append(
            (Request(parameter.name, parameter.slice, type_name(parameter.tensor), optional), parameter.tensor)
        )
    return found


class _Transfer:
    """Sends tensors from the reader to the ranks of its node."""

    def __init__(
        self,
        node: Node,
        wanted: list[tuple[Request, paddle.Tensor]],
        requests: list[list[Request]],
        names: list[str],
        source: WeightSource | None,
    ) -> None:
        self.node, self.names, self.source = node, names, source
        self._tensors: dict[Request, list[paddle.Tensor]] = defaultdict(list)
        for request, tensor in wanted:
            self._tensors[request].append(tensor)
        self._ranks: dict[str, dict[Request, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, of_rank in zip(node.ranks, requests, strict=True):
            for request in dict.fromkeys(of_rank):
                self._ranks[request.name][request].append(number)
        self._targets: dict[Request, ParameterBuffer] = {}

    def run(self) -> Exception | None:
        """Transfer all tensors. Returns the error that stopped the reader, or None."""
        self._error: Exception | None = None
        unasked = 0
        with (
            ThreadPoolExecutor(min(_MAX_THREADS, import_paddle())) as pool,
            ThreadPoolExecutor(1) as ahead,
            make_progress_bar(len(self.names), "weights", "tensors") as bar,
        ):
            arrays = self._read(ahead)
            for i, name in enumerate(self.names):
                whole = next(arrays) if self.node.is_reader else None
                for request, ranks in self._ranks[name].items():
                    unasked += self._deliver(request, ranks, whole, pool)
                if len(self.node.ranks) == 1 or unasked >= STATUS_BYTES or i == len(self.names) - 1:
                    unasked = 0
                    if any(self.node.all_gather_objects(self._error is not None)):
                        break
                bar.update()
        return self._error

    def _read(self, ahead: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """Yield the whole tensors while the next one is being read. After an error, yield zeros of the right shape."""
        source, coming = self.source, None
        assert source is not None
        for i, name in enumerate(self.names):
            tensor_slice = next(iter(self._ranks[name])).slice
            if self._error is None:
                try:
                    array = (coming or self._begin(source, name, ahead))()
                    _check_shape(source, name, array.shape, tensor_slice)
                    if not all_finite(array):
                        raise ModelError(f"{source.place}: {name} holds values that are not finite numbers")
                    if source.read_ahead and i + 1 < len(self.names):
                        coming = self._begin(source, self.names[i + 1], ahead)
                except Exception as error:  # the other ranks wait for messages: they get them, then the error
                    self._error = error
            yield np.broadcast_to(np.float32(0), tensor_slice.shape) if self._error is not None else array

    def _begin(self, source: WeightSource, name: str, ahead: ThreadPoolExecutor) -> Callable[[], np.ndarray]:
        """Start to read, in the background if possible, straight into this rank's tensor if it is the whole one."""
        into = None
        for request in self._ranks[name]:
            if request in self._tensors and request.slice.axis is None:
                into = self._target(request).array
        in_place = into is not None and source.in_place(name, into)
        if source.read_ahead and not (
            in_place and len(self.node.ranks) == 1
        ):  # otherwise there is nothing to overlap with
            return ahead.submit(source.read, name, into).result
        return functools.partial(source.read, name, into)

    def _target(self, request: Request) -> ParameterBuffer:
        if request not in self._targets:
            self._targets[request] = ParameterBuffer(self._tensors[request][0])
        return self._targets[request]

    def _deliver(self, request: Request, ranks: list[int], whole: np.ndarray | None, pool: ThreadPoolExecutor) -> int:
        """Send one slice of a tensor to the ranks that hold it. Returns the bytes sent."""
        node, tensor_slice = self.node, request.slice
        target = self._target(request) if request in self._tensors else None
        dtype = array_type(request.dtype)
        if target is not None and whole is not None and whole is not target.array:
            fill = functools.partial(_fill, target, tensor_slice, whole)
            row_bytes = math.prod(tensor_slice.local_shape[1:]) * dtype.itemsize
            copies = row_ranges(tensor_slice.local_shape, dtype.itemsize, max(_COPY_BYTES, _COPY_ROWS * row_bytes))
            list((pool.map if target.array is not None else map)(fill, copies))
        reader, others = node.ranks[0], [number for number in ranks if number != node.ranks[0]]
        for begin, end in row_ranges(tensor_slice.local_shape, dtype.itemsize, CHUNK_BYTES) if others else ():
            if len(ranks) == len(node.ranks):
                assert target is not None
                paddle.distributed.broadcast(target.rows(begin, end), reader, node.group)
            elif whole is not None:
                chunk = (
                    target.rows(begin, end) if target else to_tensor(cut_rows(tensor_slice, whole, begin, end), dtype)
                )
                for number in others:
                    paddle.distributed.send(chunk, number, node.group)
            elif target is not None:
                paddle.distributed.recv(target.rows(begin, end), reader, node.group)
        if target is not None:
            for again in self._tensors[request][1:]:  # two stages of this rank hold the same tensor
                ParameterBuffer(again).tensor.copy_(target.tensor, True)
            del self._targets[request]
            for tensor in self._tensors.pop(request):
                if (when_filled := getattr(tensor, "when_filled", None)) is not None:
                    when_filled()
        return math.prod(tensor_slice.local_shape) * dtype.itemsize * len(others)


def _fill(target: ParameterBuffer, tensor_slice: TensorSlice, whole: np.ndarray, rows: tuple[int, int]) -> None:
    target.put(*rows, cut_rows(tensor_slice, whole, *rows))
