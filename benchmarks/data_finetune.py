"""Fine-tuning data: time and peak memory of tokenising a large .jsonl, of loading it from the cache, and of reading it.

    python benchmarks/data_finetune.py [--megabytes 1000]

The records are questions and answers cut from the text of the standard library, with the embedded tokenizer and
template. Each row is a process of its own. `peak` is all its memory (ru_maxrss: Paddle's import and the pages of mapped
files included), `own at the end` the part that is not backed by files (RssAnon). "nothing" imports the same and loads
the embedded instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import make_parser, report

CHUNK = 700  # characters of a record, a third of them the question


def write_records(path: Path, megabytes: int) -> int:
    """A .jsonl of src/tgt records; returns how many."""
    from oarlock.data.embedded.stdlib_text import read_stdlib_texts

    texts = list(read_stdlib_texts())
    written = records = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            for text in texts:
                for start in range(0, len(text) - CHUNK, CHUNK):
                    part = text[start : start + CHUNK]
                    line = json.dumps({"src": f"{records} {part[: CHUNK // 3]}", "tgt": f"{part[CHUNK // 3 :]}."})
                    file.write(line + "\n")
                    written, records = written + len(line) + 1, records + 1
                if written >= megabytes * 1e6:
                    break
    return records


def measure(action: str, data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """Run one action in a process of its own."""
    words = [sys.executable, __file__, "--action", action, "--data", str(data), "--tokenizer", str(tokenizer)]
    output = subprocess.run([*words, "--cache", str(cache)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def act(action: str, data: str | None, tokenizer_folder: str, cache: str) -> dict[str, Any]:
    """Load, and where asked for read every example once."""
    import resource

    from oarlock.config.finetune import FinetuneDataSection
    from oarlock.environment.paddle_import import import_paddle

    import_paddle()
    from oarlock.data.examples.dataset import load_finetune_data
    from oarlock.data.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    started = time.perf_counter()
    train = load_finetune_data(FinetuneDataSection(dataset_name_or_path=data, data_cache_dir=cache), tokenizer).train
    if action == "read":
        started = time.perf_counter()
        for i in range(len(train)):
            train[i]
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    own = int(status.split("RssAnon:")[1].split()[0]) / 1e3
    return {"examples": len(train), "seconds": seconds, "peak MB": peak, "own at the end, MB": own}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--megabytes", type=int, default=1000, help="of the larger file, 10 or more; the smaller one has a tenth"
    )
    for name in ("--action", "--data", "--tokenizer", "--cache"):  # of a process that measures
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.megabytes < 10:
        parser.error(f"--megabytes {arguments.megabytes}: must be 10 or more")
    if arguments.action:
        data = arguments.data if arguments.action != "nothing" else None
        print(json.dumps(act(arguments.action, data, arguments.tokenizer, arguments.cache)))
        return
    from oarlock.data.embedded.tokenizer import train_tokenizer

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer")
        for megabytes in (arguments.megabytes // 10, arguments.megabytes):
            write_records(folder / "data.jsonl", megabytes)
            time.sleep(2.1)  # hashes of files just written are not noted
            for action in ("nothing", "tokenise", "find it tokenised", "read"):
                found = measure(action, folder / "data.jsonl", folder / "tokenizer", folder / "cache")
                size = megabytes if action != "nothing" else 0
                rows.append({"what": action, "MB": size, **found, "MB/s": size / found["seconds"]})
        stored = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()) / 1e6
    report("data finetune", rows, cache_mb=stored)


if __name__ == "__main__":
    main()
