"""The architecture of a decoder as plain data. A family's make_architecture() makes it from a configuration.

oarlock.decoder builds the model from it. The fused decoder, exports, parallel plans and counts of parameters read it
too. Nothing in this file needs Paddle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RopeKind = Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope"]


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864).

    Attributes:
        theta: base of the frequencies.
        dim: rotated components of a head; the rest of it passes unchanged (partial rotary embedding).
        max_positions: number of positions that the model was trained for.
        kind: how frequencies are scaled (oarlock.decoder.rotary has the formulas and their sources).
        scaling: numbers of that kind, by transformers' names (factor, low_freq_factor, short_factor, ...).
        interleaved: components 2i and 2i + 1 are rotated together (GLM, DeepSeek), instead of i and i + dim / 2.
    """

    theta: float
    dim: int
    max_positions: int
    kind: RopeKind = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False

    @property
    def depends_on_length(self) -> bool:
        """Whether long texts are rotated by other frequencies from their first token on."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class Attention:
    """Attention with grouped heads (GQA, https://arxiv.org/abs/2305.13245).

    Attributes:
        heads, kv_heads: of queries, and of keys and values.
        head_dim: size of a head.
        scale: factor of the scores.
        qkv_bias, output_bias: which projections have biases.
        qk_norm: RMSNorm of queries and keys, for each head or over all heads together.
        rope: None for layers without positions (NoPE, https://arxiv.org/abs/2305.19466).
        window: number of last tokens, the query's own included, that it attends to; None for all.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap).
        sinks: each head has a learned score of an additional key without a value (gpt-oss).
        dropout: of the attention weights in training.
        packed: one matrix holds q, k and v: "blocks" for [q | k | v] (Phi-3), "groups" for [its q | k | v] per head of
            keys and values (PaddleNLP's --fuse_attention_qkv).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["", "head", "all_heads"] = ""
    rope: Rope | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    packed: Literal["", "blocks", "groups"] = ""


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1).

    Attributes:
        heads: of queries, keys and values.
        query_rank: of the compressed queries; None for one plain projection.
        kv_rank: of the compressed keys and values.
        nope_dim, rope_dim: parts of a head of queries and keys without and with rotary embedding.
        value_dim: size of a head of values.
        scale: factor of the scores.
        bias: the projections to low rank, and the output projection, have biases.
        dropout: of the attention weights in training.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    bias: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class MLP:
    """A gated MLP: (activation(x gate) * (x up)) down (https://arxiv.org/abs/2002.05202).

    Attributes:
        activation: a key of oarlock.decoder.mlp.ACTIVATIONS.
        packed: one matrix holds [gate | up].
        names: of gate, up and down in the weights. If packed, the first is that of the packed matrix.
    """

    intermediate: int
    activation: str = "silu"
    bias: bool = False
    packed: bool = False
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoE:
    """A mixture of experts: each token is processed by `top_k` of them, and by the shared expert if there is one.

    Attributes:
        experts: their number.
        expert: one of them; all are alike.
        router: how its logits become scores.
        renormalize: the chosen experts' weights sum to 1.
        weight_scale: factor of these weights.
        groups, top_groups: experts are chosen from the best `top_groups` of `groups` only (DeepSeek-V3, section 2.1.2).
        group_score: a group's score is that of its best expert, or the sum of its two best.
        bias_corrected: for the choice, not for the weights, a bias is added to the scores, which keeps the load even
            (https://arxiv.org/abs/2408.15664).
        shared: the expert that processes every token.
        shared_gate: its output is multiplied with sigmoid(x gate) (Qwen2-MoE).
        aux_loss: factor of the load balancing loss (Switch Transformer, https://arxiv.org/abs/2101.03961, equation 4).
        names: of the router and the shared expert.
    """

    experts: int
    top_k: int
    expert: MLP
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    weight_scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    bias_corrected: bool = False
    shared: MLP | None = None
    shared_gate: bool = False
    aux_loss: float = 0.0
    names: tuple[str, str] = ("gate", "shared_experts")


@dataclass(frozen=True)
class Norms:
    """The names of a layer's RMSNorms in the weights, by position; "" where there is none."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


PRE_NORMS = Norms()


@dataclass(frozen=True)
class DecoderBlock:
    """One layer: x + scale * attention(norm(x)), then the same with the MLP.

    Attributes:
        residual_scale: factor of what attention and MLP add (Granite).
        mlp_name: in the weights.
    """

    attention: Attention | LatentAttention
    mlp: MLP | MoE
    norms: Norms = PRE_NORMS
    residual_scale: float = 1.0
    mlp_name: str = "mlp"


@dataclass(frozen=True)
class Architecture:
    """A causal language model.

    Attributes:
        prefix: first component of weights' names, except the output layer's.
        vocab, hidden: rows and width of the embedding.
        blocks: the layers, from the input to the output.
        norm_epsilon: of all RMSNorms.
        norm_offset: added to the weights of all RMSNorms (Gemma: 1).
        embedding_scale: factor of the embeddings.
        logit_scale: factor of the logits.
        logit_soft_cap: logits become soft_cap * tanh(logits / soft_cap).
        tied: the output layer has the embedding's weights.
        initializer_range: standard deviation of random weights.
        max_positions: longest sequence.
    """

    prefix: str
    vocab: int
    hidden: int
    blocks: tuple[DecoderBlock, ...]
    norm_epsilon: float
    max_positions: int
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    tied: bool = False
    initializer_range: float = 0.02
