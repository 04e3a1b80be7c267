"""Adapters for models of PaddleNLP whose forward differs from our decoder's (paddlenlp 3.0.0b4).

Our decoder accepts ids [batch, tokens] that are read from left to right, a mask [batch, keys] (1 for text; keys include
those of earlier calls) and positions [batch, tokens]. All but the ids are optional. These models differ:

- GLM tests its mask with `attention_mask.dim == 1`, without calling the method, so it only understands a complete mask
  [batch, 1, queries, keys]. With its default of zeros every token attends to every other. Its positions are pairs.
- ChatGLM only accepts such a mask, and derives pairs of positions from special tokens that a text may lack.
- ChatGLM2 drops the keys and values it is given unless it is to return them. Its pipeline mistakes rotary embeddings
  for positions and runs without them unless both a mask and positions come with the ids.
- GPT-J hides the tokens that equal the padding, wherever they are, unless there is a mask.
- OPT derives positions from the mask, and warns of given ones or ignores them. It returns None for attributes that it
  lacks, which the Trainer and Fleet then use.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.meta_parallel import PipelineLayer
from paddlenlp.generation.utils import GenerationMixin
from paddlenlp.transformers.chatglm_v2.modeling_pp import EmbeddingPipe
from paddlenlp.transformers.opt.modeling import MultiHeadAttention

from oarlock.compat.model_forward import NamedArguments, bind_arguments, set_forward
from oarlock.families.family import Forward
from oarlock.families.registry import FAMILIES


def adapt_inputs(model: nn.Layer) -> None:
    """Replace the model's forward, and its generation where needed, as the module's docstring describes; in place."""
    family = FAMILIES.get(model.config.model_type)
    if family is None or not family.forward:
        return
    if isinstance(model, PipelineLayer):
        for layer in model.sublayers():
            if isinstance(layer, EmbeddingPipe):
                set_forward(layer, partial(_with_mask_and_positions, layer.forward))
        return
    complete = _COMPLETERS[family.forward]
    plain = model.forward
    name, past = bind_arguments(plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = name(*args, **kwargs)
        complete(model.config, named, past)
        return plain(**named)

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    set_forward(model, forward)
    if family.forward == "pairs_of_positions":
        _generate_with_pairs(model, past)
    if family.forward == "no_position_ids":  # OPT answers None to names it does not have
        object.__setattr__(model, "no_sync", contextlib.nullcontext)
        object.__setattr__(model, "extra_parameters", ())  # GroupShardedStage3 lists them if a layer has the attribute


# ChatGLM and GLM


def _find_answer_start(config: Any, ids: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Find where the answer of ChatGLM's two-part form starts, and the [gMASK] (or [MASK]) before it; [batch, 1] each.

    The number of tokens for rows of another form. GLM's configuration does not name the special tokens.
    """
    tokens = ids.shape[1]
    nowhere = paddle.full([ids.shape[0], 1], tokens, "int64")
    special = [getattr(config, name, None) for name in ("gmask_token_id", "mask_token_id", "bos_token_id")]
    if None in special:
        return nowhere, nowhere

    def first(found: paddle.Tensor) -> paddle.Tensor:
        where = found.astype("int64").argmax(axis=1, keepdim=True)
        return paddle.where(found.any(axis=1, keepdim=True), where, nowhere)

    gmask, mask, begin = (first(ids == token) for token in special)
    place = paddle.where(gmask < tokens, gmask, mask)
    return paddle.where(place < begin, begin, nowhere), place


def make_position_pairs(config: Any, ids: paddle.Tensor, mask: paddle.Tensor | None) -> paddle.Tensor:
    """Make the two positions of ChatGLM and GLM, [batch, 2, tokens], or one, [batch, tokens], if so configured.

    A token of the text has its position and 0. In the two-part form, a token of the answer has the position of the
    [gMASK] that it fills, and counts the answer's tokens from 1 (ChatGLMPretrainedModel.get_position_ids; GLM, arXiv
    2103.10360, section 2.1).
    """
    counted = paddle.ones_like(ids) if mask is None else mask.astype("int64")
    place = (counted.cumsum(axis=1) - 1).clip(min=0)  # padding on the left has 0 too
    if not (getattr(config, "block_position_encoding", False) or getattr(config, "position_encoding_2d", False)):
        return place
    start, asked = _find_answer_start(config, ids)
    index = paddle.arange(ids.shape[1]).unsqueeze(0)
    answer = index >= start
    of_question = paddle.take_along_axis(place, asked.clip(max=ids.shape[1] - 1), axis=1)
    inner = paddle.where(answer, index - start + 1, paddle.zeros_like(place))
    return paddle.stack([paddle.where(answer, of_question.expand_as(place), place), inner], axis=1)


def _complete_pairs(config: Any, named: NamedArguments, past: str) -> None:
    """Add the causal mask [batch, 1, queries, keys], and pairs of positions."""
    ids, mask = named["input_ids"], named.get("attention_mask")
    if mask is None or mask.ndim == 2:
        batch, queries = ids.shape
        if mask is not None:
            earlier = mask.shape[1] - queries
        elif not (cache := named.get(past)):
            earlier = 0
        else:  # ChatGLM keeps keys and values, [tokens, ...], and GLM [batch, tokens, hidden]
            first = cache[0]
            earlier = int(first[0].shape[0] if isinstance(first, (tuple, list)) else first.shape[1])
        seen = paddle.tril(paddle.ones([queries, earlier + queries], dtype="int64"), diagonal=earlier)
        seen = seen.expand([batch, 1, queries, earlier + queries])
        if mask is not None:
            seen = seen * mask.astype("int64").unsqueeze([1, 2])
        if queries > 1:  # the question is visible in both directions
            start, _ = _find_answer_start(config, ids)
            question = (paddle.arange(queries).unsqueeze(0) < start) & (start < queries)
            if mask is not None:
                question = question & mask[:, earlier:].astype("bool")
            question = paddle.concat([paddle.zeros([batch, earlier], "bool"), question], axis=1)
            seen = paddle.maximum(seen, question.astype("int64").unsqueeze([1, 2]).expand_as(seen))
        named["attention_mask"] = seen
    positions = named.get("position_ids")
    if positions is None or positions.ndim == 2:
        own = mask[:, -ids.shape[1] :] if mask is not None and mask.ndim == 2 else None
        named["position_ids"] = make_position_pairs(config, ids, own)


def _generate_with_pairs(model: nn.Layer, past: str) -> None:
    """Generate by the rules of our decoder. PaddleNLP's own rules expect complete masks and pairs from the caller."""

    def prepare(input_ids: paddle.Tensor, attention_mask: paddle.Tensor | None = None, **kwargs: Any) -> NamedArguments:
        remembered = kwargs.get(past)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        positions = make_position_pairs(model.config, input_ids, mask)
        if remembered is not None:
            input_ids, positions = input_ids[:, -1:], positions[..., -1:]
        given = {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask}
        return given | {past: remembered, "use_cache": True}

    def update(
        outputs: Any, model_kwargs: NamedArguments, is_encoder_decoder: bool = False, **_: Any
    ) -> NamedArguments:
        # ChatGLM wraps its keys and values in another tuple.
        remembered = outputs[1][0] if isinstance(outputs[1], tuple) and len(outputs[1]) == 1 else outputs[1]
        outputs = (outputs[0], remembered)
        return GenerationMixin.update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder)

    for name, function in (("prepare_inputs_for_generation", prepare), ("update_model_kwargs_for_generation", update)):
        object.__setattr__(model, name, function)


# the others


def _complete_chatglm_v2(config: Any, named: NamedArguments, past: str) -> None:
    if named.get(past) is not None:
        named["use_cache"] = True


def _with_mask_and_positions(plain: Callable[..., Any], ids: Any) -> Any:
    if isinstance(ids, tuple):  # complete already
        return plain(ids)
    positions = paddle.arange(ids.shape[1]).unsqueeze(0).expand(ids.shape)
    return plain((ids, paddle.ones_like(ids), positions))


def _complete_gptj(config: Any, named: NamedArguments, past: str) -> None:
    if named.get("attention_mask") is None and not named.get(past):
        named["attention_mask"] = paddle.ones_like(named["input_ids"])


def _complete_opt(config: Any, named: NamedArguments, past: str) -> None:
    named.pop("position_ids", None)
    remembered = named.get(past)
    if remembered is not None:
        named[past] = [MultiHeadAttention.Cache(keys, values) for keys, values in remembered]


_Completer = Callable[[Any, NamedArguments, str], None]
_COMPLETERS: dict[Forward, _Completer] = {
    "pairs_of_positions": _complete_pairs,
    "cache_flag": _complete_chatglm_v2,
    "explicit_mask": _complete_gptj,
    "no_position_ids": _complete_opt,
}
