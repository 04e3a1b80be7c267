"""The sizes of a model that decide how it can be split and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oarlock.families.registry import FAMILIES

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # by transformers' families


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model, whatever its family calls them.

    Attributes:
        family: model_type.
        tied: the output layer uses the embedding's weights.
        head_dim: size of a head, where it is not hidden / heads.
        experts: of a layer; 0 for a dense model.
        expert_intermediate: width of an expert.
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
    experts: int = 0
    expert_intermediate: int = 0

    @property
    def head_size(self) -> int:
        """Size of a head of queries, keys and values."""
        return self.head_dim or self.hidden // self.heads

    @classmethod
    def from_config(cls, config: Any) -> ModelSizes:
        """Read a PretrainedConfig, or anything with its attributes."""
        hidden = _first(config, "hidden_size", "n_embd")
        heads = _first(config, "num_attention_heads", "n_head")
        family = FAMILIES.get(config.model_type)
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
            # PretrainedConfig says True by default, also for families whose output layer is never tied.
            tied=bool(getattr(config, "tie_word_embeddings", False)) and not (family is not None and family.never_tied),
            experts=_first(config, *EXPERT_COUNTS, default=0),
            expert_intermediate=_first(config, "moe_intermediate_size", "intermediate_size", default=0),
            head_dim=size if (size := getattr(config, "head_dim", None)) != hidden // heads else None,
        )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    values = (getattr(config, name, None) for name in names)
    value = next((value for value in values if value), default)
    if value is None:
        raise ValueError(f"a model configuration of type {config.model_type} without {names[0]}")
    return value
