"""Llama."""

from oarlock.families.family import Family, FusedDecoderSpec, HFConfig, Packing
from oarlock.families.shared import (
    BATCH_FIRST,
    FUSED_PROJECTIONS,
    GATED_MLP,
    HF_SERVERS,
    LM_HEAD_AND_EMBED_TOKENS,
    SPLIT_ATTENTION,
)

def make_architecture(config):
    from oarlock.families.architecture import Architecture, Attention, DecoderBlock, MLP, Rope
    head = config.hidden_size // config.num_attention_heads
    attention = Attention(config.num_attention_heads, config.num_key_value_heads, head, head**-0.5, rope=Rope(config.rope_theta, head, config.max_position_embeddings), packed="groups" if config.fuse_attention_qkv else "")
    names = ("gate_up_fused_proj", "", "down_proj") if config.fuse_attention_ffn else ("gate_proj", "up_proj", "down_proj")
    mlp = MLP(config.intermediate_size, packed=config.fuse_attention_ffn, names=names)
    return Architecture("llama", config.vocab_size, config.hidden_size, (DecoderBlock(attention, mlp),) * config.num_hidden_layers, config.rms_norm_eps, config.max_position_embeddings, tied=config.tie_word_embeddings, initializer_range=config.initializer_range)


FAMILY = Family(
    decoder=make_architecture,
    name="llama",
    architecture="LlamaForCausalLM",
    tensor_parallel=True,
    pipeline=True,
    sequence_parallel=True,
    lora_targets=(*SPLIT_ATTENTION, *GATED_MLP, *FUSED_PROJECTIONS),
    kv_axes=BATCH_FIRST,
    head_size_multiple=2,
    layer_tables="rotary",
    untied_heads=LM_HEAD_AND_EMBED_TOKENS,
    builtin_configs=True,
    hf_config=HFConfig(
        fields={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        supported={"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)},
        required={"alibi": False, "use_long_sequence_strategies": False},
        dropouts=frozenset({"attention_dropout"}),
        scaled_rotary=True,
    ),
    packing=Packing(takes_ends=True),
    fused_decoder=FusedDecoderSpec(),
    replaceable_attention=True,
    servers=HF_SERVERS | {"fastdeploy"},
    server_notes={
        "fastdeploy": "FastDeploy has no Llama of its own and runs it through PaddleFormers, more slowly",
    },
)
