"""Choose the sizes of a new model: as near as possible to a number of parameters, in a family's proportions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from paddlenlp.transformers import PretrainedConfig

from oarlock.errors import ConfigError, ModelError
from oarlock.families.decoder_weights import count_parameters
from oarlock.families.model_sizes import EXPERT_COUNTS
from oarlock.families.published_sizes import PublishedSize, read_published_sizes
from oarlock.families.registry import find_family, find_hf_config
from oarlock.model_config.load import make_config
from oarlock.model_config.proportions import (
    INTERMEDIATE,
    Proportions,
    derive_fields,
    has_square_attention,
    interpolate_proportions,
)

# Widths from `least` on are multiples of the first number: tensor parallelism of 8 splits them evenly, and matrix
# products are fast.
_MULTIPLES = ((128, 2048), (64, 512), (32, 128), (16, 64), (8, 0))
_LEAST_HEADS = 4  # also of keys, so that tensor parallelism of 4 can split them
_LEAST_HEAD_DIM = 8
_BODIES = (1e2, 1e16)  # parameters without embeddings that are searched
_MAX_TRIED = 7  # values of one size around its proportion
_SPREAD = 1.25
_WRONG = 0.05  # share of the parameters by which a result may differ
# Differences that count 1 when candidates are compared, as logarithms of ratios.
_OF_HEAD_DIM = 0.3  # what another head_dim counts, and one that is no multiple of 16 or of 32
_OF_PARAMETERS, _OF_HIDDEN, _OF_LAYERS, _OF_INTERMEDIATE, _OF_ATTENTION = 0.003, 0.15, 0.2, 0.15, 0.25


@dataclass(frozen=True)
class SizeRequest:
    """The family and the size asked for. Sizes that are None follow the family's published models.

    Attributes:
        family: model_type.
        parameters: their number, embeddings included.
        vocab: rows of the embedding; by default those of the nearest published model.
        layers, hidden, heads, kv_heads, head_dim: as in a configuration.
        intermediate: width of the feed-forward; of an expert in a mixture of experts.
        experts, top_k: of a layer, and of them those that a token uses.
        tied: the output layer has the embedding's weights.
        max_length: longest sequence.
    """

    family: str
    parameters: int
    vocab: int | None = None
    layers: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    experts: int | None = None
    top_k: int | None = None
    tied: bool | None = None
    max_length: int = 4096


@dataclass(frozen=True)
class ChosenSizes:
    """A configuration of the size that was asked for.

    Attributes:
        config: of the model.
        parameters: their exact number.
        like: the published model whose proportions it has.
    """

    config: PretrainedConfig
    parameters: int
    like: str


def choose_sizes(request: SizeRequest) -> ChosenSizes:
    """Choose a configuration for a number of parameters.

    The proportions are those of the two published models that are nearest in size, interpolated. Sizes are rounded, so
    that tensor parallelism of 2, 4 and (for widths) 8 can split them, and the one of many roundings is taken that is
    near to the number and to the proportions.

    Raises:
        ModelError: for sizes that do not fit together.
        ConfigError: when no model of the family has about this number, with the smallest one that can be made.
    """
    return _Search(request).run()


def _find_multiple(width: float) -> int:
    return next(multiple for multiple, least in _MULTIPLES if width >= least)


def _round_width(width: float) -> int:
    return max(1, round(width / _find_multiple(width))) * _find_multiple(width)


def _list_near(value: float, step: int) -> list[int]:
    """The multiples of `step` within _SPREAD of a value, or the nearest one. The nearest come first."""
    low, high = math.ceil(value / _SPREAD / step), math.floor(value * _SPREAD / step)
    found = [i * step for i in range(max(1, low), high + 1)] or [max(1, round(value / step)) * step]
    return sorted(found, key=lambda own: abs(own - value))[:_MAX_TRIED]


class _Search:
    """Finds the proportions with about the right number of parameters, then the best rounded sizes around them."""

    def __init__(self, request: SizeRequest) -> None:
        models = read_published_sizes()
        if request.family not in models:
            find_family(request.family)
            raise ConfigError(
                f"--family {request.family}: there are no published sizes to follow; choose one of {', '.join(models)}"
            )
        self.request, self.models = request, models[request.family]
        self.record, self.words = find_family(request.family), find_hf_config(request.family).fields
        self.latent = "qk_nope_head_dim" in self.words
        self.square = not self.latent and (not self.record.free_head_dim or has_square_attention(self.models))
        self.intermediate = next(name for name in INTERMEDIATE if name in self.words)
        self.experts = next((name for name in EXPERT_COUNTS if name in self.words), "")
        if not self.experts and (request.experts or request.top_k):
            raise ConfigError(f"--experts and --experts-per-token: {request.family} models have no experts")
        if self.latent and request.kv_heads:
            raise ConfigError(f"--kv-heads: every head of {request.family} models has keys of its own")

    def run(self) -> ChosenSizes:
        wanted = self.request.parameters
        least = self._round(self._proportions(_BODIES[0]))
        smallest = self._count_config(self._make_config(least))
        if wanted < smallest * (1 - _WRONG):
            raise ConfigError(
                f"--parameters {wanted:,} is too few: with these flags, the smallest {self.request.family} model has "
                f"{smallest:,}, of which its vocabulary of {least['vocab_size']:,} tokens takes "
                f"{least['vocab_size'] * least['hidden_size']:,}. Choose more parameters or a smaller vocabulary "
                "(--vocab-size, or a --tokenizer with fewer tokens)"
            )
        low, high = map(math.log, _BODIES)
        for _ in range(50):
            middle = (low + high) / 2
            count = self._count(self._round(self._proportions(math.exp(middle))))
            low, high = (middle, high) if count is not None and count <= wanted else (low, middle)
        ideal = self._proportions(math.exp(low))
        usual = bool(ideal.nearest.fields["tie_word_embeddings"])
        candidates: list[tuple[float, int, dict[str, Any]]] = []
        for tied in (usual, not usual) if self.request.tied is None else (self.request.tied,):
            for difference, found in self._list_candidates(ideal, tied):
                if (count := self._count(found)) is not None:
                    of_count = (math.log(count / wanted) / _OF_PARAMETERS) ** 2
                    candidates.append((difference + of_count, count, found))
            if any(abs(count / wanted - 1) < _WRONG / 5 for _, count, _ in candidates):
                break
        if not candidates:
            self._make_config(self._round(ideal))  # raises what is wrong
        _, count, found = min(candidates, key=lambda candidate: candidate[0])
        if abs(count / wanted - 1) > _WRONG:
            raise ConfigError(
                f"--parameters {wanted:,}: with these flags, the nearest {self.request.family} model has {count:,}. "
                "Ask for that number, or change the vocabulary or a size that you gave"
            )
        return ChosenSizes(self._make_config(found), count, ideal.nearest.name)

    @cached_property
    def _bodies(self) -> list[tuple[int, PublishedSize]]:
        """(parameters without embeddings, model) of the published models, from the smallest to the largest."""
        found = []
        for model in self.models:
            config = make_config({"model_type": self.request.family, **self.words, **model.fields}, model.name)
            rows = (1 if model.fields["tie_word_embeddings"] else 2) * model.fields["vocab_size"]
            found.append((self._count_config(config) - rows * model.fields["hidden_size"], model))
        return sorted(found, key=lambda item: item[0])

    def _proportions(self, body: float) -> Proportions:
        return interpolate_proportions(self._bodies, body)

    def _round(self, ideal: Proportions) -> dict[str, Any]:
        """The first choice of sizes for proportions."""
        hidden, heads, head_dim = self._list_frames(ideal)[0]
        tied = ideal.nearest.fields["tie_word_embeddings"] if self.request.tied is None else self.request.tied
        layers = self.request.layers or _list_near(ideal.layers, 1)[0]
        return self._fill(ideal, layers, hidden, heads, head_dim, 1.0, bool(tied))

    def _list_candidates(self, ideal: Proportions, tied: bool) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield (difference from the proportions, fields)."""
        wanted = self.request.parameters
        layers = [self.request.layers or 0]
        if not self.request.layers:
            layers = _list_near(ideal.layers, 2 if ideal.layers > 5 else 1)
        for hidden, heads, head_dim in self._list_frames(ideal):
            strange = (math.log(hidden / ideal.hidden) / _OF_HIDDEN) ** 2
            strange += _OF_HEAD_DIM * ((head_dim != ideal.head_dim) + bool(head_dim % 16) + bool(head_dim % 32))
            strange += (math.log(heads * head_dim / hidden / ideal.attention) / _OF_ATTENTION) ** 2
            for depth in layers:
                own = strange + (math.log(depth / ideal.layers) / _OF_LAYERS) ** 2
                frame = depth, hidden, heads, head_dim
                counts = [self._count(self._fill(ideal, *frame, scale, tied)) for scale in (0.8, 1.2)]
                if counts[0] is None or counts[1] is None:
                    continue
                slope = (counts[1] - counts[0]) / 0.4
                exact = 0.8 + (wanted - counts[0]) / slope if slope else 1.0
                scale = min(max(exact, 1 / _SPREAD), _SPREAD)
                yield own + (math.log(scale) / _OF_INTERMEDIATE) ** 2, self._fill(ideal, *frame, scale, tied)

    def _list_frames(self, ideal: Proportions) -> list[tuple[int, int, int]]:
        """List (hidden size, heads, head_dim), the nearest to the proportions first."""
        request, hidden = self.request, self.request.hidden or ideal.hidden
        dims = [request.head_dim or ideal.head_dim]
        if request.heads and not request.head_dim:
            dims = [_round_width(ideal.attention * hidden / request.heads)]
            if request.hidden and self.square and not request.hidden % request.heads:
                dims = [request.hidden // request.heads]
        elif not request.head_dim and self.square:  # smaller heads in between, for widths in between
            dims += [own for own in range(dims[0] - 8, 0, -8) if 4 * own <= max(32, hidden) and hidden <= 16 * own]
        elif not request.head_dim:
            while ideal.attention * hidden / dims[-1] < 2 * _LEAST_HEADS and dims[-1] // 2 >= _LEAST_HEAD_DIM:
                dims.append(dims[-1] // 2)
        found = set()
        for head_dim in dims:
            for width in self._list_widths(hidden, head_dim):
                fitting = ideal.attention * width / head_dim
                heads = request.heads or max(1, round(fitting / _step_heads(fitting))) * _step_heads(fitting)
                if not self.square or heads * head_dim == width:
                    found.add((width, heads, head_dim))
        if not found:
            raise ConfigError(
                f"--hidden {request.hidden}: the heads of {request.family} models are together as wide as the model, "
                f"which can't be divided into {request.heads or 'a multiple of 4'} heads of "
                f"{' or '.join(map(str, dims))}. Choose another width or number of heads (--heads)"
            )

        def measure(frame: tuple[int, int, int]) -> float:
            width, heads, head_dim = frame
            share = heads * head_dim / width / ideal.attention
            return abs(math.log(width / ideal.hidden)) + abs(math.log(share)) + 0.01 * dims.index(head_dim)

        return sorted(found, key=measure)

    def _list_widths(self, hidden: float, head_dim: int) -> list[int]:
        if self.request.hidden:
            return [self.request.hidden]
        if self.square and self.request.heads:
            return [self.request.heads * head_dim]
        if self.square:
            return _list_near(hidden, head_dim * _step_heads(hidden / head_dim))
        return _list_near(hidden, _find_multiple(hidden))

    def _fill(
        self, ideal: Proportions, layers: int, hidden: int, heads: int, head_dim: int, scale: float, tied: bool
    ) -> dict[str, Any]:
        """Make the fields of a configuration.

        Args:
            scale: factor of the widths of the feed-forward.
        """
        request, published = self.request, ideal.nearest.fields
        found = {**self.words, **published, "num_hidden_layers": layers, "hidden_size": hidden}
        found |= {"num_attention_heads": heads, "tie_word_embeddings": tied}
        found["vocab_size"] = request.vocab or published["vocab_size"]
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            if name in self.words:
                found[name] = request.max_length
        for name, share in ideal.per_hidden.items():
            width = share * hidden * (scale if name in INTERMEDIATE else 1.0)
            found[name] = width if isinstance(self.words[name], float) else _round_width(width)
        if request.intermediate:
            found[self.intermediate] = request.intermediate
        if self.latent:
            found |= {"num_key_value_heads": heads, "qk_nope_head_dim": head_dim}
        else:
            found["num_key_value_heads"] = request.kv_heads or _choose_kv_heads(heads, ideal.group)
            found["head_dim"] = None if hidden == heads * head_dim and self.words["head_dim"] is None else head_dim
        if self.experts:
            found[self.experts] = request.experts or ideal.experts
            found["num_experts_per_tok"] = request.top_k or min(found["num_experts_per_tok"], found[self.experts])
        return derive_fields(found, published)

    def _make_config(self, fields: dict[str, Any]) -> PretrainedConfig:
        return make_config({"model_type": self.request.family, **fields}, f"the new {self.request.family} model")

    def _count(self, fields: dict[str, Any]) -> int | None:
        """Count the parameters of a model; None for sizes that do not fit together."""
        try:
            return self._count_config(self._make_config(fields))
        except ModelError:
            return None

    def _count_config(self, config: PretrainedConfig) -> int:
        assert self.record.decoder is not None
        return count_parameters(self.record.decoder(config))


def _step_heads(fitting: float) -> int:
    """Numbers of heads are multiples of this."""
    return _LEAST_HEADS * (2 if fitting >= 4 * _LEAST_HEADS else 1)


def _choose_kv_heads(heads: int, group: float) -> int:
    """The number of heads of keys that is nearest to heads / group, and that tensor parallelism can split."""
    fitting = [own for own in range(1, heads + 1) if heads % own == 0 and own >= min(heads, _LEAST_HEADS)]
    splittable = [own for own in fitting if own % _LEAST_HEADS == 0] or fitting
    return min(splittable, key=lambda own: abs(math.log(own * group / heads)))
