"""The other side of tests/parity/test_config_fields.py: transformers and torch, in the Python of scripts/parity_env.sh.

    python config_fields_peer.py JOB.json

For every field that a family's configuration class declares, and every value that the job has for it, a model is
made, saved and run. result.json has the declared fields of each family, and each model's folder, or why transformers
makes none.
Does not import oarlock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def make_model(config: Any) -> Any:
    """A model with weights so large that its logits depend on the whole input."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name and "wte" not in name and "lm_head" not in name:
                parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.3))
    return model


def save(config: Any, folder: Path, ids: torch.Tensor, base: dict[str, Any] | None) -> Any:
    """Save the model of a configuration with the weights of the base where they fit, and return its state."""
    model = make_model(config)
    if base is not None and {k: v.shape for k, v in base.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }:
        model.load_state_dict(base)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    model.save_pretrained(folder)
    np.save(folder / "scores.npy", out.logits.numpy())
    return model.state_dict()


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    root, ids = Path(job["root"]), torch.tensor(job["ids"])
    declared, cases = {}, []
    for family, base in job["families"].items():
        config = AutoConfig.for_model(family, **base)
        state = save(config, root / family / "base", ids, None)
        cases.append({"family": family, "field": "", "value": None, "folder": str(root / family / "base")})
        declared[family] = sorted(field.name for field in dataclasses.fields(config))
        for field in declared[family]:
            for i, value in enumerate(job["values"].get(f"{family}.{field}", job["values"].get(field, []))):
                case = {"family": family, "field": field, "value": value}
                folder = root / family / f"{field}-{i}"
                try:
                    save(AutoConfig.for_model(family, **{**base, field: value}), folder, ids, state)
                    cases.append({**case, "folder": str(folder)})
                except Exception as error:  # transformers decides
                    cases.append({**case, "error": f"{type(error).__name__}: {error}"})
    for i, (family, fields) in enumerate(job["together"]):
        folder = root / family / f"together-{i}"
        save(AutoConfig.for_model(family, **{**job["families"][family], **fields}), folder, ids, None)
        cases.append({"family": family, "field": ", ".join(fields), "value": fields, "folder": str(folder)})
    (root / "result.json").write_text(json.dumps({"declared": declared, "cases": cases}))
    os._exit(0)  # torch's threads take a second to end


if __name__ == "__main__":
    main()
