"""Rotary embeddings of transformers' Llama: python rope_peer.py JOB.json OUT.json

JOB: name -> {"config": fields of LlamaConfig, "lengths": [...]}. OUT: name -> for each length, in turn,
[inverse frequencies, factor, cos of the last position]. Knows nothing of oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def describe(fields: dict[str, Any], lengths: list[int]) -> list[Any]:
    config = LlamaConfig(**fields)
    kind = config.rope_parameters["rope_type"]
    embedding, found = LlamaRotaryEmbedding(config), []
    for length in lengths:
        if kind == "default":
            inverse, factor = embedding.compute_default_rope_parameters(config)
        else:
            inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
        cos, _ = embedding(torch.zeros(1), torch.arange(length)[None])
        found.append([inverse.tolist(), factor, cos[0, -1].tolist()])
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    found = {name: describe(one["config"], one["lengths"]) for name, one in job.items()}
    Path(sys.argv[2]).write_text(json.dumps(found))
