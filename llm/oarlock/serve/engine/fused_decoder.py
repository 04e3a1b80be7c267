"""Models of Llama's kind as a Decoder in float32 on a CPU: one operator for a pass through all layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle

from oarlock.decoder.block import DecoderLayer
from oarlock.decoder.norm import RMSNorm
from oarlock.decoder.rotary import make_rotary_tables
from oarlock.errors import EnvironmentProblem
from oarlock.families.architecture import MLP, Architecture, Attention, DecoderBlock, MoE, Rope
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


def explain_not_fused(model: Any, adapters: Collection[str] = ()) -> str:
    """Why this decoder can't serve a model; "" if it can.

    Args:
        adapters: names of the layers that adapters change.
    """
    device, architecture = paddle.device.get_device(), getattr(model, "architecture", None)
    if device != "cpu":
        return f"the device is {device}"
    if architecture is None:
        return f"it does not support {model.config.model_type}"
    other = sorted({name.rpartition(".")[2] for name in adapters} - set(TARGETS))
    if other:
        return f"an adapter changes {other[0]}"
    return _explain_blocks(architecture) or library.why_missing()


def _explain_blocks(model: Architecture) -> str:
    first = model.blocks[0]
    if any(isinstance(block.mlp, MoE) for block in model.blocks):
        return "it is a mixture of experts"
    if not isinstance(first.attention, Attention) or not isinstance(first.mlp, MLP):
        return "its attention is latent"
    ropes = _list_ropes(model)
    reasons = {
        f"the model's activation is {first.mlp.activation}": first.mlp.activation not in ACTIVATIONS,
        "no layer has rotary positions": not ropes,
        "its layers differ": any(_ignore_places(block) != _ignore_places(first) for block in model.blocks),
        "its rotary positions depend on the length": any(rope.kind in ("dynamic", "longrope") for rope in ropes),
        "its rotary embeddings differ in size or order": len({(rope.dim, rope.interleaved) for rope in ropes}) > 1,
        "its heads have attention sinks": first.attention.sinks,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _list_ropes(model: Architecture) -> list[Rope]:
    """The rotary embeddings of a model's layers, each once."""
    found: list[Rope] = []
    for block in model.blocks:
        rope = block.attention.rope
        if rope is not None and rope not in found:
            found.append(rope)
    return found


def _ignore_places(block: DecoderBlock) -> DecoderBlock:
    """The block without what may differ from layer to layer."""
    assert isinstance(block.attention, Attention)
    return replace(block, attention=replace(block.attention, rope=None, window=None))


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
        attention, mlp, norms = block.attention, block.mlp, block.norms
        assert isinstance(attention, Attention) and isinstance(mlp, MLP)  # see explain_not_fused()
        ropes = _list_ropes(architecture)
        places = [one.attention for one in architecture.blocks if isinstance(one.attention, Attention)]
        self._sizes = DecoderSizes(
            hidden=architecture.hidden,
            intermediate=mlp.intermediate,
            num_layers=len(architecture.blocks),
            num_heads=attention.heads,
            num_key_value_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            vocabulary=architecture.vocab,
            epsilon=architecture.norm_epsilon,
            activation=mlp.activation,
            norms=(
                bool(norms.before_attention),
                bool(norms.after_attention),
                bool(norms.before_mlp),
                bool(norms.after_mlp),
            ),
            qk_norm=attention.qk_norm,
            output_bias=attention.output_bias,
            mlp_bias=mlp.bias,
            rotary_dim=ropes[0].dim,
            interleaved=ropes[0].interleaved,
            embedding_scale=architecture.embedding_scale,
            residual_scale=block.residual_scale,
            score_scale=attention.scale,
            score_cap=attention.soft_cap,
            logit_scale=architecture.logit_scale,
            logit_cap=architecture.logit_soft_cap,
            windows=tuple(one.window or 0 for one in places),
            tables=tuple(ropes.index(one.rope) if one.rope is not None else -1 for one in places),
        )
        self.vocabulary = self._sizes.vocabulary
        self._names = {name: i for i, name in enumerate(adapters)}
        base, head = model.decoder, model.lm_head.weight.numpy()
        shared = [
            base.embed_tokens.weight.reshape([-1]).clone(),
            paddle.to_tensor(_read_norm(base.norm)),
            paddle.to_tensor(pack_panels(head.T if model.lm_head.transposed else head).ravel()),
            *(table.reshape([-1]).clone() for rope in ropes for table in make_rotary_tables(rope, positions)),
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
    spec, own = layer.spec, layer.self_attn
    attention, mlp, norms = spec.attention, spec.mlp, spec.norms
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    places = (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp)
    vectors = [_read_norm(getattr(layer, name)) for name in places if name]
    if attention.qk_norm:
        vectors += [_read_norm(own.q_norm), _read_norm(own.k_norm)]
    *inner, down = getattr(layer, spec.mlp_name).sublayers()
    if attention.packed:
        qkv, qkv_bias = _join([own.qkv_proj])
        if attention.packed == "groups":
            qkv, qkv_bias = _order_groups(qkv, attention), _order_groups(qkv_bias, attention)
    else:
        qkv, qkv_bias = _join([own.q_proj, own.k_proj, own.v_proj])
    gate_up, gate_up_bias = _join(inner)
    vectors.append(qkv_bias)
    if attention.output_bias:
        vectors.append(own.o_proj.bias.numpy())
    if mlp.bias:
        vectors += [gate_up_bias, down.bias.numpy()]
    packed = pack_layer(vectors, [qkv, own.o_proj.weight.numpy(), gate_up, down.weight.numpy()])
    for parameter in layer.parameters():
        parameter._clear_data()
    return paddle.to_tensor(packed)


def _join(linears: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The weights and biases (zeros where there are none) of linear layers of one input, side by side."""
    weights = [one.weight.numpy() for one in linears]
    biases = [np.zeros(one.weight.shape[1], np.float32) if one.bias is None else one.bias.numpy() for one in linears]
    return np.concatenate(weights, axis=1), np.concatenate(biases)


def _order_groups(packed: np.ndarray, attention: Attention) -> np.ndarray:
    """[its q | k | v] per head of keys -> [q | k | v], on the last axis."""
    shape, size = packed.shape[:-1], attention.head_dim
    groups = packed.reshape(*shape, attention.kv_heads, -1)
    parts = np.split(groups, [groups.shape[-1] - 2 * size, groups.shape[-1] - size], axis=-1)
    return np.concatenate([part.reshape(*shape, -1) for part in parts], axis=-1)
