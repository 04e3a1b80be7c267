"""Random initial weights that are the same under every plan: they depend on the seed and the names of the layers.

PaddleNLP draws them on each rank in the order of construction, so two plans start from different models. Here the model
of one card is drawn block by block (a decoder layer, an embedding, the output layer, ...) with the model's own
`_init_weights`. Each block has its own generator, and memory holds one block.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddlenlp.transformers import PretrainedConfig, PretrainedModel

from oarlock.compat.patch import replaced
from oarlock.environment.paddle_import import import_paddle, on_cpu
from oarlock.families.registry import FAMILIES
from oarlock.models.construct import construct, unsplit_config, without_values
from oarlock.weights.layout import parameter_shards

_MAX_THREADS = 16
_CHUNK = 1 << 20  # values per generator, so that any number of threads draws the same


@dataclass(frozen=True)
class _Block:
    """A part of the model that is drawn at once.

    Attributes:
        name: its path in the model, as in parameter names.
        model: the innermost PretrainedModel around it, whose `_init_weights` applies to it.
        recursive: includes all layers below it, not only its own parameters.
    """

    name: str
    layer: nn.Layer
    model: PretrainedModel
    recursive: bool

    def parameters(self) -> dict[str, Any]:
        """Name in the block -> parameter, each once."""
        return dict(self.layer.named_parameters(include_sublayers=self.recursive))

    def initialize(self) -> None:
        """Initialize it as its model does, in the same order."""
        if self.recursive:
            self.layer.apply(self._initialize)
        else:
            self._initialize(self.layer)

    def _initialize(self, layer: nn.Layer) -> None:
        self.model._init_weights(layer)
        # Bloom's zeroes the weight instead of the bias (3.0.0b4), so that no layer would ever learn anything.
        family = FAMILIES.get(self.model.config.model_type)
        wrong = family is not None and family.linear_init_is_wrong
        if wrong and isinstance(layer, nn.Linear) and layer.bias is not None:
            std = self.model.config.initializer_range
            layer.weight.set_value(paddle.tensor.normal(mean=0.0, std=std, shape=layer.weight.shape))
            layer.bias.set_value(paddle.zeros(layer.bias.shape, layer.bias.dtype))


class RandomWeights:
    """Initial weights as a WeightSource (oarlock.weights.sources).

    They are float32 and drawn on the CPU on every machine.
    """

    place = "random initial weights"
    read_ahead = False  # the generator belongs to the process

    def __init__(self, model_class: Any, config: PretrainedConfig, seed: int) -> None:
        self._seed = seed
        # Later parameters get the same automatic names as on ranks that do not draw.
        with _draw_on_cpu(), without_values(), paddle.utils.unique_name.guard():
            model = construct(model_class, unsplit_config(config), "float32")
        names = {id(held.tensor): held.name for held in parameter_shards(model) if hasattr(held.tensor, "_init_func")}
        self._blocks: list[tuple[_Block, dict[str, str]]] = []  # with name in the block -> name in the model
        self._where: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        for block in _list_blocks(model):
            parameters = block.parameters()
            given = {local: names.pop(id(p)) for local, p in parameters.items() if id(p) in names}
            self.shapes |= {name: tuple(parameters[local].shape) for local, name in given.items()}
            self._where |= dict.fromkeys(given.values(), len(self._blocks))
            self._blocks.append((block, given))
        self._drawn: dict[str, np.ndarray] = {}
        self._untouched: dict[Any, frozenset[str]] = {}
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, import_paddle()))

    def read(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        """Read a tensor. The block of the last tensor is kept, so read names in the order of `shapes`."""
        if name not in self._drawn:
            self._drawn = {}
            self._drawn = self._draw(*self._blocks[self._where[name]])
        return self._drawn[name]

    def in_place(self, name: str, into: np.ndarray) -> bool:
        return False

    def close(self) -> None:
        self._pool.shutdown()
        self._drawn, self._blocks = {}, []

    def _draw(self, block: _Block, given: dict[str, str]) -> dict[str, np.ndarray]:
        digest = hashlib.sha256(f"{self._seed}/{block.name}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        parameters = block.parameters()
        with _draw_on_cpu():
            untouched = self._find_untouched(block, parameters)
        with _draw_on_cpu(seed), _draw_on_threads(seed, self._pool):
            for local, parameter in parameters.items():
                # Some initializers need allocated memory, which parameter.initialize() provides too late.
                paddle.empty(parameter.shape, parameter.dtype)._share_buffer_to(parameter)
                if local in untouched:
                    parameter._init_func(parameter, None)
            block.initialize()
            drawn = {}
            for local, parameter in parameters.items():
                if local in given:
                    drawn[given[local]] = parameter.numpy()
                parameter._clear_data()
        return drawn

    def _find_untouched(self, block: _Block, parameters: dict[str, Any]) -> frozenset[str]:
        """Find parameters that `_init_weights` does not set, so they keep the value their layer gave them.

        They are detected by filling all parameters with NaN first, once per kind of block: letting layers draw all
        values would
        take several times as long.
        """
        kind = (type(block.layer), tuple((local, *p.shape) for local, p in parameters.items()))
        if kind not in self._untouched:
            for parameter in parameters.values():
                paddle.full(parameter.shape, math.nan, parameter.dtype)._share_buffer_to(parameter)
            with _replaced_normal(lambda mean=0.0, std=1.0, shape=None, name=None: paddle.zeros(shape)):
                block.initialize()
            self._untouched[kind] = frozenset(
                local for local, parameter in parameters.items() if bool(parameter.isnan().any())
            )
            for parameter in parameters.values():
                parameter._clear_data()
        return self._untouched[kind]


def _list_blocks(model: PretrainedModel) -> Iterator[_Block]:
    """The elements of lists of layers, and the layers outside these lists, in the model's order."""

    def walk(name: str, layer: nn.Layer, inner: PretrainedModel) -> Iterator[_Block]:
        if isinstance(layer, PretrainedModel):
            inner = layer
        if not any(isinstance(below, nn.LayerList) for below in layer.sublayers(include_self=True)):
            yield _Block(name, layer, inner, recursive=True)
            return
        yield _Block(name, layer, inner, recursive=False)
        for child_name, child in layer.named_children():
            path = f"{name}.{child_name}".lstrip(".")
            if isinstance(layer, nn.LayerList):
                yield _Block(path, child, inner, recursive=True)
            else:
                yield from walk(path, child, inner)

    return (block for block in walk("", model, model) if block.parameters())


def _replaced_normal(function: Callable[..., paddle.Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Make models draw normal values with another function (they call it by both names)."""
    return replaced((paddle, "normal"), (paddle.tensor, "normal"), by=function)


def _draw_on_threads(seed: int, pool: ThreadPoolExecutor) -> contextlib.AbstractContextManager[Any]:
    """Draw normal values with NumPy's generators on several threads. Paddle uses one thread at half the speed."""
    seeds, slow = np.random.SeedSequence(seed), paddle.tensor.normal

    def normal(mean: Any = 0.0, std: Any = 1.0, shape: Any = None, name: str | None = None) -> paddle.Tensor:
        if shape is None or not isinstance(mean, (int, float)) or not isinstance(std, (int, float)):
            return slow(mean, std, shape, name)
        values = np.empty(shape, np.float32)
        flat = values.reshape(-1)
        parts = [flat[begin : begin + _CHUNK] for begin in range(0, len(flat), _CHUNK)]

        def fill(part: np.ndarray, of_part: np.random.SeedSequence) -> None:
            np.random.Generator(np.random.SFC64(of_part)).standard_normal(out=part, dtype=np.float32)
            np.multiply(part, np.float32(std), out=part)
            np.add(part, np.float32(mean), out=part)

        list(pool.map(fill, parts, seeds.spawn(len(parts))))
        return paddle.to_tensor(values)

    return _replaced_normal(normal)


@contextlib.contextmanager
def _draw_on_cpu(seed: int | None = None) -> Iterator[None]:
    """Run on the CPU with a seeded generator. Device and generator are restored afterwards."""
    generator = paddle.framework.core.default_cpu_generator()
    state = generator.get_state()
    try:
        if seed is not None:
            generator.manual_seed(seed)
        with on_cpu(), paddle.no_grad():
            yield
    finally:
        generator.set_state(state)
