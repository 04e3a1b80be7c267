"""The causal language model as a list of layers, which Fleet divides into pipeline stages."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import LayerDesc, PipelineLayer, SharedLayerDesc
from paddlenlp.transformers import PretrainedConfig
from paddlenlp.transformers.model_utils import PipelinePretrainedModel

from oarlock.decoder.attention import ForwardContext
from oarlock.decoder.block import DecoderLayer
from oarlock.decoder.model import LMHead, embed, initialize, make_embedding
from oarlock.decoder.norm import RMSNorm
from oarlock.families.architecture import Architecture, DecoderBlock
from oarlock.families.family import Family
from oarlock.ops.attention import make_mask
from oarlock.typing import Tensor

# What stages pass on: the hidden states, then the ends (int32) and positions (int64) of packed or padded rows.
Passed = Tensor | tuple[Tensor, ...]
_SHARED = "oarlock_shared_embedding"
_INPUTS = ("input_ids", "attention_mask", "attn_mask_startend_row_indices", "position_ids")


class EmbeddingStage(nn.Layer):
    """The first layer of the list."""

    def __init__(self, model: Architecture, config: Any) -> None:
        super().__init__()
        self.embed_tokens = make_embedding(model, config)
        self._model, self._config = model, config

    @property
    def embedding_weight(self) -> Tensor:
        """The weight under the name by which stages share it."""
        return self.embed_tokens.weight

    def forward(self, inputs: Any) -> Passed:
        """Ids [batch, tokens], or a tuple of _INPUTS with None for what is not given."""
        ids, attention_mask, ends, positions = inputs if isinstance(inputs, tuple) else (inputs, None, None, None)
        x = embed(self.embed_tokens, ids, self._model.embedding_scale, self._config)
        mask = make_mask(attention_mask, ends, flash=False)
        if mask.seen is not None:
            raise ValueError("a pipeline takes a mask [batch, tokens] or the ends of packed examples")
        others = [tensor for tensor in (mask.ends, positions) if tensor is not None]
        for tensor in others:
            tensor.stop_gradient = True
        return (x, *others) if others else x


class DecoderLayerStage(DecoderLayer):
    """A decoder layer that takes and returns what stages pass on."""

    def forward(self, passed: Passed) -> Passed:  # type: ignore[override]
        """Run the layer on the hidden states; ends and positions are passed on."""
        x, *others = passed if isinstance(passed, tuple) else (passed,)
        ends = next((tensor for tensor in others if tensor.dtype == paddle.int32), None)
        positions = next((tensor for tensor in others if tensor.dtype == paddle.int64), None)
        tokens = self.config.seq_length if self.config.sequence_parallel else x.shape[1]
        mask = make_mask(None, ends, flash=self.config.use_flash_attention)
        x, _ = super().forward(x, ForwardContext(positions, mask, tokens, tokens))
        return (x, *others) if others else x


class NormStage(nn.Layer):
    """The last norm, after which ends and positions are not needed."""

    def __init__(self, model: Architecture, config: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(model.hidden, model.norm_epsilon, config, model.norm_offset)

    def forward(self, passed: Passed) -> Tensor:
        """Norm the hidden states."""
        return self.norm(passed[0] if isinstance(passed, tuple) else passed)


class DecoderForCausalLMPipe(PipelinePretrainedModel, PipelineLayer):
    """A rank's pipeline stage. make_model_class() makes a subclass for each family."""

    family: ClassVar[Family]
    config_class = PretrainedConfig
    _tied_weights_keys = ("lm_head.weight",)

    def __init__(self, config: Any) -> None:
        assert self.family.decoder is not None
        self.config, self.architecture = config, self.family.decoder(config)
        model, topology = self.architecture, fleet.get_hybrid_communicate_group().topology()
        self._add(EmbeddingStage, model.prefix, model=model, shared=model.tied)
        for i, block in enumerate(model.blocks):
            self._add(DecoderLayerStage, f"{model.prefix}.layers.{i}", spec=block, model=model)
        self._add(NormStage, model.prefix, model=model)
        self._add(LMHead, "lm_head", model=model, shared=model.tied)
        divides = len(model.blocks) % topology.get_dim_size("pipe") == 0
        PipelineLayer.__init__(
            self,
            layers=self.get_sequential_layers(),
            loss_fn=nn.CrossEntropyLoss(),  # replaced by the trainer's
            topology=topology,
            seg_method=f"layer:{DecoderLayer.__name__}" if divides else "uniform",
            recompute_interval=0,  # layers recompute themselves
            num_virtual_pipeline_stages=config.virtual_pp_degree,
        )
        self.apply(self._init_weights)  # PretrainedModel's constructor, which would do so, does not run

    def _add(
        self, layer: type[nn.Layer], name: str, *, shared: bool = False, **arguments: DecoderBlock | Architecture
    ) -> None:
        if shared:
            described = SharedLayerDesc(
                _SHARED, layer, shared_weight_attr="embedding_weight", config=self.config, **arguments
            )
        else:
            described = LayerDesc(layer, config=self.config, **arguments)
        self.add_sequential_layer(described, name)

    def _init_weights(self, layer: nn.Layer) -> None:
        initialize(layer, self.architecture)

    @classmethod
    def _prepare_pipeline_inputs_func(cls, inputs: Any) -> list[Any]:
        """Divide a batch, or a list of micro-batches, into the inputs of the first stage and the labels of the last."""
        if not isinstance(inputs, dict):
            inputs = {key: [batch[key] for batch in inputs] for key in inputs[0]}
        return [tuple(inputs.get(name) for name in _INPUTS), inputs.get("labels")]
