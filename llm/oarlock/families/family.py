"""The record of a model family: what its models can do and where they differ (PaddleNLP's as of 3.0.0b4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from oarlock.families.architecture import Architecture
from oarlock.families.rope import SCALED_ROTARY


@dataclass(frozen=True)
class HFConfig:
    """Maps transformers' configuration of a family to ours: PaddleNLP's, or DecoderConfig's, which has the same names.

    Read in transformers 4.55 and 5.x. tests/parity/test_config_fields.py changes every field that transformers declares
    and compares the logits.

    Attributes:
        fields: transformers' name -> its default. PaddleNLP uses the same name unless `paddle_names` has another.
        paddle_names: transformers' name -> PaddleNLP's.
        aliases: older names in transformers -> the present ones.
        supported: transformers' name -> the values our model computes with. The first one is written.
        required: PaddleNLP's name -> the one value transformers' model computes with.
        unread: names that PaddleNLP's class accepts and its model ignores -> the values that change nothing.
        ignored: names on either side that do not affect the logits.
        dropouts: dropouts that our model does not have.
        equal: transformers' name -> the name of a field that must have the same value.
        activation: transformers' name of the activation, where our model reads it.
        gelu_is_approximate: "gelu" in published files means the tanh approximation, unless hidden_activation says
            otherwise.
        rotary: the configuration has the base of rotary embeddings.
        scaled_rotary: kinds of scaling of rotary embeddings (Rope.kind). With "ntk" among them, PaddleNLP's
            configuration has fields for linear, dynamic and ntk, which its model computes.
        rope_theta: the base where a file has none.
        partial_rotary_factor: rotated share of a head where a file has none; None: the whole head, always.
        local_theta: the field with the base of sliding layers, where they have another one.
    """

    fields: Mapping[str, Any]
    paddle_names: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    dropouts: frozenset[str] = frozenset()
    equal: Mapping[str, str] = field(default_factory=dict)
    activation: str = ""
    gelu_is_approximate: bool = False
    rotary: bool = True
    scaled_rotary: frozenset[str] = SCALED_ROTARY
    rope_theta: float = 10000.0
    partial_rotary_factor: float | None = None
    local_theta: str = ""


@dataclass(frozen=True)
class HFName:
    """A weight's name in Hugging Face's files and in PaddleNLP's model. ".N." stands for the number of a layer."""

    hf: str
    paddle: str
    transposed: bool = False


@dataclass(frozen=True)
class PublishedName:
    """A model_type under which published files contain a family that has another name here.

    Attributes:
        field: that only this family's config.json has.
        class_prefix: of the architectures in such files.
    """

    model_type: str
    field: str
    class_prefix: str


# What a family's forward needs besides ids: a key of oarlock.models.forward.
Forward = Literal["", "pairs_of_positions", "cache_flag", "explicit_mask", "no_position_ids"]


@dataclass(frozen=True)
class Family:
    """The models of a family: what they support, and where they differ from others.

    Attributes:
        name: its model_type.
        architecture: the class of its causal language models. Its pipeline class has the same name with Pipe appended.
        tensor_parallel: its layers use Column/RowParallelLinear, and two ranks train the same model as one.
        pipeline: it has a ForCausalLMPipe class.
        sequence_parallel: its layers read config.sequence_parallel; those of other families ignore it silently.
        lora_targets: last components of the names of the linear layers that get LoRA, all but the output layer.
        kv_axes: order of "batch", "token" and "head" in the keys and values a layer accepts (the size of a head is
            last). Empty where prefix tuning can't pass any.
        positions_follow_prefix: text positions continue after a trained prefix; elsewhere they start at 0.
        why_not: attribute -> the reason why the family lacks it.
        published_as: another name in published files.
        gated_mlp: the feed-forward has a third, gating matrix.
        free_head_dim: the size of a head is a field of its own, not hidden size / heads.
        head_size_multiple: what the size of a head has to be divisible by.
        never_tied: the output layer never shares the embedding's weights, whatever tie_word_embeddings says.
        layer_masks: every layer precomputes a causal mask for max_position_embeddings.
        sliding_window: which layers look back over `sliding_window` tokens only (PaddleNLP's fields for it).
        untied_heads: (output layer, embedding) in the names of either layout, where a folder may store both.
        tied_parameters: (output layer, embedding) by attribute path, where PaddleNLP does not tie them itself.
        linear_init_is_wrong: PaddleNLP's _init_weights zeroes the weight of linear layers that have a bias.
        builtin_configs: PaddleNLP carries configurations of published models in its code.
        paddlenlp_tokenizer: the class that reads its tokenizer, where no tokenizer.json expresses it.
        hf_config: how its configuration maps to transformers'. None where transformers has no such model.
        hf_weights: PaddleNLP can read weights in Hugging Face's format.
        hf_names: all weights, where PaddleNLP's own table of names is incomplete.
        hf_untied_names: those of a model whose output layer is not tied.
        hf_prefix: the first component of names, which some published files leave out.
        hf_resplits_text: transformers 5 splits text its own way, whatever tokenizer.json says.
        paddle_values: fields that PaddleNLP's model does not read -> the values it computes with (without hf_config).
        decoder: makes its architecture from a configuration: it runs in our decoder. None: in PaddleNLP's model.
        own_config: its configuration class is ours, with transformers' fields. Else it is PaddleNLP's.
        forward: what its forward needs besides ids.
        counts_padding: positions are columns of the batch, padding included.
        packing: PaddleNLP's model keeps packed examples apart by a mask [batch, tokens, tokens] and position ids. (Our
            decoder always does.)
        takes_position_ids: a static graph has position ids as an input; else the model derives them.
        graph_change: what has to change before Paddle can translate the model: a key of oarlock.export.static_graph.
        servers: that can run an export in Hugging Face's layout.
        server_notes: server -> what to know about this family there.
    """

    name: str
    architecture: str
    tensor_parallel: bool
    pipeline: bool
    sequence_parallel: bool
    lora_targets: tuple[str, ...]
    kv_axes: tuple[str, ...] = ()
    positions_follow_prefix: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict)
    published_as: PublishedName | None = None
    # sizes and structure
    gated_mlp: bool = True
    free_head_dim: bool = False
    head_size_multiple: int = 1
    never_tied: bool = False
    layer_masks: bool = False
    sliding_window: Literal["", "all_layers", "upper_layers"] = ""
    # weights
    untied_heads: tuple[tuple[str, str], ...] = ()
    tied_parameters: tuple[str, str] | None = None
    linear_init_is_wrong: bool = False
    # files
    builtin_configs: bool = False
    paddlenlp_tokenizer: str = ""
    hf_config: HFConfig | None = None
    hf_weights: bool = True
    hf_names: tuple[HFName, ...] = ()
    hf_untied_names: tuple[HFName, ...] = ()
    hf_prefix: str = ""
    hf_resplits_text: bool = False
    paddle_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # computation
    decoder: Callable[[Any], Architecture] | None = None
    own_config: bool = False
    forward: Forward = ""
    counts_padding: bool = False
    packing: bool = False
    # export
    takes_position_ids: bool = True
    graph_change: Literal["", "bloom_mask", "opt_mask", "chatglm_rotary"] = ""
    servers: frozenset[str] = frozenset()
    server_notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def class_prefix(self) -> str:
        """The first part of the names of its classes in PaddleNLP ("Llama", "ChatGLMv2")."""
        return self.architecture.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
