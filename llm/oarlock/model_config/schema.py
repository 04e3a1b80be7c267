"""The type and range of each field of a config.json, whichever side wrote the file.

Only these fields reach PaddleNLP. oarlock.model_config.hf_config decides which values a family computes with. Fields
that
nobody reads (records, notes) may hold any JSON.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen
from typing_extensions import TypedDict

LARGEST_INT = 2**31 - 1
_MOST_LAYERS = 4096

_Width = Annotated[int, Ge(1), Le(2**20)] | None
_Inner = Annotated[int, Ge(1), Le(2**24)] | None
_Layers = Annotated[int, Ge(1), Le(_MOST_LAYERS)] | None
_Heads = Annotated[int, Ge(1), Le(2**16)] | None
_Experts = Annotated[int, Ge(1), Le(4096)] | None
_Rows = Annotated[int, Ge(1), Le(2**26)] | None
_Positions = Annotated[int, Ge(1), Le(LARGEST_INT)] | None
_Count = Annotated[int, Ge(0), Le(LARGEST_INT)] | None
_Token = Annotated[int, Ge(-1), Le(LARGEST_INT)] | None  # older files write -1 for none
_Tokens = _Token | Annotated[list[Annotated[int, Ge(-1), Le(LARGEST_INT)]], MaxLen(4096)]
_Flag = bool | None
_Share = Annotated[int | float, Ge(0), Le(1)] | None
_Small = Annotated[int | float, Ge(0), Le(1e6)] | None
_Epsilon = Annotated[int | float, Ge(0), Le(1e-3)] | None  # Paddle's layer_norm takes no larger one
_Factor = Annotated[int | float, Gt(0), Le(1e12)] | None
_Word = Annotated[str, MaxLen(200)]
_Text = _Word | None
_Names = Annotated[list[_Word], MaxLen(_MOST_LAYERS)]
_Nested = dict[str, Any]


class Sizes(TypedDict, total=False):
    """The sizes of a model, under the names of all families."""

    vocab_size: _Rows
    padded_vocab_size: _Rows
    hidden_size: _Width
    n_embd: _Width
    n_embed: _Width
    embed_dim: _Width
    word_embed_proj_dim: _Width
    head_dim: _Width
    kv_channels: _Width
    rotary_dim: _Width
    intermediate_size: _Inner
    ffn_dim: _Inner
    n_inner: _Inner
    inner_hidden_size: _Inner
    ffn_hidden_size: _Inner
    num_hidden_layers: _Layers
    n_layer: _Layers
    num_layers: _Layers
    num_attention_heads: _Heads
    n_head: _Heads
    num_key_value_heads: _Heads
    multi_query_group_num: _Heads
    max_position_embeddings: _Positions
    n_positions: _Positions
    max_sequence_length: _Positions
    seq_length: _Positions
    sliding_window: _Count
    max_window_layers: _Count
    type_vocab_size: _Count
    mp_degree: _Count
    num_image_tokens: _Count
    pre_seq_len: _Count
    quantization_bit: _Count
    checkpoint_num_layers: _Count
    spell_length: _Count
    original_max_position_embeddings: _Positions
    sliding_window_pattern: _Layers
    no_rope_layer_interval: _Layers
    num_experts: _Experts
    num_local_experts: _Experts
    n_routed_experts: _Experts
    n_shared_experts: _Experts
    num_experts_per_tok: _Experts
    n_group: _Experts
    topk_group: _Experts
    moe_intermediate_size: _Inner
    shared_expert_intermediate_size: _Inner
    decoder_sparse_step: _Layers
    first_k_dense_replace: _Count
    q_lora_rank: _Width
    kv_lora_rank: _Width
    qk_nope_head_dim: _Width
    qk_rope_head_dim: _Width
    v_head_dim: _Width
    qk_head_dim: _Width
    moe_layer_freq: _Layers
    ep_size: _Count
    full_attn_mod: _Count
    sliding_window_size: _Count
    num_mtp_layers: _Count
    num_nextn_predict_layers: _Count


class Numbers(TypedDict, total=False):
    """Rates, scales and epsilons."""

    attention_dropout: _Share
    activation_dropout: _Share
    attention_dropout_prob: _Share
    attention_probs_dropout_prob: _Share
    attn_pdrop: _Share
    dropout: _Share
    embd_pdrop: _Share
    embedding_dropout_prob: _Share
    hidden_dropout: _Share
    hidden_dropout_prob: _Share
    layerdrop: _Share
    output_dropout_prob: _Share
    resid_pdrop: _Share
    initializer_range: _Small
    init_std: _Small
    layer_norm_epsilon: _Epsilon
    layernorm_epsilon: _Epsilon
    rms_norm_eps: _Small
    rope_theta: _Factor
    rope_scaling_factor: _Factor
    rope_ratio: _Factor
    rope_local_base_freq: _Factor
    partial_rotary_factor: _Share
    query_pre_attn_scalar: _Factor
    attn_logit_softcapping: _Small
    final_logit_softcapping: _Small
    embedding_multiplier: _Factor
    attention_multiplier: _Factor
    residual_multiplier: _Factor
    logits_scaling: _Factor
    routed_scaling_factor: _Factor
    router_aux_loss_coef: _Small
    router_jitter_noise: _Share
    aux_loss_alpha: _Small
    interpolate_factor: _Small
    attention_scale: bool | _Factor  # a flag of ChatGLM, a number of GLM


class Flags(TypedDict, total=False):
    """Fields that are on or off."""

    _remove_final_layer_norm: _Flag
    add_bias_linear: _Flag
    add_qkv_bias: _Flag
    alibi: _Flag
    apply_query_key_layer_scaling: _Flag
    apply_residual_connection_post_layernorm: _Flag
    attention_bias: _Flag
    attention_softmax_in_fp32: _Flag
    bias_dropout_fusion: _Flag
    block_position_encoding: _Flag
    do_layer_norm_before: _Flag
    enable_bias: _Flag
    fp32_residual_connection: _Flag
    fuse_attention_ffn: _Flag
    fuse_attention_qkv: _Flag
    immediate_clear_past_key_value: _Flag
    interleaved_qkv: _Flag
    layer_norm_elementwise_affine: _Flag
    masked_softmax_fusion: _Flag
    mlp_bias: _Flag
    multi_query_attention: _Flag
    normalize_before: _Flag
    offset_alibi: _Flag
    original_rope: _Flag
    output_predict: _Flag
    parallel_output: _Flag
    position_encoding_2d: _Flag
    post_layer_norm: _Flag
    prefix_projection: _Flag
    relative_encoding: _Flag
    rmsnorm: _Flag
    rotary: _Flag
    scale_attn_weights: _Flag
    skip_bias_add: _Flag
    skip_bias_add_qkv: _Flag
    slow_but_exact: _Flag
    tie_word_embeddings: _Flag
    use_bidirectional_attention: _Flag
    use_cache: _Flag
    use_flash_attention_for_generation: _Flag
    use_last_token_for_generation: _Flag
    use_long_sequence_strategies: _Flag
    use_scaled_init_for_output_weights: _Flag
    use_sliding_window: _Flag
    norm_topk_prob: _Flag
    output_router_logits: _Flag
    qkv_bias: _Flag
    lm_head_bias: _Flag
    seq_aux: _Flag
    rope_interleave: _Flag


class Rest(TypedDict, total=False):
    """Names, tokens, and nested settings."""

    model_type: _Text
    architectures: _Names | _Text
    hidden_act: _Text
    hidden_activation: _Text
    activation: _Text
    activation_function: _Text
    dtype: _Text
    torch_dtype: _Text
    pool_token: _Text
    spell_func: _Text
    rope_scaling_type: Literal["linear", "ntk", "dynamic_ntk"] | None
    long_sequence_strategy_type: _Text
    long_sequence_strategy_name: _Text
    long_sequence_init_args: _Nested | None
    layer_types: _Names | None
    no_rope_layers: Annotated[list[Annotated[int, Ge(0), Le(1)]], MaxLen(_MOST_LAYERS)] | None
    mlp_only_layers: Annotated[list[Annotated[int, Ge(0), Le(_MOST_LAYERS)]], MaxLen(_MOST_LAYERS)] | None
    topk_method: _Text
    cache_implementation: _Text
    scoring_func: _Text
    init_class: _Text
    init_args: Annotated[list[_Nested], MaxLen(16)]
    rope_scaling: _Nested | None
    rope_parameters: _Nested | None
    bos_token_id: _Token
    eos_token_id: _Tokens
    pad_token_id: _Token
    mask_token_id: _Token
    gmask_token_id: _Token


class ConfigFields(Sizes, Numbers, Flags, Rest, total=False):
    """All fields that are checked. Other fields are left to their readers."""
