"""Flip single bits in all files of a checkpoint: each flip must be detected or leave the weights unchanged.

    python tests/fuzz/flips.py --flips 3000

The checkpoint comes from a short training run, or is --checkpoint DIR. A file is chosen first and then a byte of it, so
that small files are hit as often as large ones. Prints a JSON summary; exits with 1 if a harmful flip was not detected.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "llm"), str(ROOT / "tests")]

from oarlock.errors import CheckpointError  # noqa: E402
from oarlock.train.checkpoint.manifest import verify  # noqa: E402
from oarlock.weights.sharded_store import ShardedStore  # noqa: E402


def hash_checkpoint(checkpoint: Path) -> str:
    """Hash of all tensors as a resumed run reads them, and of the fields of the manifest."""
    found = hashlib.sha256(repr(verify(checkpoint)).encode())
    with ShardedStore.open(checkpoint) as pieces:
        for key in sorted(pieces.where):
            kind, _, name = key.partition("/")
            found.update(key.encode() + pieces.read(name, kind).tobytes())
    return found.hexdigest()


def flip_bits(checkpoint: Path, flips: int, seed: int = 0) -> dict[str, object]:
    """Flip one bit at a time in a copy, and count by file how many flips were detected, harmless or undetected."""
    chance = random.Random(seed)
    found: Counter[str] = Counter()
    harmless: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(checkpoint, Path(place) / checkpoint.name)
        whole = hash_checkpoint(copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size)
        for _ in range(flips):
            path = chance.choice(files)
            at, mask = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
            with open(path, "r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ mask]))
            try:
                (harmless if hash_checkpoint(copy) == whole else missed)[path.name] += 1
            except CheckpointError:
                found[path.name] += 1
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(bytes([byte]))
        assert hash_checkpoint(copy) == whole
    counts = {"found": found, "harmless": harmless, "missed": missed}
    return {"flips": flips, "files": len(files)} | {name: sum(count.values()) for name, count in counts.items()} | {
        "by_file": {name: dict(sorted(count.items())) for name, count in counts.items()}
    }  # fmt: skip


def train_checkpoint(folder: Path) -> Path:
    """The checkpoint of a short training."""
    import kill_and_resume

    kill_and_resume.make_model(folder / "model")
    words = kill_and_resume.command(folder / "model", folder / "run", 4)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder / "run" / "checkpoint-4"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        summary = flip_bits(options.checkpoint or train_checkpoint(Path(folder)), options.flips, options.seed)
    print(json.dumps(summary))
    return int(bool(summary["missed"]))


if __name__ == "__main__":
    sys.exit(main())
