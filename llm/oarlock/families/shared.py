"""Values that several families have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oarlock.families.architecture import Architecture
from oarlock.families.family import Family, HFConfig, Packing

SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
LATENT_ATTENTION = (
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *GATED_MLP,
)
FUSED_PROJECTIONS = ("qkv_proj", "gate_up_fused_proj")  # --fuse_attention_qkv and --fuse_attention_ffn
MEGATRON_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

BATCH_FIRST, TOKEN_FIRST = ("batch", "token", "head"), ("token", "batch", "head")
HEADS_BEFORE_TOKENS = ("batch", "head", "token")

LM_HEAD_AND_EMBED_TOKENS = (("lm_head.weight", "model.embed_tokens.weight"),)  # in Hugging Face's layout
UNSCALED_ROTARY: dict[str, tuple[Any, ...]] = {"rope_scaling_type": ()}
HF_SERVERS = frozenset({"hf", "vllm"})

# Linear layers that tensor parallelism splits along their input, by the last component of their names. It splits all
# others along their output.
ROW_PARALLEL = frozenset(
    {"o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h", "linear2", "fc_out", "w2", "project_out"}
)


def make_decoder_family(
    name: str, class_prefix: str, hf_config: HFConfig, decoder: Callable[[Any], Architecture], **changes: Any
) -> Family:
    """Make the record of a family of our own decoder, with transformers' configuration.

    Args:
        name: its model_type.
        class_prefix: of its class there ("Qwen3" for Qwen3ForCausalLM).
        changes: fields of Family that differ from the usual ones.
    """
    usual: dict[str, Any] = {
        "architecture": f"{class_prefix}ForCausalLM",
        "tensor_parallel": True,
        "pipeline": True,
        "sequence_parallel": True,
        "lora_targets": (*SPLIT_ATTENTION, *GATED_MLP),
        "kv_axes": BATCH_FIRST,
        "free_head_dim": True,
        "head_size_multiple": 2,
        "untied_heads": LM_HEAD_AND_EMBED_TOKENS,
        "packing": Packing(takes_ends=True),
        "servers": HF_SERVERS,
    }
    return Family(name=name, hf_config=hf_config, decoder=decoder, own_config=True, **(usual | changes))
