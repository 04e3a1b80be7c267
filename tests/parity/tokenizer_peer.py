"""The other side of tests/parity/test_tokenizer_matrix.py: transformers 5, in the Python of scripts/parity_env.sh.

    python tokenizer_peer.py JOBS.json OUT.json

Jobs: "save" [from, to] pairs, folders that save_pretrained is to write; "read" folders; "texts"; "messages". For each
folder read: the class, the ids of each text with and without begin and end tokens, its decoded text, and what
tokenizer.json gives as it stands. Does not import oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast


def read(folder: str, texts: list[str], messages: list[dict[str, str]]) -> dict[str, Any]:
    # mistral_format: only what transformers itself reads, not what mistral-common makes of a tekken.json
    tokenizer = AutoTokenizer.from_pretrained(folder, mistral_format=False)
    found = {"class": type(tokenizer).__name__, **encoded(tokenizer, texts)}
    found["special"] = tokenizer.special_tokens_map
    if tokenizer.chat_template:
        found["prompt"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if (Path(folder) / "tokenizer.json").is_file():
        found["as it stands"] = encoded(PreTrainedTokenizerFast.from_pretrained(folder), texts)
    return found


def encoded(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    whole = [tokenizer(text)["input_ids"] for text in texts]
    decoded = [tokenizer.decode(row) for row in whole]
    words = [tokenizer.decode(row, skip_special_tokens=True) for row in whole]
    return {"ids": ids, "whole": whole, "decoded": decoded, "words": words}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for source, target in jobs["save"]:
        AutoTokenizer.from_pretrained(source, mistral_format=False).save_pretrained(target)
    found = {folder: read(folder, jobs["texts"], jobs["messages"]) for folder in jobs["read"]}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
