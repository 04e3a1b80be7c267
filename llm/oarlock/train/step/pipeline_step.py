"""Training, evaluation and generation through pipeline stages (paddle.distributed.fleet PipelineParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper
from paddlenlp.peft import LoRAModel

from oarlock.data.examples.labels import IGNORE_INDEX
from oarlock.models.generate import pad_right, select_last_logits
from oarlock.models.packing import ENDS
from oarlock.train.step.forward_context import Batch, ForwardContext
from oarlock.train.step.loss import TokenCrossEntropy


def run_pipeline_step(
    model: Any, micro_batches: Sequence[Batch], context: ForwardContext, optimizer: Any, lr_scheduler: Any, scaler: Any
) -> paddle.Tensor:
    """Run forward and backward of all micro-batches; returns the sum of their losses on every stage.

    PipelineParallel divides the loss by the number of micro-batches; the criterion's normalizer has to undo that.

    Args:
        model: PipelineParallel.
        scaler: GradScaler of fp16 loss scaling, or None.
    """
    data = model._prepare_pipeline_inputs_func([context.prepare(batch) for batch in _pad_to_same_length(micro_batches)])
    data = model._prepare_training(data, optimizer, lr_scheduler)
    model.optimizer = model.lr_scheduler = None  # the Trainer calls their step()
    with context.autocast():
        loss = model.forward_backward_pipeline(data, scaler)
    return loss.detach().reshape([])


def wrap_pipeline(model: nn.Layer) -> Any:
    """PipelineParallel around a model that is not trained (for training the Trainer's _wrap_model does it)."""
    stages = model.model if isinstance(model, LoRAModel) else model
    wrapped = fleet.distributed_model(stages)
    wrapped._prepare_pipeline_inputs_func = stages._prepare_pipeline_inputs_func
    return wrapped


def _pad_to_same_length(batches: Sequence[Batch]) -> list[Batch]:
    """Pad all micro-batches on the right to the longest of them, with tokens that are not trained.

    A stage derives the shape of the gradient it receives from the last activation it sent (P2pHelper), which under
    1F1B belongs to a later micro-batch. So shapes must not differ within a step.
    """
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def pad(tensor: paddle.Tensor, value: int) -> paddle.Tensor:
        missing = longest - tensor.shape[1]
        if not missing:
            return tensor
        return paddle.concat([tensor, paddle.full([tensor.shape[0], missing], value, tensor.dtype)], axis=1)

    fill = {"labels": IGNORE_INDEX, ENDS: longest}
    return [{name: pad(tensor, fill.get(name, 0)) for name, tensor in batch.items()} for batch in batches]


@contextlib.contextmanager
def _without_shape_cache(model: Any) -> Iterator[None]:
    """Let the stages exchange the shapes of evaluation, which differ from those of training.

    With the cached shapes of training, PaddleNLP's pipeline evaluation crashes or hangs.
    """
    helper, model._p2p_helper = model._p2p_helper, P2pHelper(use_cache=False)
    hooks = model.user_hooks_enabled
    try:
        with paddle.no_grad():
            yield
    finally:
        model._p2p_helper, model.user_hooks_enabled = helper, hooks


def sum_pipeline_losses(
    model: Any, batches: Sequence[Batch], criterion: TokenCrossEntropy, context: ForwardContext
) -> float:
    """Sum of the token losses of at most accumulate_steps batches, on every stage.

    Fewer batches are completed by copies without trained tokens: schedules need a fixed number of micro-batches.
    """
    count = model.accumulate_steps
    filled = [dict(batch) for batch in batches]
    while len(filled) < count:
        empty = dict(filled[0])
        empty["labels"] = paddle.full_like(empty["labels"], IGNORE_INDEX)
        filled.append(empty)
    data = model._prepare_pipeline_inputs_func([context.prepare(batch) for batch in filled])
    before, criterion.normalizer = criterion.normalizer, 1.0 / count
    try:
        with _without_shape_cache(model), context.autocast():
            return float(model.eval_batch(data, compute_loss=True))
    finally:
        criterion.normalizer = before


def predict_next_ids(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> list[int]:
    """The most likely next token of each row, on every stage.

    Rows are padded on the right, where causal attention never sees the padding.

    Args:
        model: PipelineParallel.
        rows: token ids.
    """
    ids, lengths = pad_right(rows, pad_id)
    copies = [{"input_ids": paddle.to_tensor(ids), "labels": paddle.to_tensor(ids)}] * model.accumulate_steps
    data = model._prepare_pipeline_inputs_func([dict(copy) for copy in copies])
    config = model._layers.config
    split, config.tensor_parallel_output = config.tensor_parallel_output, False
    try:
        with _without_shape_cache(model):
            outputs = model.eval_batch(data, compute_loss=False)
    finally:
        config.tensor_parallel_output = split
    hcg = fleet.get_hybrid_communicate_group()
    best = paddle.zeros([len(rows)], dtype="int64")
    if model.is_pipeline_last_stage(ignore_virtual=True):
        scores = outputs[0][0] if isinstance(outputs[0], (tuple, list)) else outputs[0]
        best = select_last_logits(scores, lengths).argmax(axis=-1)
    group = hcg.get_pipe_parallel_group()
    paddle.distributed.broadcast(best, src=group.ranks[-1], group=group)
    return [int(token) for token in best]
