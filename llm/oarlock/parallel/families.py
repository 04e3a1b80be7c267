"""How PaddleNLP can split each model family, and the sizes of a model that decide where it can be cut.

Read in paddlenlp 3.0.0b4. Pure Python, as the plan that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilySupport:
    """How PaddleNLP can split the models of a family.

    Attributes:
        tensor: its layers use Column/RowParallelLinear.
        pipeline: it has a ForCausalLMPipe class.
        sequence: its layers read config.sequence_parallel (the others ignore it without a word).
    """

    tensor: bool
    pipeline: bool
    sequence: bool


# By model_type. The pipeline classes tie embeddings, where a model ties them, with SharedLayerDesc.
FAMILY_SUPPORT = {
    "llama": FamilySupport(tensor=True, pipeline=True, sequence=True),
    "qwen2": FamilySupport(tensor=True, pipeline=True, sequence=True),
    "gemma": FamilySupport(tensor=True, pipeline=True, sequence=True),
    "chatglm_v2": FamilySupport(tensor=True, pipeline=True, sequence=True),
    "mixtral": FamilySupport(tensor=True, pipeline=False, sequence=True),
    "mistral": FamilySupport(tensor=True, pipeline=False, sequence=False),
    # PaddleNLP's OPTLMHead neither sums the gradient nor gathers the scores: two tensor ranks train another model.
    "opt": FamilySupport(tensor=False, pipeline=False, sequence=False),
    "bloom": FamilySupport(tensor=True, pipeline=False, sequence=False),
    "chatglm": FamilySupport(tensor=True, pipeline=False, sequence=False),
    "glm": FamilySupport(tensor=True, pipeline=False, sequence=False),
    "gptj": FamilySupport(tensor=False, pipeline=False, sequence=False),
}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that decide how it can be split.

    Attributes:
        family: model_type.
        tied: the output layer uses the embedding's weights.
    """

    family: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """Read a PretrainedConfig, or anything with its attributes; the families name them differently."""
        hidden = _first(config, "hidden_size", "n_embd")
        heads = _first(config, "num_attention_heads", "n_head")
        return cls(
            family=config.model_type,
            num_layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
            hidden=hidden,
            intermediate=_first(
                config, "intermediate_size", "ffn_hidden_size", "inner_hidden_size", "n_inner", default=4 * hidden
            ),
            heads=heads,
            kv_heads=_first(config, "num_key_value_heads", "multi_query_group_num", default=heads),
            vocab=_first(config, "vocab_size"),
            # PretrainedConfig says True unless told otherwise; ChatGLMv2 has an output layer of its own all the same.
            tied=bool(getattr(config, "tie_word_embeddings", False)) and config.model_type != "chatglm_v2",
        )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value), default)
    if value is None:
        raise ValueError(f"a model configuration of type {config.model_type} without {names[0]}")
    return value
