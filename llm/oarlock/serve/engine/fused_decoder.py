"""Models of Llama's kind as a Decoder in float32 on a CPU: one operator for a pass through all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from oarlock.decoder.rotary import rotary_tables
from oarlock.errors import EnvironmentProblem
from oarlock.families.architecture import MLP, PRE_NORMS, Architecture, Attention, LatentAttention, MoE
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


def explain_not_fused(model: Any) -> str:
    """Why this decoder can't serve a model; "" if it can."""
    architecture, device = getattr(model, "architecture", None), paddle.device.get_device()
    if device != "cpu":
        return f"the device is {device}"
    if architecture is None:
        return f"it does not support {model.config.model_type}"
    return explain_unsupported_parts(architecture) or library.why_missing()


def explain_unsupported_parts(model: Architecture) -> str:
    """Why the operator can't compute an architecture; "" if it can."""
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        if isinstance(attention, LatentAttention):
            return "the model has latent attention"
        if isinstance(mlp, MoE):
            return "the model has a mixture of experts"
        rope = attention.rope
        if rope is None or rope.dim != attention.head_dim or rope.interleaved:
            return "not all of its heads are rotated as a whole, in halves"
        reasons = {
            "its queries and keys have norms": attention.qk_norm,
            "its layers have sliding windows": attention.window is not None,
            "its scores are capped": attention.soft_cap is not None,
            "its heads have sinks": attention.sinks,
            "its scores have a factor of their own": not math.isclose(attention.scale, attention.head_dim**-0.5),
            "its output projections have biases": attention.output_bias or mlp.bias,
            "its layers are merged": attention.packed or mlp.packed,
            "its rotary positions depend on the length": rope.kind in ("dynamic", "longrope"),
            f"the model's activation is {mlp.activation}": mlp.activation not in ACTIVATIONS,
            "its norms are not before attention and feed-forward": block.norms != PRE_NORMS,
            "its residuals are scaled": block.residual_scale != 1.0,
        }
        if found := next((reason for reason, holds in reasons.items() if holds), ""):
            return found
    if model.logit_scale != 1.0 or model.logit_soft_cap is not None:
        return "its logits are scaled or capped"
    return ""


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
        built: Architecture = model.architecture
        attention, mlp = built.blocks[0].attention, built.blocks[0].mlp
        assert isinstance(attention, Attention) and attention.rope is not None and isinstance(mlp, MLP)
        base = model.decoder
        self._sizes = DecoderSizes(
            hidden=built.hidden,
            intermediate=mlp.intermediate,
            num_layers=len(built.blocks),
            num_heads=attention.heads,
            num_key_value_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            vocabulary=built.vocab,
            epsilon=built.norm_epsilon,
            embedding_scale=built.embedding_scale,
            activation=mlp.activation,
        )
        self.vocabulary = self._sizes.vocabulary
        self._names = {name: i for i, name in enumerate(adapters)}
        cos, sin = rotary_tables(attention.rope, positions)
        table = base.embed_tokens.weight
        head = model.lm_head.weight.numpy()
        if model.lm_head.transposed:
            head = head.T
        shared = [
            table.reshape([-1]).clone(),
            paddle.to_tensor(_read_norm(base.norm, built.norm_offset)),
            paddle.to_tensor(pack_panels(head).ravel()),
            cos.reshape([-1]).clone(),
            sin.reshape([-1]).clone(),
        ]
        packed = [self._pack_adapter(name, weights, built.prefix) for name, weights in adapters.items()]
        if not packed:  # the operator wants one
            packed = [(np.zeros(0, np.float32), np.zeros(1 + len(TARGETS) * self._sizes.num_layers, np.int64))]
        self._weights = DecoderWeights(
            shared=shared,
            layers=[_pack_layer(layer, built.norm_offset) for layer in base.layers],
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


def _read_norm(layer: Any, offset: float) -> np.ndarray:
    return layer.weight.numpy() + offset


def _pack_layer(layer: Any, norm_offset: float) -> paddle.Tensor:
    """The layer's weights as the operator reads them. The layer's own memory is freed."""
    attention, inner = layer.self_attn, layer.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases = [
        part.bias.numpy() if getattr(part, "bias", None) is not None else np.zeros(part.weight.shape[1]) for part in qkv
    ]
    packed = pack_layer(
        [_read_norm(layer.input_layernorm, norm_offset), _read_norm(layer.post_attention_layernorm, norm_offset)],
        np.concatenate(biases),
        [
            np.concatenate([part.weight.numpy() for part in qkv], axis=1),
            attention.o_proj.weight.numpy(),
            np.concatenate([inner.gate_proj.weight.numpy(), inner.up_proj.weight.numpy()], axis=1),
            inner.down_proj.weight.numpy(),
        ],
    )
    for parameter in layer.parameters():
        parameter._clear_data()
    return paddle.to_tensor(packed)
