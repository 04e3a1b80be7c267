"""Packed rows and PaddleNLP's models: which of them keep the examples of a row apart, and how they are told.

Read in paddlenlp 3.0.0b4.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle.distributed.fleet.meta_parallel import PipelineLayer

from oarlock.errors import ConfigError
from oarlock.families.registry import FAMILIES
from oarlock.ops.attention import dense_mask, takes_ends

ENDS = "attn_mask_startend_row_indices"  # see oarlock.data.examples.collate.PackCollator
_IN_BLOCKS = "attends_in_blocks"  # set on models that attend_in_blocks() changed
_BLOCK = 128  # tokens: below, calls of small operations cost more than scores that the mask throws away


def check_packing(config: Any, pipeline: bool = False) -> None:
    """Refuse a model in which packed examples would see each other.

    Args:
        config: a PaddleNLP PretrainedConfig.
        pipeline: whether the model is cut into stages.

    Raises:
        ConfigError: saying why.
    """
    family = FAMILIES.get(config.model_type)
    packing = family.packing if family is not None else None
    if packing is None:
        others = ", ".join(other.name for other in FAMILIES.values() if other.packing is not None)
        raise ConfigError(
            f"--packing: PaddleNLP's {config.model_type} does not take the mask and positions that keep packed "
            f"examples apart ({others} do): leave --packing out"
        )
    if getattr(config, "alibi", False):
        raise ConfigError("--packing: this model has ALiBi in place of positions: leave --packing out")
    if pipeline and not packing.in_pipeline:
        raise ConfigError(
            f"--packing: PaddleNLP's pipeline stages of {config.model_type} drop the positions: leave --packing out, "
            "or use --pipeline_parallel_degree 1"
        )
    if os.environ.get("USE_CASUAL_MASK", "False") == "True":  # PaddleNLP's get_use_casual_mask
        raise ConfigError("--packing: the environment variable USE_CASUAL_MASK=True drops every mask: unset it")


def with_attention(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """A model's inputs, packed rows with the mask in the form the model's attention takes.

    Args:
        inputs: of a batch; ENDS is there where its rows are packed.
    """
    ends, config = inputs.get(ENDS), model.config
    flash = config.use_flash_attention and _takes_ends(config)
    if ends is None or flash or getattr(model, _IN_BLOCKS, False):
        return inputs
    others = {name: value for name, value in inputs.items() if name != ENDS}
    return others | {"attention_mask": dense_mask(ends)}


def attend_in_blocks(model: Any) -> None:
    """On a CPU, have the plain attention work on pieces of a packed row in place of the whole.

    The scores of a whole row would be mostly masked and grow with the square of the row's length; those of the pieces
    are no more than without packing (the fused attention leaves out what is masked, and gets the row as it is).
    Nothing is changed where the model's attention is not given ENDS: other families, and pipeline stages, which on a
    CPU take it for positions (LlamaDecoderLayerPipe).
    """
    on_cpu = paddle.device.get_device() == "cpu"
    if not on_cpu or not _takes_ends(model.config) or isinstance(model, PipelineLayer):
        return
    for layer in model.sublayers():
        if hasattr(layer, "attn_func") and not takes_ends(layer.attn_func):
            layer.attn_func = _BlockAttention(layer.attn_func)
    setattr(model, _IN_BLOCKS, True)


def _takes_ends(config: Any) -> bool:
    family = FAMILIES.get(config.model_type)
    return family is not None and family.packing is not None and family.packing.takes_ends


class _BlockAttention:
    """PaddleNLP's scaled_dot_product_attention, piece by piece where a row is packed.

    Args:
        whole: that function.
    """

    def __init__(self, whole: Callable[..., paddle.Tensor]) -> None:
        self.whole = whole

    def __call__(
        self,
        query: paddle.Tensor,
        config: Any,
        key: paddle.Tensor,
        value: paddle.Tensor,
        attention_mask: paddle.Tensor | None,
        output_attentions: bool,
        *more: Any,
        attn_mask_startend_row_indices: paddle.Tensor | None = None,
        sequence_parallel: bool = False,
        **others: Any,
    ) -> paddle.Tensor:
        """[batch, tokens, heads x head size], under sequence parallel [batch x tokens, heads x head size].

        Args:
            query, key, value: [batch, tokens, heads, head size].
            more, others: what only one of the families has.
        """
        if attn_mask_startend_row_indices is None:
            return self.whole(
                query, config, key, value, attention_mask, output_attentions, *more,
                sequence_parallel=sequence_parallel, **others,
            )  # fmt: skip
        blocks = _blocks(attn_mask_startend_row_indices, query.dtype)
        sizes = [mask.shape[-1] for mask in blocks]
        pieces = zip(*(_pieces(tensor, sizes) for tensor in (query, key, value)), blocks, strict=True)
        found = [self.whole(q, config, k, v, mask, False, *more, **others) for q, k, v, mask in pieces]
        joined = paddle.concat(found, axis=1)
        return joined.squeeze(0) if sequence_parallel else joined.reshape([*query.shape[:2], -1])


def _pieces(tensor: paddle.Tensor, sizes: list[int]) -> list[paddle.Tensor]:
    return paddle.split(tensor.reshape([1, -1, *tensor.shape[2:]]), sizes, axis=1)


def _blocks(ends: paddle.Tensor, dtype: Any) -> list[paddle.Tensor]:
    """Additive masks [1, 1, tokens, tokens] of pieces that follow each other through all rows."""
    table = getattr(ends, "oarlock_blocks", None)  # the same for every layer
    if table is None:
        places = ends.numpy()
        table = []
        for row in places:
            for start, stop in cut_row(row):
                seen = dense_mask(paddle.to_tensor(row[None, start:stop] - start)).unsqueeze(1)
                mask = paddle.where(seen, 0.0, paddle.finfo(dtype).min).astype(dtype)
                mask.stop_gradient = True
                table.append(mask)
        ends.oarlock_blocks = table
    return table


def cut_row(ends: np.ndarray) -> list[tuple[int, int]]:
    """Pieces [start, stop) of a row in which no token sees beyond its piece, the short ones joined.

    Args:
        ends: [tokens], see oarlock.data.examples.collate.PackCollator.
    """
    stops = np.flatnonzero(np.append(ends[1:] != ends[:-1], True)) + 1
    pieces = [(0, 0)]
    for stop in stops.tolist():
        first, last = pieces[-1]
        if stop - first <= _BLOCK:
            pieces[-1] = (first, stop)
        else:
            pieces.append((last, stop))
    return [piece for piece in pieces if piece[1] > piece[0]]
