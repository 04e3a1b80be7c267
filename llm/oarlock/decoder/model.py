"""The causal language model on one card, or on the ranks of tensor parallelism."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import paddle
from paddle import nn
from paddle.distributed import collective, fleet
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    ColumnSequenceParallelLinear,
    GatherOp,
    RowSequenceParallelLinear,
    ScatterOp,
)
from paddlenlp.transformers import PretrainedConfig, PretrainedModel

from oarlock.decoder.attention import KeysAndValues, LayerContext
from oarlock.decoder.block import DecoderLayer
from oarlock.decoder.frequencies import get_original_length
from oarlock.decoder.linear import copy_to_ranks, set_slice
from oarlock.decoder.norm import RMSNorm
from oarlock.families.architecture import Architecture
from oarlock.families.family import Family
from oarlock.ops.attention import make_mask
from oarlock.ops.linear_cross_entropy import DeferredLogits
from oarlock.ops.patch import can_fuse
from oarlock.typing import Tensor

_LINEAR = (
    nn.Linear, ColumnParallelLinear, RowParallelLinear, ColumnSequenceParallelLinear, RowSequenceParallelLinear,
    nn.Embedding, VocabParallelEmbedding,
)  # fmt: skip


def make_embedding(arch: Architecture, config: Any) -> nn.Layer:
    """Make the embedding; tensor parallelism splits its rows."""
    if config.tensor_parallel_degree == 1:
        return nn.Embedding(arch.vocab, arch.hidden)
    layer = VocabParallelEmbedding(arch.vocab, arch.hidden)
    set_slice(layer.weight, (arch.vocab, arch.hidden), 0, config)
    return layer


def embed(layer: nn.Layer, ids: Tensor, scale: float, config: Any) -> Tensor:
    """Embed tokens, and under sequence parallelism scatter them over the ranks."""
    x = layer(ids)
    if scale != 1.0:  # rounded to the type of the embeddings first, as in transformers' Gemma
        x = x * paddle.to_tensor(scale, dtype=x.dtype)
    return ScatterOp.apply(x.reshape([-1, x.shape[-1]])) if config.sequence_parallel else x


class LMHead(nn.Layer):
    """The output layer: logits of the next token.

    Args:
        embedding: the weight it shares with the input, [vocabulary, hidden], or None.
    """

    def __init__(self, arch: Architecture, config: Any, embedding: Tensor | None = None) -> None:
        super().__init__()
        self.config, self._arch, self.transposed = config, arch, arch.tied
        self.defers = False  # return DeferredLogits in training, for a loss that computes the logits chunk by chunk
        if embedding is not None:
            self.weight = embedding
            return
        degree, hidden, axis = config.tensor_parallel_degree, arch.hidden, 0 if arch.tied else 1
        part = arch.vocab // degree
        self.weight = self.create_parameter([part, hidden] if arch.tied else [hidden, part])
        if degree > 1:
            set_slice(self.weight, (arch.vocab, hidden) if arch.tied else (hidden, arch.vocab), axis, config)
            self.weight.split_axis = axis

    @property
    def embedding_weight(self) -> Tensor:
        """The weight under the name by which pipeline stages share it."""
        return self.weight

    def forward(self, x: Tensor) -> Any:
        """[batch, tokens, hidden] -> [batch, tokens, vocabulary], or this rank's part of the vocabulary.

        Under sequence parallelism x is [batch x tokens / ranks, hidden].
        """
        arch, config = self._arch, self.config
        if config.sequence_parallel:
            x = GatherOp.apply(x).reshape([-1, config.seq_length, arch.hidden])
        if arch.logit_scale != 1.0:
            x = x * arch.logit_scale
        x, group = copy_to_ranks(x, config), None
        if config.tensor_parallel_degree > 1:
            group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        defers = self.defers and self.training and paddle.is_grad_enabled() and arch.logit_soft_cap is None
        if defers and (group is None or config.tensor_parallel_output) and can_fuse(x, self.weight):
            return DeferredLogits(x, self.weight, self.transposed, group)
        logits = paddle.matmul(x, self.weight, transpose_y=self.transposed)
        if arch.logit_soft_cap is not None:
            logits = arch.logit_soft_cap * paddle.tanh(logits / arch.logit_soft_cap)
        if group is not None and not config.tensor_parallel_output:
            logits = collective._c_concat(logits, group=group)
        return logits


class DecoderModel(nn.Layer):
    """The embedding, the layers and the final norm."""

    def __init__(self, arch: Architecture, config: Any) -> None:
        super().__init__()
        self.embed_tokens = make_embedding(arch, config)
        self.layers = nn.LayerList([DecoderLayer(block, arch, config) for block in arch.blocks])
        self.norm = RMSNorm(arch.hidden, arch.norm_epsilon, config, arch.norm_offset)
        self._scale, self._config = arch.embedding_scale, config

    def forward(
        self, ids: Tensor, context: LayerContext, past: Sequence[KeysAndValues] | None
    ) -> tuple[Tensor, list[KeysAndValues | None]]:
        """int64 [batch, tokens] -> hidden states, and the KV cache of each layer."""
        x = embed(self.embed_tokens, ids, self._scale, self._config)
        presents: list[KeysAndValues | None] = []
        earlier: list[KeysAndValues | None] = list(past) if past is not None else [None] * len(self.layers)
        del past  # so that a layer's old cache is freed as soon as it is copied into the new one
        for i, layer in enumerate(self.layers):
            x, present = layer(x, context, earlier[i])
            earlier[i] = None
            presents.append(present)
        return self.norm(x), presents


class DecoderForCausalLM(PretrainedModel):
    """A causal language model. make_model_class() makes a subclass for each family."""

    family: ClassVar[Family]
    config_class = PretrainedConfig
    _tied_weights_keys = ("lm_head.weight",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        assert self.family.decoder is not None
        arch = self.architecture = self.family.decoder(config)
        self.add_sublayer(arch.prefix, DecoderModel(arch, config))
        self.lm_head = LMHead(arch, config, self.decoder.embed_tokens.weight if arch.tied else None)

    @property
    def decoder(self) -> DecoderModel:
        """The model below the output layer."""
        decoder: DecoderModel = self._sub_layers[self.architecture.prefix]
        return decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        past_key_values: Sequence[KeysAndValues] | None = None,
        attn_mask_startend_row_indices: Tensor | None = None,
    ) -> Any:
        """Compute logits [batch, tokens, vocabulary] (DeferredLogits where the head defers).

        Args:
            input_ids: int64 [batch, tokens].
            position_ids: int64 [batch, tokens]; None: from 0, or after the tokens of `past_key_values`.
            attention_mask: [batch, keys], 1 for text; or [batch, 1, tokens, keys], bool, or floats that are added to
                the scores.
            use_cache: return (logits, KV cache of each layer) for the next call.
            past_key_values: the KV cache of earlier calls.
            attn_mask_startend_row_indices: int32 [batch, keys]: where the example of each key ends, in packed rows.
        """
        earlier = past_key_values[0][0].shape[1] if past_key_values is not None else 0
        batch, tokens = input_ids.shape
        if position_ids is None and past_key_values is not None:
            position_ids = paddle.arange(earlier, earlier + tokens).unsqueeze(0).expand([batch, tokens])
        mask = make_mask(attention_mask, attn_mask_startend_row_indices, flash=self.config.use_flash_attention)
        context = LayerContext(position_ids, mask, tokens, earlier + tokens, use_cache)
        hidden, presents = self.decoder(input_ids, context, past_key_values)
        logits = self.lm_head(hidden)
        return (logits, presents) if use_cache else logits

    def get_input_embeddings(self) -> nn.Layer:
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Layer:
        return self.lm_head

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        use_cache: bool = False,
        past_key_values: Sequence[KeysAndValues] | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The arguments of forward() for the next token (paddlenlp.generation.GenerationMixin calls it)."""
        if position_ids is None:
            position_ids = paddle.arange(input_ids.shape[1]).unsqueeze(0).expand(input_ids.shape)
        if past_key_values and self._outgrows_short_factors(position_ids):
            past_key_values = None
        if past_key_values:
            input_ids, position_ids = input_ids[:, -1:], position_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    def _outgrows_short_factors(self, positions: Tensor) -> bool:
        """Whether a row becomes longer than `longrope` computes with its short factors. Then the keys of earlier tokens
        have to be rotated by other angles, so they are computed again, as in transformers' Phi-3."""
        ropes = (block.attention.rope for block in self.architecture.blocks)
        longrope = next((rope for rope in ropes if rope is not None and rope.kind == "longrope"), None)
        return longrope is not None and bool((positions[:, -1] == get_original_length(longrope)).any())

    def _init_weights(self, layer: nn.Layer) -> None:
        initialize(layer, self.architecture)


def defer_logits(model: nn.Layer) -> None:
    """Have the heads of our decoder return DeferredLogits in training, for a loss that knows them."""
    for layer in model.sublayers():
        if isinstance(layer, LMHead):
            layer.defers = True


def initialize(layer: nn.Layer, arch: Architecture) -> None:
    """Draw the random weights of a layer: normal, output projections scaled by 1 / sqrt(2 x layers).

    The scale is that of GPT-2 (Radford et al., 2019, section 2.3) and of PaddleNLP's Llama.
    """
    if isinstance(layer, (*_LINEAR, LMHead)):
        layer.weight.set_value(paddle.tensor.normal(mean=0.0, std=arch.initializer_range, shape=layer.weight.shape))
        if getattr(layer, "bias", None) is not None:
            layer.bias.set_value(paddle.zeros_like(layer.bias))
    output_projection = getattr(layer, "output_projection", None)  # of attention and MLP
    if output_projection is not None:
        with paddle.no_grad():
            output_projection.weight.scale_(1 / math.sqrt(2 * len(arch.blocks)))
