"""What some families want besides input_ids: masks and positions that PaddleNLP leaves to their tokenizers."""

from __future__ import annotations

from typing import Any

import paddle

Inputs = dict[str, Any]


def with_masks(config: Any, inputs: Inputs) -> Inputs:
    """The inputs of a forward pass, with what the family can't do without.

    GLM takes the mask it makes itself for one of another kind (it compares the method Tensor.dim with a number), so
    that every token sees all others, those it is to predict too: it gets a causal one. ChatGLM refuses to run without
    a mask; see _chatglm.

    Args:
        config: PaddleNLP's, of the model.
        inputs: input_ids [batch, tokens], padded on the right if at all.
    """
    if "attention_mask" in inputs or config.model_type not in _FAMILIES:
        return inputs
    return inputs | _FAMILIES[config.model_type](config, inputs["input_ids"])


def _glm(_: Any, input_ids: paddle.Tensor) -> Inputs:
    tokens = input_ids.shape[1]
    return {"attention_mask": paddle.tril(paddle.ones([1, 1, tokens, tokens]))}


def _chatglm(config: Any, input_ids: paddle.Tensor) -> Inputs:
    """Positions as in ChatGLMModel.get_position_ids, and the mask that goes with them.

    What stands before the token that begins the answer (bos) is seen whole, the rest causally; a row without one is
    causal from its beginning. Positions have two sides [batch, 2, tokens]: the place in the context, which in the
    answer stays that of [gMASK], and the place in the answer.
    """
    tokens = input_ids.shape[1]
    at = paddle.arange(tokens).unsqueeze(0)  # [1, tokens]
    begins = input_ids == config.bos_token_id
    answered = begins.any(axis=1, keepdim=True)  # [batch, 1]
    context = begins.astype("int64").argmax(axis=1, keepdim=True)
    causal = paddle.tril(paddle.ones([tokens, tokens], dtype="bool"))
    mask = causal.unsqueeze(0) | ((at < context) & answered).unsqueeze(1)
    if not config.position_encoding_2d:
        return {"attention_mask": mask.unsqueeze(1), "position_ids": at.expand_as(input_ids)}
    in_answer = answered & (at >= context)
    place = paddle.where(in_answer, _mask_place(config, input_ids, context), at.expand_as(input_ids))
    block = paddle.where(in_answer, at - context + 1, paddle.zeros_like(input_ids))
    return {"attention_mask": mask.unsqueeze(1), "position_ids": paddle.stack([place, block], axis=1)}


def _mask_place(config: Any, input_ids: paddle.Tensor, context: paddle.Tensor) -> paddle.Tensor:
    """Where [gMASK] stands, else [MASK], else the last token of the context; [batch, tokens], the same in a row."""
    place = paddle.clip(context - 1, min=0)
    for token in (config.mask_token_id, config.gmask_token_id):
        found = input_ids == token
        place = paddle.where(found.any(axis=1, keepdim=True), found.astype("int64").argmax(axis=1, keepdim=True), place)
    return place.expand_as(input_ids)


_FAMILIES = {"glm": _glm, "chatglm": _chatglm}
