"""What transformers' Trainer decays and trains of a model: python decay_peer.py CONFIGS.json OUT.json

CONFIGS: name -> content of a config.json. OUT: name -> {"decayed": [...], "sizes": {parameter: elements}}, each parameter
once, tied ones under the embedding's name. Models are built without memory. Does not import oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer


def describe(content: dict[str, Any]) -> dict[str, Any]:
    about = dict(content)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(about.pop("model_type"), **about))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return {"decayed": sorted(decayed & set(sizes)), "sizes": sizes}


if __name__ == "__main__":
    configs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: describe(content) for name, content in configs.items()}))
