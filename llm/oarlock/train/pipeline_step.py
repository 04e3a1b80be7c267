"""A step, an evaluation and scores through the stages of a pipeline (paddle.distributed.fleet PipelineParallel)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import paddle
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper

from oarlock.data.examples.labels import IGNORE_INDEX
from oarlock.families.packing import ENDS
from oarlock.models.generate import last_scores, right_padded

if TYPE_CHECKING:
    from oarlock.train.trainer import OarlockTrainer

Batch = dict[str, paddle.Tensor]


def pipeline_step(trainer: OarlockTrainer, model: Any, micro_batches: Sequence[Batch]) -> paddle.Tensor:
    """Forward and backward of all micro-batches; returns the sum of their losses, on every stage.

    trainer.criterion.normalizer must allow for the division by the number of micro-batches that PipelineParallel does.
    """
    equal = _same_length(micro_batches)
    data = model._prepare_pipeline_inputs_func([trainer._prepare_inputs(batch) for batch in equal])
    data = model._prepare_training(data, trainer.optimizer, trainer.lr_scheduler)
    model.optimizer = model.lr_scheduler = None  # the Trainer steps them
    with trainer.autocast_smart_context_manager():
        loss = model.forward_backward_pipeline(data, trainer.scaler if trainer.do_grad_scaling else None)
    if trainer.sharded_gradients is not None:
        trainer.sharded_gradients.finish()
    return loss.detach().reshape([])


def _same_length(batches: Sequence[Batch]) -> list[Batch]:
    """Micro-batches padded on the right to the longest of them, with nothing to train on.

    A stage takes the shape of the gradient it waits for from the last activation it sent (P2pHelper), which under 1F1B
    belongs to a later micro-batch: their shapes must not differ within a step.
    """
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(tensor: paddle.Tensor, value: int) -> paddle.Tensor:
        missing = longest - tensor.shape[1]
        if not missing:
            return tensor
        return paddle.concat([tensor, paddle.full([tensor.shape[0], missing], value, tensor.dtype)], axis=1)

    fill = {"labels": IGNORE_INDEX, ENDS: longest}
    return [{name: padded(tensor, fill.get(name, 0)) for name, tensor in batch.items()} for batch in batches]


@contextlib.contextmanager
def _between_steps(model: Any) -> Iterator[None]:
    """Evaluation has shapes of its own: the stages must tell each other, and forget it again.

    (With the shapes of training kept in the cache, PaddleNLP's pipeline evaluation crashes or hangs.)
    """
    helper, model._p2p_helper = model._p2p_helper, P2pHelper(use_cache=False)
    hooks = model.user_hooks_enabled
    try:
        with paddle.no_grad():
            yield
    finally:
        model._p2p_helper, model.user_hooks_enabled = helper, hooks


def pipeline_loss_sum(trainer: OarlockTrainer, model: Any, batches: Sequence[Batch]) -> float:
    """Sum of the token losses of at most accumulate_steps batches, on every stage.

    Fewer are filled up with copies on which nothing is trained: every schedule wants its number of micro-batches.
    """
    count = model.accumulate_steps
    filled = [dict(batch) for batch in batches]
    while len(filled) < count:
        empty = dict(filled[0])
        empty["labels"] = paddle.full_like(empty["labels"], IGNORE_INDEX)
        filled.append(empty)
    data = model._prepare_pipeline_inputs_func([trainer._prepare_inputs(batch) for batch in filled])
    normalizer, trainer.criterion.normalizer = trainer.criterion.normalizer, 1.0 / count
    try:
        with _between_steps(model), trainer.autocast_smart_context_manager():
            loss = model.eval_batch(data, compute_loss=True)
    finally:
        trainer.criterion.normalizer = normalizer
    return float(loss)


def pipeline_next_ids(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> list[int]:
    """The likeliest next token of each row, on every stage.

    Rows are padded on the right: under causal attention nothing after a row's last token is seen by it.

    Args:
        model: PipelineParallel.
        rows: token ids.
    """
    ids, lengths = right_padded(rows, pad_id)
    copies = [{"input_ids": paddle.to_tensor(ids), "labels": paddle.to_tensor(ids)}] * model.accumulate_steps
    data = model._prepare_pipeline_inputs_func([dict(copy) for copy in copies])
    config = model._layers.config
    split, config.tensor_parallel_output = config.tensor_parallel_output, False
    try:
        with _between_steps(model):
            outputs = model.eval_batch(data, compute_loss=False)
    finally:
        config.tensor_parallel_output = split
    hcg = fleet.get_hybrid_communicate_group()
    best = paddle.zeros([len(rows)], dtype="int64")
    if model.is_pipeline_last_stage(ignore_virtual=True):
        scores = outputs[0][0] if isinstance(outputs[0], (tuple, list)) else outputs[0]
        best = last_scores(scores, lengths).argmax(axis=-1)
    group = hcg.get_pipe_parallel_group()
    paddle.distributed.broadcast(best, src=group.ranks[-1], group=group)
    return [int(token) for token in best]
