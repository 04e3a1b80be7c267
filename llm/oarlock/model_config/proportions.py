"""The proportions of a family's models at any size, interpolated between its published ones."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oarlock.families.model_sizes import EXPERT_COUNTS
from oarlock.families.published_sizes import PublishedSize

INTERMEDIATE = ("moe_intermediate_size", "intermediate_size", "shared_expert_intermediate_size")
_WITH_WIDTH = (*INTERMEDIATE, "kv_lora_rank", "q_lora_rank", "logits_scaling")
_LATENT_HEAD = "qk_nope_head_dim"


@dataclass(frozen=True)
class Proportions:
    """A model's sizes before they are rounded.

    Attributes:
        layers, hidden: depth and width.
        attention: heads * head_dim / hidden.
        group: heads that share a head of keys.
        head_dim: size of a head (of its part without positions in latent attention).
        per_hidden: field -> its share of the hidden size.
        experts: of a layer; 0 without.
        nearest: the published model that other fields are taken from.
    """

    layers: float
    hidden: float
    attention: float
    group: float
    head_dim: int
    per_hidden: Mapping[str, float]
    experts: int
    nearest: PublishedSize


def read_head_dim(fields: Mapping[str, Any]) -> int:
    """Read the size of a head from the fields of a configuration."""
    plain = fields["hidden_size"] // fields["num_attention_heads"]
    return int(fields.get(_LATENT_HEAD) or fields.get("head_dim") or plain)


def has_square_attention(models: Sequence[PublishedSize]) -> bool:
    """Whether the heads are as wide as the model in all published models of a family."""
    return all(
        read_head_dim(model.fields) * model.fields["num_attention_heads"] == model.fields["hidden_size"]
        for model in models
    )


def interpolate_proportions(models: Sequence[tuple[int, PublishedSize]], body: float) -> Proportions:
    """Interpolate the proportions of a model by the logarithm of its parameters without embeddings.

    Beyond the smallest and the largest model, depth and width grow alike, so that all proportions stay.

    Args:
        models: (parameters without embeddings, model), by that number.
        body: parameters without embeddings.
    """
    bodies = [own for own, _ in models]
    after = bisect.bisect_left(bodies, body)
    if after in (0, len(models)):
        own, model = models[min(after, len(models) - 1)]
        growth = (body / own) ** (1 / 3)
        return _measure(model.fields, model, growth)
    (low, below), (high, above) = models[after - 1], models[after]
    weight = math.log(body / low) / math.log(high / low)
    nearest = below if weight < 0.5 else above

    def blend(read: Callable[[Proportions], float]) -> float:
        first, second = (read(_measure(model.fields, model, 1.0)) for model in (below, above))
        return math.exp((1 - weight) * math.log(first) + weight * math.log(second))

    of_nearest = _measure(nearest.fields, nearest, 1.0)
    shared = [name for name in of_nearest.per_hidden if all(model.fields.get(name) for model in (below, above))]
    return Proportions(
        layers=blend(lambda found: found.layers),
        hidden=blend(lambda found: found.hidden),
        attention=blend(lambda found: found.attention),
        group=blend(lambda found: found.group),
        head_dim=of_nearest.head_dim,
        per_hidden={
            **of_nearest.per_hidden,
            **{name: blend(lambda found, name=name: found.per_hidden[name]) for name in shared},  # type: ignore[misc]
        },
        experts=round(blend(lambda found: found.experts) / 8) * 8 if of_nearest.experts else 0,
        nearest=nearest,
    )


def _measure(fields: Mapping[str, Any], model: PublishedSize, growth: float) -> Proportions:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    return Proportions(
        layers=fields["num_hidden_layers"] * growth,
        hidden=hidden * growth,
        attention=heads * read_head_dim(fields) / hidden,
        group=heads / fields["num_key_value_heads"],
        head_dim=read_head_dim(fields),
        per_hidden={name: fields[name] / hidden for name in _WITH_WIDTH if fields.get(name)},
        experts=next((fields[name] for name in EXPERT_COUNTS if fields.get(name)), 0),
        nearest=model,
    )


def derive_fields(found: dict[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """Set the fields that follow from the sizes.

    Args:
        found: fields of the new model, with its sizes. Fields of the published one are there too.
        published: fields of the published one.
    """
    head = read_head_dim(found)
    if _LATENT_HEAD in found:
        share = head / published[_LATENT_HEAD]
        rope, value = (round(share * published[name] / 2) * 2 for name in ("qk_rope_head_dim", "v_head_dim"))
        found |= {"qk_rope_head_dim": max(2, rope), "v_head_dim": max(2, value)}
    if "query_pre_attn_scalar" in found:
        found["query_pre_attn_scalar"] = head
    if "attention_multiplier" in published:  # maximal update parametrization divides scores by the size of a head
        found["attention_multiplier"] = 1 / head
    if found.get("first_k_dense_replace"):
        layers = found["num_hidden_layers"]
        dense = round(published["first_k_dense_replace"] * layers / published["num_hidden_layers"])
        found["first_k_dense_replace"] = min(max(1, dense), layers - 1)
    experts = next((found[name] for name in EXPERT_COUNTS if found.get(name)), None)
    if experts and found.get("n_group"):
        found["n_group"] = math.gcd(found["n_group"], experts)
        found["topk_group"] = min(found["topk_group"], found["n_group"])
    return found
