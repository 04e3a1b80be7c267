"""A tiny random model of every family of PaddleNLP: the arguments of its configuration there.

Two layers, width 32, the 512 tokens of helpers.make_tiny_tokenizer (0 ends a text, 1 and 2 open the two sides of a
conversation, which for ChatGLM are [gMASK] and the beginning of the answer).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import make_norms_and_biases_nontrivial
from support.tiny_configs import TINY_CONFIGS

_TOKENS = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SIZES = _TOKENS | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_CHATGLM = _TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_sequence_length": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "mistral": _GROUPED,
    "gemma": _GROUPED | {"head_dim": 8},
    "opt": _SIZES | {"word_embed_proj_dim": 32, "ffn_dim": 64, "hidden_dropout_prob": 0.0},
    "bloom": _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "chatglm": _CHATGLM | {"inner_hidden_size": 64, "gmask_token_id": 1, "mask_token_id": 3, "bos_token_id": 2},
    "chatglm_v2": _CHATGLM
    | {"padded_vocab_size": 512, "ffn_hidden_size": 64, "kv_channels": 8, "seq_length": 256, "multi_query_group_num": 2},
    "glm": _TOKENS
    | {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "max_sequence_length": 256, "output_predict": True,
       "initializer_range": 0.1, "embedding_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "output_dropout_prob": 0.0},
    "gptj": _TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4, "initializer_range": 0.1},
}  # fmt: skip

_NAMES = {
    "opt": "OPT", "chatglm": "ChatGLM", "chatglm_v2": "ChatGLMv2", "glm": "GLM", "gptj": "GPTJ",
}  # fmt: skip


def family_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model: of a row above, or of support.tiny_configs."""
    import paddlenlp.transformers

    from oarlock.model_config.load import make_config

    if family not in FAMILIES:
        return make_config(TINY_CONFIGS[family] | changes, family)
    name = _NAMES.get(family, family.capitalize())
    kind = "ConditionalGeneration" if family == "glm" else "CausalLM"
    config_class = getattr(paddlenlp.transformers, f"{name}Config")
    return config_class(**(FAMILIES[family] | changes), architectures=[f"{name}For{kind}"])


def family_model(family: str, seed: int = 0, method: Any = None, **changes: Any) -> Any:
    """A tiny model with random weights and with norms and biases as in a trained model.

    Args:
        method: a PEFT method to attach, or None.
    """
    from oarlock.models.build import ModelSource, build_model

    source = ModelSource(Path(family), family_config(family, **changes), from_weights=False)
    return make_norms_and_biases_nontrivial(build_model(source, seed=seed, method=method))
