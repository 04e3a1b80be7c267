"""A Llama-like decoder in one operator for inference (custom_ops/decoder). Float32 on the CPU.

It runs new tokens of several sequences in one batch, each with its own KV cache. Results have the same bits for every
batch.
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
    """The sizes and constants of a model.

    Attributes:
        epsilon: of the norms.
        embedding_scale: factor of the embeddings.
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
        """Return the integers in the order of the operator."""
        return [self.hidden, self.intermediate, self.num_layers, self.num_heads, self.num_key_value_heads,
                self.head_dim, self.vocabulary]  # fmt: skip

    def cache_size(self, capacity: int) -> int:
        """Return the number of floats in the KV cache of a sequence."""
        values = -(-self.head_dim // KEY_BLOCK) * KEY_BLOCK
        return self.num_layers * self.num_key_value_heads * capacity * (self.head_dim + values)


@dataclass(frozen=True)
class DecoderWeights:
    """The packed weights of a model (see pack_layer() and pack_adapter()).

    Attributes:
        shared: embedding [vocabulary, hidden], last norm [hidden], head in panels, cos and sin [positions, dim].
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
    """Run tokens through the model. Returns the logits after the last token of each run that asks for them.

    Args:
        tokens: int64 [tokens], concatenated runs.
        runs: int64 [runs, 6]: begin and number of its tokens, position of the first, capacity of the cache, adapter
            (-1 for none), whether its logits are computed.
        caches: one per run, float32 [sizes.cache_size(capacity)], changed in place.

    Raises:
        ValueError: if something does not fit. Nothing is changed then.
    """
    outputs = library.run(
        "oarlock_decoder", tokens, runs, list(weights.shared), list(weights.layers), list(weights.adapters),
        list(weights.plans), list(caches), sizes.counts(), sizes.epsilon, sizes.embedding_scale,
        ACTIVATIONS.index(sizes.activation),
    )  # fmt: skip
    return outputs[0]


def pack_panels(matrix: np.ndarray) -> np.ndarray:
    """Pack a matrix [in, out] into panels of 32 columns, [ceil(out / 32), in, 32]."""
    rows, columns = matrix.shape
    count = -(-columns // PANEL)
    padded = np.zeros([rows, count * PANEL], np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(rows, count, PANEL).transpose(1, 0, 2))


def pack_layer(norms: Sequence[np.ndarray], qkv_bias: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Pack the weights of a layer into one array.

    Args:
        norms: scales before the attention and before the MLP, [hidden].
        qkv_bias: zeros if there is none.
        matrices: q | k | v, o, gate | up, down; [in, out].
    """
    return _concatenate([*norms, qkv_bias, *(pack_panels(matrix) for matrix in matrices)])


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
