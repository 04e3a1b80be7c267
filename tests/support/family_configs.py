"""Configurations of small models of every family."""

from __future__ import annotations

import paddlenlp.transformers as families

SMALL = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
KEYS = {"num_key_value_heads": 4}
CHATGLM = {"vocab_size": 640, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "Llama": SMALL | {"num_key_value_heads": 2},
    "Llama tied": SMALL | {"tie_word_embeddings": True},
    "Qwen2": SMALL | KEYS,
    "Qwen2 tied": SMALL | KEYS | {"tie_word_embeddings": True},
    "Mistral": SMALL | KEYS,
    "Mixtral": SMALL | KEYS | {"num_local_experts": 2},
    "Gemma": SMALL | KEYS | {"head_dim": 16},
    "OPT": SMALL | {"word_embed_proj_dim": 64},
    "OPT untied": SMALL | {"word_embed_proj_dim": 64, "tie_word_embeddings": False},
    "Bloom": {"vocab_size": 640, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "GPTJ": {"vocab_size": 640, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "GPT": SMALL,
    "ChatGLM": CHATGLM | {"inner_hidden_size": 128, "max_sequence_length": 64},
    "ChatGLMv2": CHATGLM | {"padded_vocab_size": 640, "ffn_hidden_size": 128, "kv_channels": 16, "seq_length": 64,
                            "multi_query_group_num": 2},
    "GLM": {"vocab_size": 640, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "max_sequence_length": 64},
}  # fmt: skip


def configuration(name: str):
    family = name.split()[0]
    kind = "ConditionalGeneration" if family == "GLM" else "CausalLM"
    return getattr(families, f"{family}Config")(**CONFIGS[name], architectures=[f"{family}For{kind}"])
