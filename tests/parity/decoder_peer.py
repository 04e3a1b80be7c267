"""The other side of tests/parity/test_decoder_families.py: transformers' models, in the Python of scripts/parity_env.sh.

    python decoder_peer.py JOBS.json

Each job is a dictionary. transformers_peer.make() makes the model "folder"; logits and answers go to "out" (.npz), and
the gradients, under the names and in the layout of the model's file, to "gradients/padded" and "gradients/packed".
Knows nothing of oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from transformers_peer import make


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """On the right; a label is the next token, -100 where there is none."""
    longest = max(map(len, texts))

    def rows(lists: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in lists])

    return {
        "input_ids": rows(texts, 0),
        "attention_mask": rows([[1] * len(text) for text in texts], 0),
        "labels": rows([[*text[1:], -100] for text in texts], -100),
    }


def packed(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """One row. Where positions begin again, transformers lets no token see what is before."""
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[i for text in texts for i in range(len(text))]]),
        "labels": torch.tensor([[label for text in texts for label in [*text[1:], -100]]]),
    }


def run(job: dict[str, Any]) -> dict[str, np.ndarray]:
    folder = Path(job["folder"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found: dict[str, np.ndarray] = {}
    model.generation_config.eos_token_id = None
    for i, prompt in enumerate(job["prompts"]):
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new_tokens"], do_sample=False, use_cache=True
        )
        found[f"answer {i}"] = answer[0, len(prompt) :].numpy()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, batch in {"padded": padded(job["texts"]), "packed": packed(job["texts"])}.items():
        labels = batch.pop("labels")
        model.load_state_dict(weights)
        model.zero_grad()
        logits = model(**batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        found[name] = logits.detach().numpy()
        with torch.no_grad():
            for value in model.state_dict(keep_vars=True).values():
                value.copy_(0 if value.grad is None else value.grad)
        model.save_pretrained(folder / "gradients" / name)
    return found


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        make(job, Path(job["folder"]))
        np.savez(job["out"], **run(job))


if __name__ == "__main__":
    main()
