"""SmolLM3."""

from __future__ import annotations

from typing import Any

from oarlock.errors import ModelError
from oarlock.families.architecture import Architecture
from oarlock.families.config_reading import (
    make_blocks,
    read_architecture,
    read_attention,
    read_mlp,
    read_partial_rope,
    read_windows,
)
from oarlock.families.family import HFConfig
from oarlock.families.shared import make_decoder_family


def make_architecture(config: Any) -> Architecture:
    """Make the architecture of SmolLM3: some layers have no positions (no_rope_layers has 0 for them).

    Raises:
        ModelError: for no_rope_layers of another number of layers.
    """
    layers, rope = config.num_hidden_layers, read_partial_rope(config)
    rotates = config.no_rope_layers
    if rotates is None:
        rotates = [int((i + 1) % config.no_rope_layer_interval != 0) for i in range(layers)]
    if len(rotates) != layers:
        raise ModelError(f"no_rope_layers has {len(rotates)} entries, and the model {layers} layers")
    attentions = [
        read_attention(config, rope if rotates[i] else None, window=window)
        for i, window in enumerate(read_windows(config, lambda i: not rotates[i]))
    ]
    return read_architecture(config, make_blocks(attentions, read_mlp(config)))


FAMILY = make_decoder_family(
    "smollm3",
    "SmolLM3",
    HFConfig(
        fields={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": None,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": True,
            "attention_dropout": 0.0,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        ignored=frozenset({"max_window_layers"}),
        activation="hidden_act",
        rope_theta=2e6,
    ),
    make_architecture,
)
