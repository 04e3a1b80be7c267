"""The other side of test_chat_parity.py: transformers' apply_chat_template, in the Python of scripts/parity_env.sh.

    python chat_peer.py JOBS.json OUT.json

Each job names a tokenizer folder and conversations. The output has the ids, the mask of the assistant's text, the text,
and the ids of the prompt of the last answer, or the error; for a conversation with its own template only the text.
Does not import oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def answer(tokenizer: Any, job: dict[str, Any]) -> dict[str, Any]:
    given = {"tools": job.get("tools"), **job.get("variables", {})}
    if "template" in job:
        given["chat_template"] = job["template"]
    try:
        if "template" in job:
            return {"text": tokenizer.apply_chat_template(job["messages"], tokenize=False, **given)}
        whole = tokenizer.apply_chat_template(
            job["messages"], return_dict=True, return_assistant_tokens_mask=True, **given
        )
        prompt = tokenizer.apply_chat_template(
            job["messages"][:-1], add_generation_prompt=True, return_dict=False, **given
        )
        text = tokenizer.apply_chat_template(job["messages"], tokenize=False, **given)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"ids": whole["input_ids"], "mask": whole["assistant_masks"], "prompt": prompt, "text": text}


def main() -> None:
    found = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
        found.append([answer(tokenizer, one) for one in job["conversations"]])
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
