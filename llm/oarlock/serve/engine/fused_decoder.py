"""Models of Llama's kind as a Decoder in float32 on a CPU: one operator for a pass through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from oarlock.decoder.block import DecoderLayer
from oarlock.decoder.norm import RMSNorm
from oarlock.decoder.rotary import rotary_tables
from oarlock.errors import EnvironmentProblem
from oarlock.families.architecture import MLP, PRE_NORMS, Architecture, Attention
from oarlock.ops import library
from oarlock.ops.decoder import (
    ACTIVATIONS,
    KEY_BLOCK,
    TARGETS,
    DecoderSizes,
    DecoderWeights,
    decoder_pass,
    pack_adapter,
    pack_layer,
    pack_panels,
)
from oarlock.serve.engine.decoder import Feed, LoraWeights
from oarlock.serve.engine.step_tensor import StepTensor

_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}  # other words for the same


def explain_not_fused(model: Any) -> str:
    """Why this decoder can't serve a model; "" if it can."""
    device, architecture = paddle.device.get_device(), getattr(model, "architecture", None)
    if device != "cpu":
        return f"the device is {device}"
    if architecture is None:
        return f"it does not support {model.config.model_type}"
    return _explain_blocks(architecture) or library.why_missing()


def _explain_blocks(model: Architecture) -> str:
    block = model.blocks[0]
    attention, mlp = block.attention, block.mlp
    if not isinstance(attention, Attention):
        return "its attention is latent"
    if not isinstance(mlp, MLP):
        return "it is a mixture of experts"
    rope, window = attention.rope, attention.window
    scales = block.residual_scale, model.logit_scale, attention.scale * attention.head_dim**0.5
    reasons = {
        f"the model's activation is {mlp.activation}": _find_activation(mlp) not in ACTIVATIONS,
        "not all layers have rotary positions": rope is None,
        "its layers differ": any(other != block for other in model.blocks),
        "its rotary positions depend on the length": rope is not None and rope.kind in ("dynamic", "longrope"),
        "only a part of each head is rotated": rope is not None and rope.dim != attention.head_dim,
        "its rotary positions are interleaved": rope is not None and rope.interleaved,
        "its layers are merged": attention.packed or mlp.packed,
        "queries and keys are normed": attention.qk_norm,
        f"it looks back over {window} tokens only": window is not None and window < model.max_positions,
        "scores or logits are capped": attention.soft_cap is not None or model.logit_soft_cap is not None,
        "its heads have attention sinks": attention.sinks,
        "its norms are not those before attention and MLP": block.norms != PRE_NORMS,
        "its output projection or MLP has biases": attention.output_bias or mlp.bias,
        "scores, residuals or logits are scaled": any(abs(scale - 1) > 1e-6 for scale in scales),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _find_activation(mlp: MLP) -> str:
    return _ACTIVATIONS.get(mlp.activation, mlp.activation)


@paddle.no_grad()
def load_fused_decoder(model: Any, adapters: dict[str, LoraWeights], positions: int) -> FusedDecoder:
    """The decoder of a model. The model's memory is freed as its weights are packed: it can't be used afterwards.

    Args:
        positions: most tokens of a sequence.

    Raises:
        EnvironmentProblem: when its logits are not those of the model's own forward.
    """
    ids = np.arange(5, 12) * 37 % model.config.vocab_size
    outputs = model(input_ids=paddle.to_tensor(ids[None]))
    wanted = (outputs[0] if isinstance(outputs, (tuple, list)) else outputs)[0, -1].numpy()
    decoder = FusedDecoder(model, adapters, positions)
    sequence = decoder.start(len(ids), None)
    decoder.feed([Feed(sequence, ids[:4].tolist(), wants_logits=False)])
    found = decoder.feed([Feed(sequence, ids[4:].tolist())])[0]
    difference, largest = float(np.abs(found - wanted).max()), float(np.abs(wanted).max())
    if not difference <= 1e-3 * largest:  # NaN too
        raise EnvironmentProblem(
            f"the fused decoder is wrong on this machine: its logits differ by {difference:.3g} from those of "
            f"{type(model).__name__}, of which the largest is {largest:.3g}. Build it again (rm -r build/custom_ops; "
            "python custom_ops/build.py)"
        )
    return decoder


@dataclass(eq=False)
class _FusedSequence:
    """Keys and values of a sequence. The system provides memory only for the part that is written to."""

    cache: paddle.Tensor
    capacity: int
    adapter: int
    length: int = 0


class FusedDecoder:
    """A model of Llama's kind. Each sequence has its own keys and values, without padding."""

    chunk: int | None = 256

    def __init__(self, model: Any, adapters: dict[str, LoraWeights], positions: int) -> None:
        """Pack the model's weights; load_fused_decoder() also tests the result."""
        architecture: Architecture = model.architecture
        block = architecture.blocks[0]
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, MLP) and attention.rope  # see explain_not_fused()
        self._sizes = DecoderSizes(
            hidden=architecture.hidden,
            intermediate=mlp.intermediate,
            num_layers=len(architecture.blocks),
            num_heads=attention.heads,
            num_key_value_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            vocabulary=architecture.vocab,
            epsilon=architecture.norm_epsilon,
            embedding_scale=architecture.embedding_scale,
            activation=_find_activation(mlp),
        )
        self.vocabulary = self._sizes.vocabulary
        self._names = {name: i for i, name in enumerate(adapters)}
        base, head = model.decoder, model.lm_head.weight.numpy()
        shared = [
            base.embed_tokens.weight.reshape([-1]).clone(),
            paddle.to_tensor(_read_norm(base.norm)),
            paddle.to_tensor(pack_panels(head.T if model.lm_head.transposed else head).ravel()),
            *(table.reshape([-1]).clone() for table in rotary_tables(attention.rope, positions)),
        ]
        packed = [self._pack_adapter(name, weights, architecture.prefix) for name, weights in adapters.items()]
        if not packed:  # the operator wants one
            packed = [(np.zeros(0, np.float32), np.zeros(1 + len(TARGETS) * self._sizes.num_layers, np.int64))]
        self._weights = DecoderWeights(
            shared=shared,
            layers=[_pack_layer(layer) for layer in base.layers],
            adapters=[paddle.to_tensor(values) for values, _ in packed],
            plans=[paddle.to_tensor(plan) for _, plan in packed],
        )

        self._ids, self._table = StepTensor(), StepTensor()

    def _pack_adapter(self, name: str, weights: LoraWeights, base: str) -> tuple[np.ndarray, np.ndarray]:
        layers: list[dict[str, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(self._sizes.num_layers)]
        for layer, matrices in weights.items():
            parts = layer.split(".")  # llama.layers.0.self_attn.q_proj
            assert parts[:2] == [base, "layers"] and parts[-1] in TARGETS, f"{name}: {layer}"
            layers[int(parts[2])][parts[-1]] = matrices
        rank = next(iter(weights.values()))[0].shape[1]
        return pack_adapter(rank, layers)

    def start(self, capacity: int, adapter: str | None) -> _FusedSequence:
        """An empty sequence of at most `capacity` tokens, rounded up to whole blocks of keys."""
        capacity = -(-capacity // KEY_BLOCK) * KEY_BLOCK
        cache = paddle.empty([self._sizes.cache_size(capacity)], "float32")
        return _FusedSequence(cache, capacity, -1 if adapter is None else self._names[adapter])

    def drop(self, sequence: _FusedSequence) -> None:
        """Do nothing: the memory goes with the sequence."""

    @paddle.no_grad()
    def feed(self, feeds: Sequence[Feed]) -> np.ndarray:
        """Read tokens. Returns logits, float32 [feeds that want logits, vocabulary]."""
        order = sorted(range(len(feeds)), key=lambda i: feeds[i].sequence.adapter)  # one adapter's rows go together
        tokens: list[int] = []
        runs = []
        for i in order:
            given, sequence = feeds[i], feeds[i].sequence
            runs.append(
                [
                    len(tokens),
                    len(given.tokens),
                    sequence.length,
                    sequence.capacity,
                    sequence.adapter,
                    given.wants_logits,
                ]
            )
            tokens.extend(given.tokens)
        caches = [feeds[i].sequence.cache for i in order]
        ids, table = self._ids.fill(tokens), self._table.fill(runs)
        found = decoder_pass(self._sizes, self._weights, ids, table, caches).numpy()
        for given in feeds:
            given.sequence.length += len(given.tokens)
        wanted = [i for i in order if feeds[i].wants_logits]
        return found[np.argsort(wanted)] if wanted != sorted(wanted) else found


def _read_norm(norm: RMSNorm) -> np.ndarray:
    return norm.scale.numpy()


def _pack_layer(layer: DecoderLayer) -> paddle.Tensor:
    """The layer's weights as the operator reads them. The layer's own memory is freed."""
    attention, block = layer.self_attn, layer.spec
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate, up, down = (linear.weight.numpy() for linear in getattr(layer, block.mlp_name).sublayers())
    biases = [part.bias.numpy() if part.bias is not None else np.zeros(part.weight.shape[1]) for part in qkv]
    packed = pack_layer(
        [_read_norm(getattr(layer, name)) for name in (block.norms.before_attention, block.norms.before_mlp)],
        np.concatenate(biases),
        [
            np.concatenate([part.weight.numpy() for part in qkv], axis=1),
            attention.o_proj.weight.numpy(),
            np.concatenate([gate, up], axis=1),
            down,
        ],
    )
    for parameter in layer.parameters():
        parameter._clear_data()
    return paddle.to_tensor(packed)
