"""Packed rows in PaddleNLP's models: which of them keep the examples of a row apart, and how.

Read in paddlenlp 3.0.0b4.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import paddle
from paddle.distributed.fleet.meta_parallel import PipelineLayer

from oarlock.errors import ConfigError
from oarlock.families.registry import FAMILIES
from oarlock.ops.attention import takes_ends
from oarlock.ops.attention_backends.masks import dense_mask, split_row

ENDS = "attn_mask_startend_row_indices"  # of oarlock.data.examples.collate.PackCollator
_IN_BLOCKS = "attends_in_blocks"  # set on models that attend_in_blocks() changed


def check_packing(config: Any, pipeline: bool = False) -> None:
    """Refuse a model in which packed examples would attend to each other.

    Args:
        config: a PaddleNLP PretrainedConfig.
        pipeline: the model is split into stages.

    Raises:
        ConfigError: with the reason.
    """
    family = FAMILIES.get(config.model_type)
    packing = family.packing if family is not None else None
    if packing is None:
        others = ", ".join(other.name for other in FAMILIES.values() if other.packing is not None)
        raise ConfigError(
            f"--packing: PaddleNLP's {config.model_type} does not take the mask and positions that keep packed "
            f"examples apart ({others} do): drop --packing"
        )
    if getattr(config, "alibi", False):
        raise ConfigError("--packing: this model has ALiBi in place of positions: drop --packing")
    if pipeline and not packing.in_pipeline:
        raise ConfigError(
            f"--packing: PaddleNLP's pipeline stages of {config.model_type} drop the positions: drop --packing, "
            "or use --pipeline_parallel_degree 1"
        )
    if os.environ.get("USE_CASUAL_MASK", "False") == "True":  # PaddleNLP's get_use_casual_mask
        raise ConfigError("--packing: the environment variable USE_CASUAL_MASK=True drops every mask; unset it")


def adapt_attention_mask(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return a model's inputs, for packed rows with the mask in the form that the model's attention accepts.

    Args:
        inputs: of a batch. It has ENDS if its rows are packed.
    """
    ends, config = inputs.get(ENDS), model.config
    flash = config.use_flash_attention and _takes_ends(config)
    if ends is None or flash or getattr(model, _IN_BLOCKS, False):
        return inputs
    others = {name: value for name, value in inputs.items() if name != ENDS}
    return others | {"attention_mask": dense_mask(ends.shape[1], ends.shape[1], ends)}


def attend_in_blocks(model: Any) -> None:
    """On a CPU, make the plain attention compute blocks of a packed row instead of the full row.

    Most attention scores of a full row would be masked, and their number grows with the square of the row's length.
    Blocks
    need no more than without packing. (The fused attention skips what is masked and gets the full row.) Models whose
    attention does not accept ENDS do not change: other families, and pipeline stages, which on a CPU mistake it for
    positions (LlamaDecoderLayerPipe).
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
    """PaddleNLP's scaled_dot_product_attention, block by block for packed rows.

    Args:
        original: that function.
    """

    def __init__(self, original: Callable[..., paddle.Tensor]) -> None:
        self.original = original

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
        """Return [batch, tokens, heads x head size], under sequence parallel [batch x tokens, heads x head size].

        Args:
            query, key, value: [batch, tokens, heads, head size].
            more, others: arguments of single families.
        """
        if attn_mask_startend_row_indices is None:
            return self.original(
                query, config, key, value, attention_mask, output_attentions, *more,
                sequence_parallel=sequence_parallel, **others,
            )  # fmt: skip
        blocks = _make_block_masks(attn_mask_startend_row_indices, query.dtype)
        sizes = [mask.shape[-1] for mask in blocks]
        pieces = zip(
            *(
                paddle.split(tensor.reshape([1, -1, *tensor.shape[2:]]), sizes, axis=1)
                for tensor in (query, key, value)
            ),
            blocks,
            strict=True,
        )
        found = [self.original(q, config, k, v, mask, False, *more, **others) for q, k, v, mask in pieces]
        joined = paddle.concat(found, axis=1)
        return joined.squeeze(0) if sequence_parallel else joined.reshape([*query.shape[:2], -1])


def _make_block_masks(ends: paddle.Tensor, dtype: Any) -> list[paddle.Tensor]:
    """Additive masks [1, 1, tokens, tokens] of the consecutive blocks of all rows."""
    table = getattr(ends, "oarlock_blocks", None)  # cached: every layer needs the same masks
    if table is None:
        places = ends.numpy()
        table = []
        for row in places:
            for start, stop in split_row(row):
                seen = dense_mask(
                    stop - start, stop - start, paddle.to_tensor(row[None, start:stop] - start)
                ).unsqueeze(1)
                mask = paddle.where(seen, 0.0, paddle.finfo(dtype).min).astype(dtype)
                mask.stop_gradient = True
                table.append(mask)
        ends.oarlock_blocks = table
    return table
