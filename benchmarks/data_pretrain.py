"""`oarlock data pretrain`: its speed compared with the tokenizer alone, and its peak memory for a large input.

    python benchmarks/data_pretrain.py [--megabytes 2000]

Both use all cores. The tokenizer alone is `tokenizers.Tokenizer.encode_batch_fast` over texts in memory (with its own
threads), the fastest call of that library. The two take turns, three times each, on the same 60 MB. Then the whole
input is tokenised once, while the memory of all its processes is watched.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, TreeMemory, format_range, make_parser, report

SAMPLE_MB = 60


def write_input(path: Path, megabytes: int) -> list[str]:
    """A .jsonl of the standard library's files, again and again; returns the documents of the first SAMPLE_MB."""
    from oarlock.data.embedded.stdlib_text import read_stdlib_texts

    texts = list(read_stdlib_texts())
    sample, written, taken = [], 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            for i, text in enumerate(texts):
                line = json.dumps({"text": f"# {written} {i}\n{text}"}) + "\n"
                file.write(line)
                written += len(line)
                if taken < SAMPLE_MB * 1e6:
                    sample.append(line)
                    taken += len(line)
                if written >= megabytes * 1e6:
                    break
    return sample


def build(source: Path, tokenizer: Path, prefix: Path) -> subprocess.Popen:
    """The command, started."""
    words = ["-m", "oarlock", "data", "pretrain", "--input", source, "--tokenizer", tokenizer]
    words += ["--output-prefix", prefix, "--overwrite"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "llm")}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def seconds_of_command(source: Path, tokenizer: Path, prefix: Path) -> float:
    """Its own measure of the work (start-up of Python left out, reading and writing included)."""
    output = build(source, tokenizer, prefix).communicate()[0]
    found = re.search(r" MB, in ([0-9.]+) s ", output)
    if not found:
        raise SystemExit(f"the command has not printed how long it took:\n{output}")
    return float(found[1])


def seconds_of_tokenizer(lines: list[str], tokenizer: Path) -> float:
    """encode_batch_fast over all texts, nothing else."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in lines]
    started = time.perf_counter()
    for first in range(0, len(texts), 256):
        backend.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
    return time.perf_counter() - started


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=2000)
    arguments = parser.parse_args()
    from oarlock.data.embedded.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        train_tokenizer(folder / "tokenizer")
        lines = write_input(folder / "large.jsonl", arguments.megabytes)
        (folder / "sample.jsonl").write_text("".join(lines), encoding="utf-8")
        megabytes = (folder / "sample.jsonl").stat().st_size / 1e6
        ours, alone = [], []
        for _ in range(3):
            ours.append(megabytes / seconds_of_command(folder / "sample.jsonl", folder / "tokenizer", folder / "s"))
            alone.append(megabytes / seconds_of_tokenizer(lines, folder / "tokenizer"))
        process = build(folder / "large.jsonl", folder / "tokenizer", folder / "l")
        memory = TreeMemory(process.pid)
        started = time.perf_counter()
        process.communicate()
        seconds, peak = time.perf_counter() - started, memory.stop()
        size = (folder / "large.jsonl").stat().st_size / 1e6
    print(f"{size:,.0f} MB in {seconds:,.0f} s, peak memory of all processes {peak:,.0f} MB")
    report(
        "data pretrain",
        [
            {"what": "tokenizer alone", "MB/s": statistics.median(alone), "spread": format_range(alone)},
            {"what": "oarlock data pretrain", "MB/s": statistics.median(ours), "spread": format_range(ours)},
            {"what": "ratio", "MB/s": statistics.median(ours) / statistics.median(alone), "spread": ""},
        ],
        large={"megabytes": size, "seconds": seconds, "peak_memory_mb": peak, "exit_code": process.returncode},
    )


if __name__ == "__main__":
    main()
