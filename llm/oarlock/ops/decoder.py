"""A Llama-like decoder in one operator for inference (custom_ops/decoder). Float32 on the CPU.

It runs new tokens of several sequences in one batch, each with its own KV cache. Results have the same bits for every
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from oarlock.ops import library
from oarlock.typing import Tensor

PANEL, KEY_BLOCK = 32, 16  # as in custom_ops/decoder/decoder.h
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes and constants of a model.

    Attributes:
        epsilon: of the norms.
        activation: of the gate, one of ACTIVATIONS.
        norms: which norms a layer has: before and after the attention, before and after the MLP.
        qk_norm: RMSNorm of queries and keys, as in oarlock.families.architecture.Attention.
        output_bias, mlp_bias: which projections have biases, besides those of queries, keys and values.
        rotary_dim: rotated components of a head; 0 for all.
        interleaved: components 2i and 2i + 1 are rotated together.
        embedding_scale, residual_scale, logit_scale: factors, as in the architecture.
        score_scale: of the attention scores; None for 1 / sqrt(head_dim).
        score_cap, logit_cap: soft caps; None for none.
        windows: sliding window of each layer, 0 for none. Empty: no layer has one.
        tables: index of each layer's pair of cos and sin, -1 for no rotary embedding. Empty: all have the first pair.
    """

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    activation: str = "silu"
    norms: tuple[bool, bool, bool, bool] = (True, False, True, False)
    qk_norm: Literal["", "head", "all_heads"] = ""
    output_bias: bool = False
    mlp_bias: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    score_scale: float | None = None
    score_cap: float | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    windows: tuple[int, ...] = ()
    tables: tuple[int, ...] = ()

    def attributes(self) -> tuple[list[int], list[float], list[int], list[int]]:
        """Return sizes, factors, windows and tables in the order of the operator."""
        sizes = [
            self.hidden, self.intermediate, self.num_layers, self.num_heads, self.num_key_value_heads, self.head_dim,
            self.vocabulary, ACTIVATIONS.index(self.activation), sum(has << i for i, has in enumerate(self.norms)),
            ("", "head", "all_heads").index(self.qk_norm), self.output_bias + 2 * self.mlp_bias,
            self.rotary_dim or self.head_dim, int(self.interleaved),
        ]  # fmt: skip
        scale = self.score_scale if self.score_scale is not None else self.head_dim**-0.5
        factors = [
            self.epsilon, self.embedding_scale, self.residual_scale, scale, self.score_cap or 0.0, self.logit_scale,
            self.logit_cap or 0.0,
        ]  # fmt: skip
        zeros = [0] * self.num_layers
        return sizes, factors, list(self.windows) or zeros, list(self.tables) or zeros

    def cache_size(self, capacity: int) -> int:
        """Return the number of floats in the KV cache of a sequence."""
        values = -(-self.head_dim // KEY_BLOCK) * KEY_BLOCK
        return self.num_layers * self.num_key_value_heads * capacity * (self.head_dim + values)


@dataclass(frozen=True)
class DecoderWeights:
    """The packed weights of a model (see pack_layer() and pack_adapter()).

    Attributes:
        shared: embedding [vocabulary, hidden], last norm [hidden], head in panels, and pairs of cos and sin
            [positions, rotary_dim].
        layers: one tensor per layer.
        adapters, plans: one tensor per adapter.
    """

    shared: Sequence[Tensor]
    layers: Sequence[Tensor]
    adapters: Sequence[Tensor]
    plans: Sequence[Tensor]


def decoder_pass(
    sizes: DecoderSizes, weights: DecoderWeights, tokens: Tensor, runs: Tensor, caches: Sequence[Tensor]
) -> Tensor:
    """Run a forward pass. Returns the logits after the last token of each run that wants them.

    Args:
        tokens: int64 [tokens], the new tokens of all sequences: one run of tokens per sequence.
        runs: int64 [runs, 6]: begin and number of its tokens, position of the first, capacity of the cache, adapter
            (-1 for none), whether it wants logits.
        caches: one per run, float32 [sizes.cache_size(capacity)], changed in place.

    Raises:
        ValueError: if something does not fit. Nothing is changed then.
    """
    outputs = library.run(
        "oarlock_decoder", tokens, runs, list(weights.shared), list(weights.layers), list(weights.adapters),
        list(weights.plans), list(caches), *sizes.attributes(),
    )  # fmt: skip
    return outputs[0]


def pack_panels(matrix: np.ndarray) -> np.ndarray:
    """Pack a matrix [in, out] into panels of 32 columns, [ceil(out / 32), in, 32]."""
    rows, columns = matrix.shape
    count = -(-columns // PANEL)
    padded = np.zeros([rows, count * PANEL], np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(rows, count, PANEL).transpose(1, 0, 2))


def pack_layer(vectors: Sequence[np.ndarray], matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Pack the weights of a layer into one array.

    Args:
        vectors: those that the sizes say it has, in this order: norms before and after the attention, before and after
            the MLP; norms of queries and keys; biases of q | k | v (zeros if there are none), o, gate | up, down.
        matrices: q | k | v, o, gate | up, down; [in, out].
    """
    return _concatenate([*vectors, *(pack_panels(matrix) for matrix in matrices)])


def pack_adapter(
    rank: int, layers: Sequence[dict[str, tuple[np.ndarray, np.ndarray]]]
) -> tuple[np.ndarray, np.ndarray]:
    """Pack the LoRA matrices of an adapter. Returns them, and the plan: the rank, and which targets each layer has.

    Args:
        layers: per layer, name of a target -> A [in, rank], scaling * B [rank, out].
    """
    plan, parts = [rank], []
    for layer in layers:
        for target in TARGETS:
            plan.append(int(target in layer))
            if target in layer:
                parts += [pack_panels(matrix) for matrix in layer[target]]
    return _concatenate(parts), np.array(plan, np.int64)


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate arrays, each aligned to 64 bytes."""
    aligned = []
    for part in parts:
        flat = np.asarray(part, np.float32).reshape(-1)
        aligned += [flat, np.zeros(-flat.size % 16, np.float32)]
    return np.concatenate(aligned) if aligned else np.zeros(0, np.float32)
