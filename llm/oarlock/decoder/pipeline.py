"""The causal language model as a list of layers, which Fleet divides into pipeline stages."""

from __future__ import annotations

from typing import Any, ClassVar

import paddle
from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import LayerDesc, PipelineLayer, SharedLayerDesc
from paddlenlp.transformers import PretrainedConfig
from paddlenlp.transformers.model_utils import PipelinePretrainedModel

from oarlock.decoder.attention import LayerContext
from oarlock.decoder.block import DecoderLayer
from oarlock.decoder.model import LMHead, embed, initialize, make_embedding
from oarlock.decoder.norm import RMSNorm
from oarlock.families.architecture import Architecture, DecoderBlock
from oarlock.families.family import Family
from oarlock.ops.attention import make_mask
from oarlock.typing import Tensor

# What a layer of the list passes to the next: hidden states, and for packed or padded rows the ends of examples (int32)
# and positions (int64).
StageOutput = Tensor | tuple[Tensor, ...]
_SHARED = "oarlock_shared_embedding"
_INPUTS = ("input_ids", "attention_mask", "attn_mask_startend_row_indices", "position_ids")


class EmbeddingStage(nn.Layer):
    """The first layer of the list."""

    def __init__(self, arch: Architecture, config: Any) -> None:
        super().__init__()
        self.embed_tokens = make_embedding(arch, config)
        self._arch, self._config = arch, config

    @property
    def embedding_weight(self) -> Tensor:
        """The weight under the name by which stages share it."""
        return self.embed_tokens.weight

    def forward(self, inputs: Any) -> StageOutput:
        """Ids [batch, tokens], or a tuple of _INPUTS with None for missing ones."""
        ids, attention_mask, ends, positions = inputs if isinstance(inputs, tuple) else (inputs, None, None, None)
        x = embed(self.embed_tokens, ids, self._arch.embedding_scale, self._config)
        mask = make_mask(attention_mask, ends, flash=False)
        if mask.dense is not None:
            raise ValueError("a pipeline takes a mask [batch, tokens] or the ends of packed examples")
        others = [tensor for tensor in (mask.ends, positions) if tensor is not None]
        for tensor in others:
            tensor.stop_gradient = True
        return (x, *others) if others else x


class DecoderLayerStage(DecoderLayer):
    """A decoder layer that passes on the ends and positions."""

    def forward(self, inputs: StageOutput) -> StageOutput:  # type: ignore[override]
        """Run the layer on the hidden states."""
        x, *others = inputs if isinstance(inputs, tuple) else (inputs,)
        # Fleet clears the tensors that a stage has sent, but recomputation needs them again: hence the references.
        kept = [tensor.detach() for tensor in others]
        ends = next((tensor for tensor in kept if tensor.dtype == paddle.int32), None)
        positions = next((tensor for tensor in kept if tensor.dtype == paddle.int64), None)
        tokens = self.config.seq_length if self.config.sequence_parallel else x.shape[1]
        mask = make_mask(None, ends, flash=self.config.use_flash_attention)
        x, _ = super().forward(x, LayerContext(positions, mask, tokens, tokens))
        return (x, *others) if others else x


class NormStage(nn.Layer):
    """The final norm. The output layer needs no ends and positions."""

    def __init__(self, arch: Architecture, config: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(arch.hidden, arch.norm_epsilon, config, arch.norm_offset)

    def forward(self, inputs: StageOutput) -> Tensor:
        """Norm the hidden states."""
        return self.norm(inputs[0] if isinstance(inputs, tuple) else inputs)


class DecoderForCausalLMPipe(PipelinePretrainedModel, PipelineLayer):
    """A rank's pipeline stage. make_model_class() makes a subclass for each family."""

    family: ClassVar[Family]
    config_class = PretrainedConfig
    _tied_weights_keys = ("lm_head.weight",)

    def __init__(self, config: Any) -> None:
        assert self.family.decoder is not None
        self.config, self.architecture = config, self.family.decoder(config)
        arch, topology = self.architecture, fleet.get_hybrid_communicate_group().topology()
        self._add(EmbeddingStage, arch.prefix, arch=arch, shared=arch.tied)
        for i, block in enumerate(arch.blocks):
            self._add(DecoderLayerStage, f"{arch.prefix}.layers.{i}", spec=block, arch=arch)
        self._add(NormStage, arch.prefix, arch=arch)
        self._add(LMHead, "lm_head", arch=arch, shared=arch.tied)
        divides = len(arch.blocks) % topology.get_dim_size("pipe") == 0
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
