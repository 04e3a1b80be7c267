"""How PaddleNLP can split each model family, and the sizes of a model that decide where it can be cut.

Read in paddlenlp 3.0.0b4. Pure Python, as the plan that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What PaddleNLP can do with the models of a family, and where their parts are.

    Attributes:
        model: the class of its causal language models; its pipeline class is called the same with Pipe at the end.
        tensor: its layers use Column/RowParallelLinear, and train the same model as one card.
        pipeline: it has a ForCausalLMPipe class.
        sequence: its layers read config.sequence_parallel (the others ignore it without a word).
        lora_targets: last parts of the names of the linear layers that LoRA goes beside: all but the output head.
        past: axes of a layer's keys and values as the attention takes them from an earlier call, from "batch",
            "token" and "head" (the size of a head is last); empty where prefix tuning can't give them.
        after_prefix: the positions of the text go on after those of a prefix (elsewhere they start at 0 all the same).
        gated: its feed-forward has three matrices (a gate beside the other two), for the count of operations.
        hugging_face: weights in Hugging Face's format can be read.
        inputs: what its forward has to be given beside ids; see oarlock.families.forward.
        why_not: a sentence for what a user may expect it to have: attribute -> reason.
    """

    model: str
    tensor: bool
    pipeline: bool
    sequence: bool
    lora_targets: tuple[str, ...]
    past: tuple[str, ...] = ()
    after_prefix: bool = False
    gated: bool = True
    hugging_face: bool = True
    inputs: str = ""
    why_not: Mapping[str, str] = field(default_factory=dict)

    def lacks(self, name: str, way: str, needs: str) -> str:
        """Why the family called `name` has not got `way`, as the rest of a sentence.

        Args:
            way: an attribute that is False or empty.
            needs: what PaddleNLP would have to have, where there is no better reason.
        """
        if way in self.why_not:
            return f"{name} has none: {self.why_not[way]}"
        others = ", ".join(family for family, support in FAMILIES.items() if getattr(support, way))
        return f"PaddleNLP has no {needs} for {name} (it has for {others})"


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("qkv_proj", "gate_up_fused_proj")  # --fuse_attention_qkv and --fuse_attention_ffn
_MEGATRON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_BATCH_FIRST, _TOKEN_FIRST = ("batch", "token", "head"), ("token", "batch", "head")
_HEADS_BEFORE_TOKENS = ("batch", "head", "token")
_NO_NAMES = "PaddleNLP does not know its names there (convert the weights to Paddle's format first)"

# Linear layers that tensor parallel cuts along their input, by the last part of their names; all others that it cuts
# are cut along their output.
ROW_PARALLEL = frozenset(
    {"o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h", "linear2", "fc_out", "w2", "project_out"}
)

# By model_type. The pipeline classes tie embeddings, where a model ties them, with SharedLayerDesc. PaddleNLP's own
# lists of LoRA targets (trl/llm_utils.py) lack GLM, GPT-J and Gemma, and give Mistral the names of Mixtral's experts.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", True, True, True, (*_ATTENTION, *_GATED, *_FUSED), _BATCH_FIRST),
    "qwen2": Family("Qwen2ForCausalLM", True, True, True, (*_ATTENTION, *_GATED, *_FUSED), _BATCH_FIRST),
    "mistral": Family("MistralForCausalLM", True, False, False, (*_ATTENTION, *_GATED), _HEADS_BEFORE_TOKENS),
    "gemma": Family(
        "GemmaForCausalLM",
        True,
        True,
        False,
        (*_ATTENTION, *_GATED, *_FUSED),
        _BATCH_FIRST,
        why_not={"sequence": "PaddleNLP's GemmaModel takes the size of embeddings that it has not made yet"},
    ),
    "opt": Family(
        "OPTForCausalLM",
        False,
        False,
        False,
        ("project_in", "project_out", "q_proj", "k_proj", "v_proj", "qkv_proj", "out_proj", "linear1", "linear2"),
        _HEADS_BEFORE_TOKENS,
        after_prefix=True,
        gated=False,
        inputs="opt",
        why_not={
            "tensor": "PaddleNLP's OPTLMHead neither sums its input's gradient over the ranks nor gathers the scores, "
            "so that two ranks would train another model",
        },
    ),
    "bloom": Family("BloomForCausalLM", True, False, False, _MEGATRON, _BATCH_FIRST, after_prefix=True, gated=False),
    "chatglm": Family(
        "ChatGLMForCausalLM",
        True,
        False,
        False,
        _MEGATRON,
        _TOKEN_FIRST,
        gated=False,
        hugging_face=False,
        inputs="chatglm",
        why_not={"hugging_face": _NO_NAMES},
    ),
    "chatglm_v2": Family("ChatGLMv2ForCausalLM", True, True, True, _MEGATRON, _TOKEN_FIRST, inputs="chatglm_v2"),
    "glm": Family(
        "GLMForConditionalGeneration",
        True,
        False,
        False,
        _MEGATRON,
        gated=False,
        hugging_face=False,
        inputs="glm",
        why_not={
            "past": "its layers remember hidden states, not keys and values",
            "hugging_face": "its converter in PaddleNLP 3.0.0b4 imports a function that is gone",
        },
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        False,
        False,
        False,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        gated=False,
        inputs="gptj",
        why_not={
            "past": "PaddleNLP's GPT-J counts positions from the padding on, so that a prefix would lie at another "
            "distance in every row of a batch",
        },
    ),
}


# Families that PaddleNLP has and that can't be run: reason.
BROKEN = {
    "mixtral": "PaddleNLP 3.0.0b4's MixtralSparseMoeBlock fails in its forward pass under Paddle 3.3, whose "
    "paddle.where gives flat indices",
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
            # PretrainedConfig says True unless told otherwise; this one has an output layer of its own all the same.
            tied=bool(getattr(config, "tie_word_embeddings", False)) and config.model_type != "chatglm_v2",
            head_dim=size if (size := getattr(config, "head_dim", None)) != hidden // heads else None,
        )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value), default)
    if value is None:
        raise ValueError(f"a model configuration of type {config.model_type} without {names[0]}")
    return value


def families_table() -> str:
    """The registry in Markdown: what each family has, and below it why not, where something may be expected."""
    heads = ("family", "LoRA", "prefix", "p-tuning", "tensor parallel", "pipeline", "sequence parallel", "Hugging Face")
    rows = [heads, tuple("---" for _ in heads)]
    notes: list[str] = []

    def number(reason: str) -> int:
        if reason not in notes:
            notes.append(reason)
        return notes.index(reason) + 1

    for name, family in FAMILIES.items():
        cells = [name, "yes"]  # LoRA and p-tuning need nothing of a family
        for way in ("past", "p_tuning", "tensor", "pipeline", "sequence", "hugging_face"):
            if way in family.why_not:
                cells.append(f"no ({number(family.why_not[way])})")
            else:
                cells.append("yes" if getattr(family, way, True) else "no")
        rows.append(tuple(cells))
    rows += [(name, *[f"no ({number(reason)})"] * (len(heads) - 1)) for name, reason in BROKEN.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    numbered = [f"{i}. {note[0].upper()}{note[1:]}." for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *numbered])
