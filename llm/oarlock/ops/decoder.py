"""A decoder of Llama's kind in one operator (custom_ops/decoder), float32 on the CPU, for inference.

It reads new tokens of several sequences together, each with keys and values of its own, and gives the same bits
whatever the batch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oarlock.ops import library
from oarlock.typing import Tensor

PANEL, KEY_BLOCK = 32, 16  # as in custom_ops/decoder/decoder.h
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderSizes:
    """Of a model.

    Attributes:
        epsilon: of the norms.
        embedding_scale: what embeddings are multiplied with.
        activation: of the gate, one of ACTIVATIONS.
    """

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    embedding_scale: float = 1.0
    activation: str = "silu"

    def counts(self) -> list[int]:
        """The whole numbers, as the operator takes them."""
        return [self.hidden, self.intermediate, self.num_layers, self.num_heads, self.num_key_value_heads,
                self.head_dim, self.vocabulary]  # fmt: skip

    def cache_size(self, capacity: int) -> int:
        """Floats of the keys and values of a sequence."""
        values = -(-self.head_dim // KEY_BLOCK) * KEY_BLOCK
        return self.num_layers * self.num_key_value_heads * capacity * (self.head_dim + values)


@dataclass(frozen=True)
class DecoderWeights:
    """As the operator reads them; see pack_layer() and pack_adapter().

    Attributes:
        shared: embedding [vocabulary, hidden], last norm [hidden], head in panels, cos and sin [positions, dim].
        layers: of one tensor each.
        adapters, plans: of one tensor each.
    """

    shared: Sequence[Tensor]
    layers: Sequence[Tensor]
    adapters: Sequence[Tensor]
    plans: Sequence[Tensor]


def decoder_pass(
    sizes: DecoderSizes, weights: DecoderWeights, tokens: Tensor, runs: Tensor, caches: Sequence[Tensor]
) -> Tensor:
    """Read tokens; the scores after the last one of each run that wants them, [scored runs, vocabulary].

    Args:
        tokens: int64 [tokens], run after run.
        runs: int64 [runs, 6]: begin and number of its tokens, position of the first, capacity of the cache, adapter
            (-1 for none), whether scores are wanted.
        caches: of each run, float32 [sizes.cache_size(capacity)]; changed in place.

    Raises:
        ValueError: when something does not fit; nothing is changed then.
    """
    outputs = library.run(
        "oarlock_decoder", tokens, runs, list(weights.shared), list(weights.layers), list(weights.adapters),
        list(weights.plans), list(caches), sizes.counts(), sizes.epsilon, sizes.embedding_scale,
        ACTIVATIONS.index(sizes.activation),
    )  # fmt: skip
    return outputs[0]


def panels(matrix: np.ndarray) -> np.ndarray:
    """A matrix [in, out] in panels of 32 columns, [ceil(out / 32), in, 32]."""
    rows, columns = matrix.shape
    count = -(-columns // PANEL)
    padded = np.zeros([rows, count * PANEL], np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(rows, count, PANEL).transpose(1, 0, 2))


def pack_layer(norms: Sequence[np.ndarray], qkv_bias: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """The weights of a layer, one after the other.

    Args:
        norms: before the attention and before the feed-forward, [hidden].
        qkv_bias: zeros where there is none.
        matrices: q | k | v, o, gate | up, down; [in, out].
    """
    return _together([*norms, qkv_bias, *(panels(matrix) for matrix in matrices)])


def pack_adapter(
    rank: int, layers: Sequence[dict[str, tuple[np.ndarray, np.ndarray]]]
) -> tuple[np.ndarray, np.ndarray]:
    """The LoRA matrices of an adapter, and which there are.

    Args:
        layers: of each, name of a target -> A [in, rank], scaling * B [rank, out].
    """
    plan, parts = [rank], []
    for layer in layers:
        for target in TARGETS:
            plan.append(int(target in layer))
            if target in layer:
                parts += [panels(matrix) for matrix in layer[target]]
    return _together(parts), np.array(plan, np.int64)


def _together(parts: Sequence[np.ndarray]) -> np.ndarray:
    """In one array, each from a multiple of 64 bytes on."""
    aligned = []
    for part in parts:
        flat = np.asarray(part, np.float32).reshape(-1)
        aligned += [flat, np.zeros(-flat.size % 16, np.float32)]
    return np.concatenate(aligned) if aligned else np.zeros(0, np.float32)
