"""Models of Llama's kind as a Decoder in float32 on a CPU: one operator for a pass through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from oarlock.errors import EnvironmentProblem
from oarlock.families.family import FusedDecoderSpec
from oarlock.families.model_sizes import ModelSizes
from oarlock.families.registry import FAMILIES
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
    config, device = model.config, paddle.device.get_device()
    rope = getattr(config, "rope_scaling", None) or {"rope_type": getattr(config, "rope_scaling_type", None)}
    reasons = {
        f"the device is {device}": device != "cpu",
        f"it does not support {config.model_type}": _find_spec(config) is None,
        "the model has ALiBi": getattr(config, "alibi", False),
        f"the model's activation is {getattr(config, 'hidden_act', '')}": _read_activation(config) not in ACTIVATIONS,
        "its rotary positions depend on the length": rope.get("rope_type") in ("dynamic", "dynamic_ntk", "longrope"),
        "its layers are merged": any(
            getattr(config, name, False) for name in ("fuse_attention_qkv", "fuse_attention_ffn")
        ),
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    return found or library.why_missing()


def _read_activation(config: Any) -> str:
    named, spec = getattr(config, "hidden_act", None) or "silu", _find_spec(config)
    return spec.activation if spec and spec.activation and named != "gelu_pytorch_tanh" else named


def _find_spec(config: Any) -> FusedDecoderSpec | None:
    family = FAMILIES.get(config.model_type)
    return None if family is None else family.fused_decoder


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
        config = model.config
        base = getattr(model, config.model_type)
        heads = config.num_attention_heads
        spec = _find_spec(config)
        assert spec is not None, config.model_type  # explain_not_fused() names it
        self._sizes = DecoderSizes(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=ModelSizes.from_config(config).head_size,
            vocabulary=config.vocab_size,
            epsilon=config.rms_norm_eps,
            embedding_scale=config.hidden_size**0.5 if spec.scales_embedding else 1.0,
            activation=_read_activation(config),
        )
        self.vocabulary = self._sizes.vocabulary
        self._names = {name: i for i, name in enumerate(adapters)}
        cos, sin = base.layers[0].self_attn.rotary_emb(paddle.zeros([1, 1, 1, 1]), seq_len=positions)
        table = base.embed_tokens.weight
        head = model.lm_head.weight.numpy()
        if getattr(model.lm_head, "transpose_y", spec.tied_head_is_transposed and config.tie_word_embeddings):
            head = head.T
        shared = [
            table.reshape([-1]).clone(),
            paddle.to_tensor(_read_norm(base.norm, spec.norm_offset)),
            paddle.to_tensor(pack_panels(head).ravel()),
            cos.reshape([-1]).clone(),
            sin.reshape([-1]).clone(),
        ]
        packed = [self._pack_adapter(name, weights, config.model_type) for name, weights in adapters.items()]
        if not packed:  # the operator wants one
            packed = [(np.zeros(0, np.float32), np.zeros(1 + len(TARGETS) * self._sizes.num_layers, np.int64))]
        self._weights = DecoderWeights(
            shared=shared,
            layers=[_pack_layer(layer, spec.norm_offset) for layer in base.layers],
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
