"""How PaddleNLP can split each model family, and the sizes of a model that decide where it can be cut.

Read in paddlenlp 3.0.0b4. Pure Python, as the plan that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """What PaddleNLP can do with the models of a family, and where their parts are.

    Attributes:
        tensor: its layers use Column/RowParallelLinear.
        pipeline: it has a ForCausalLMPipe class.
        sequence: its layers read config.sequence_parallel (the others ignore it without a word).
        lora_targets: last parts of the names of the linear layers that LoRA goes beside: all but the output head.
        past: axes of a layer's keys and values as the attention takes them from an earlier call, from "batch",
            "token" and "head" (the size of a head is last); empty where they can't be given.
    """

    tensor: bool
    pipeline: bool
    sequence: bool
    lora_targets: tuple[str, ...]
    past: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("qkv_proj", "gate_up_fused_proj")  # --fuse_attention_qkv and --fuse_attention_ffn
_MEGATRON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_BATCH_FIRST, _TOKEN_FIRST = ("batch", "token", "head"), ("token", "batch", "head")
_HEADS_BEFORE_TOKENS = ("batch", "head", "token")

# Linear layers that tensor parallel cuts along their input, by the last part of their names; all others that it cuts
# are cut along their output.
ROW_PARALLEL = frozenset(
    {"o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h", "linear2", "fc_out", "w2", "project_out"}
)

# By model_type. The pipeline classes tie embeddings, where a model ties them, with SharedLayerDesc. PaddleNLP's own
# lists of LoRA targets (trl/llm_utils.py) lack GLM, GPT-J and Gemma, and give Mistral the names of Mixtral's experts.
FAMILIES = {
    "llama": Family(True, True, True, (*_ATTENTION, *_GATED, *_FUSED), _BATCH_FIRST),
    "qwen2": Family(True, True, True, (*_ATTENTION, *_GATED, *_FUSED), _BATCH_FIRST),
    "gemma": Family(True, True, True, (*_ATTENTION, *_GATED, *_FUSED), _BATCH_FIRST),
    "chatglm_v2": Family(True, True, True, _MEGATRON, _TOKEN_FIRST),
    "mixtral": Family(True, False, True, (*_ATTENTION, "w1", "w2", "w3"), _BATCH_FIRST),
    "mistral": Family(True, False, False, (*_ATTENTION, *_GATED), _HEADS_BEFORE_TOKENS),
    # PaddleNLP's OPTLMHead neither sums the gradient nor gathers the scores: two tensor ranks train another model.
    "opt": Family(
        False,
        False,
        False,
        ("project_in", "project_out", "q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj", "linear1", "linear2"),
    ),
    "bloom": Family(True, False, False, _MEGATRON, _BATCH_FIRST),
    "chatglm": Family(True, False, False, _MEGATRON, _TOKEN_FIRST),
    "glm": Family(True, False, False, _MEGATRON),
    "gptj": Family(False, False, False, ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that decide how it can be split.

    Attributes:
        family: model_type.
        tied: the output layer uses the embedding's weights.
        head_dim: size of a head, where it is not hidden / heads.
    """

    family: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    head_dim: int | None = None

    @property
    def head_size(self) -> int:
        """Of queries, keys and values."""
        return self.head_dim or self.hidden // self.heads

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
            head_dim=size if (size := getattr(config, "head_dim", None)) != hidden // heads else None,
        )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value), default)
    if value is None:
        raise ValueError(f"a model configuration of type {config.model_type} without {names[0]}")
    return value
