"""Prefix tuning (arXiv 2101.00190; without the reparametrisation, as P-Tuning v2, arXiv 2110.07602).

PaddleNLP's PrefixModelForCausalLM is not used (3.0.0b4). It does not support grouped key/value heads
(tests/parity/test_prefix.py). Under tensor parallelism it looks a whole prefix up in a VocabParallelEmbedding and
slices
this rank's heads out of it. So a rank holds some tokens of the prefix and learns them from its own heads alone, since
the backward pass of that layer sums nothing over the ranks. Here a rank holds the prefix of its own heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from oarlock.compat.model_forward import bind_arguments, set_forward
from oarlock.errors import ModelError
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES, explain_missing
from oarlock.weights.layout import TensorSlice

_STD = 0.02


@dataclass(frozen=True)
class Prefix:
    """Trained keys and values before those of the text, in every layer.

    Attributes:
        num_tokens: length of the prefix.
    """

    num_tokens: int

    name = "prefix"

    def attach(self, model: nn.Layer) -> None:
        config = model.config
        self.check(config.model_type)
        family, sizes = FAMILIES[config.model_type], ModelSizes.from_config(config)
        for parameter in model.parameters():
            parameter.stop_gradient = True
        degree = max(1, config.tensor_parallel_degree)
        heads = sizes.kv_heads // degree
        whole = (self.num_tokens, 2 * sizes.num_layers, sizes.kv_heads, sizes.head_size)
        model.prefix_encoder = PrefixEncoder((*whole[:2], heads, whole[3]), family.kv_axes, config.dtype)
        weight = model.prefix_encoder.weight
        if degree > 1:
            weight.is_distributed, weight.split_axis = True, 2
            weight.tensor_slice = TensorSlice(whole, 2, ((config.tensor_parallel_rank * heads, heads),))
        set_forward(model, _wrap_forward(model, model.forward, self.num_tokens))

    def check(self, family: str) -> None:
        """Refuse a family whose layers don't accept keys and values."""
        if family not in FAMILIES:
            why = f"the shape of keys and values of {family} models is unknown"
        elif not FAMILIES[family].kv_axes:
            why = explain_missing(family, "kv_axes", "way to pass keys and values")
        else:
            return
        raise ModelError(f"--prefix_tuning: {why}; use --lora or --p_tuning")

    def positions(self, family: str) -> int:
        """The length of the prefix if text positions continue after it, else 0."""
        return self.num_tokens if FAMILIES[family].positions_follow_prefix else 0

    def initial(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """Normal, with a standard deviation like that of a model's weights."""
        return random.normal(0.0, _STD, shape).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return asdict(self)


class PrefixEncoder(nn.Layer):
    """The prefix of this rank's heads.

    Args:
        shape: [prefix tokens, 2 x layers (keys and values), heads, head size].
        axes: of what a layer of the model accepts (Family.kv_axes).
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], dtype: str) -> None:
        super().__init__()
        self.num_layers = shape[1] // 2
        self.weight = self.create_parameter(list(shape), dtype=dtype, default_initializer=nn.initializer.Constant(0.0))
        # of [2 x layers, batch, prefix tokens, heads, head size]
        self._order = [0, *({"batch": 1, "token": 2, "head": 3}[axis] for axis in axes), 4]

    def forward(self, batch_size: int) -> paddle.Tensor:
        """Keys of all layers, then values, as one tensor: sharding stage 3 hooks into what a layer returns."""
        tokens, layers, heads, size = self.weight.shape
        # Scaled by 1 for a contiguous gradient: that of a transposition is a view, into which fused_allreduce_gradients
        # (Paddle 3.3.1) copies sums in the wrong order.
        of_layers = paddle.scale(self.weight, 1.0).transpose([1, 0, 2, 3]).unsqueeze(1)
        return of_layers.expand([layers, batch_size, tokens, heads, size]).transpose(self._order)

    def past(self, batch_size: int) -> tuple[tuple[paddle.Tensor, paddle.Tensor], ...]:
        """(keys, values) of each layer."""
        found = self(batch_size).unbind(0)
        return tuple(zip(found[: self.num_layers], found[self.num_layers :], strict=True))


def _wrap_forward(model: nn.Layer, forward: Callable[..., Any], num_tokens: int) -> Callable[..., Any]:
    """Wrap a model's forward so that it sees the prefix where a text starts and where it continues."""
    name, past = bind_arguments(forward)

    def prefixed(*args: Any, **kwargs: Any) -> Any:
        named = name(*args, **kwargs)
        ids, mask = named["input_ids"], named.get("attention_mask")
        if named.get(past) is None:
            named[past] = model.prefix_encoder.past(ids.shape[0])
            # The text starts at 0, as in generation. Mistral would start after the given keys.
            if named.get("position_ids") is None:
                named["position_ids"] = paddle.arange(ids.shape[1]).unsqueeze(0).expand(ids.shape)
        if mask is not None:
            # [batch, keys] or [batch, 1 or heads, queries, keys]: 1 or True for visible keys, or floats that are added
            # to attention scores. All tokens attend to the prefix.
            added_to_scores = mask.ndim > 2 and mask.dtype in (paddle.float32, paddle.float16, paddle.bfloat16)
            seen = paddle.zeros if added_to_scores else paddle.ones
            visible = seen([*mask.shape[:-1], num_tokens], dtype=mask.dtype)
            named["attention_mask"] = paddle.concat([visible, mask], axis=-1)
        return forward(**named)

    return prefixed
