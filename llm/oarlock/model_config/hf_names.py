"""Names of weights in Hugging Face's files where PaddleNLP has no full table of its own (3.0.0b4), as data.

A row is (name there, name in PaddleNLP's model, whether the matrix is turned); "N" stands for the number of a layer.
The other families' tables are PaddleNLP's (`_get_name_mappings`).
"""

from __future__ import annotations

from collections.abc import Iterator

Row = tuple[str, str, bool]

_GPTJ: tuple[Row, ...] = (
    ("transformer.wte.weight", "transformer.wte.weight", False),
    ("transformer.h.N.ln_1.weight", "transformer.h.N.ln_1.weight", False),
    ("transformer.h.N.ln_1.bias", "transformer.h.N.ln_1.bias", False),
    ("transformer.h.N.attn.q_proj.weight", "transformer.h.N.attn.q_proj.weight", True),
    ("transformer.h.N.attn.k_proj.weight", "transformer.h.N.attn.k_proj.weight", True),
    ("transformer.h.N.attn.v_proj.weight", "transformer.h.N.attn.v_proj.weight", True),
    ("transformer.h.N.attn.out_proj.weight", "transformer.h.N.attn.out_proj.weight", True),
    ("transformer.h.N.mlp.fc_in.weight", "transformer.h.N.mlp.fc_in.weight", True),
    ("transformer.h.N.mlp.fc_in.bias", "transformer.h.N.mlp.fc_in.bias", False),
    ("transformer.h.N.mlp.fc_out.weight", "transformer.h.N.mlp.fc_out.weight", True),
    ("transformer.h.N.mlp.fc_out.bias", "transformer.h.N.mlp.fc_out.bias", False),
    ("transformer.ln_f.weight", "transformer.ln_f.weight", False),
    ("transformer.ln_f.bias", "transformer.ln_f.bias", False),
    ("lm_head.weight", "lm_head.weight", True),
    ("lm_head.bias", "lm_head.bias", False),
)
_OPT: tuple[Row, ...] = (
    ("model.decoder.embed_tokens.weight", "opt.embeddings.word_embeddings.weight", False),
    ("model.decoder.embed_positions.weight", "opt.embeddings.position_embeddings.weight", False),
    ("model.decoder.layers.N.self_attn.q_proj.weight", "opt.decoder.layers.N.self_attn.q_proj.weight", True),
    ("model.decoder.layers.N.self_attn.q_proj.bias", "opt.decoder.layers.N.self_attn.q_proj.bias", False),
    ("model.decoder.layers.N.self_attn.k_proj.weight", "opt.decoder.layers.N.self_attn.k_proj.weight", True),
    ("model.decoder.layers.N.self_attn.k_proj.bias", "opt.decoder.layers.N.self_attn.k_proj.bias", False),
    ("model.decoder.layers.N.self_attn.v_proj.weight", "opt.decoder.layers.N.self_attn.v_proj.weight", True),
    ("model.decoder.layers.N.self_attn.v_proj.bias", "opt.decoder.layers.N.self_attn.v_proj.bias", False),
    ("model.decoder.layers.N.self_attn.out_proj.weight", "opt.decoder.layers.N.self_attn.out_proj.weight", True),
    ("model.decoder.layers.N.self_attn.out_proj.bias", "opt.decoder.layers.N.self_attn.out_proj.bias", False),
    ("model.decoder.layers.N.self_attn_layer_norm.weight", "opt.decoder.layers.N.norm1.weight", False),
    ("model.decoder.layers.N.self_attn_layer_norm.bias", "opt.decoder.layers.N.norm1.bias", False),
    ("model.decoder.layers.N.fc1.weight", "opt.decoder.layers.N.linear1.weight", True),
    ("model.decoder.layers.N.fc1.bias", "opt.decoder.layers.N.linear1.bias", False),
    ("model.decoder.layers.N.fc2.weight", "opt.decoder.layers.N.linear2.weight", True),
    ("model.decoder.layers.N.fc2.bias", "opt.decoder.layers.N.linear2.bias", False),
    ("model.decoder.layers.N.final_layer_norm.weight", "opt.decoder.layers.N.norm2.weight", False),
    ("model.decoder.layers.N.final_layer_norm.bias", "opt.decoder.layers.N.norm2.bias", False),
    ("model.decoder.final_layer_norm.weight", "opt.decoder.final_layer_norm.weight", False),
    ("model.decoder.final_layer_norm.bias", "opt.decoder.final_layer_norm.bias", False),
)
_OPT_UNTIED: tuple[Row, ...] = (*_OPT, ("lm_head.weight", "lm_head.decoder_weight", False))

# First parts of names that some published files leave out (those of a model without its output layer).
OPTIONAL_PREFIXES = {"bloom": "transformer.", "gptj": "transformer.", "opt": "model."}


def own_names(family: str, num_layers: int, tied: bool) -> Iterator[Row] | None:
    """All names of a model, or None where PaddleNLP's table is whole."""
    tables = {"gptj": _GPTJ, "opt": _OPT if tied else _OPT_UNTIED}
    return _every_layer(tables[family], num_layers) if family in tables else None


def _every_layer(rows: tuple[Row, ...], num_layers: int) -> Iterator[Row]:
    for there, here, turned in rows:
        for layer in range(num_layers) if ".N." in there else (0,):
            yield there.replace(".N.", f".{layer}."), here.replace(".N.", f".{layer}."), turned
