"""Values that several families have in common."""

from __future__ import annotations

from typing import Any

SPLIT_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
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
