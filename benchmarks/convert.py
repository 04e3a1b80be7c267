"""Memory and time of converting a Llama between Paddle's and Hugging Face's layout, compared with copying its files.

    python benchmarks/convert.py [--size 1GB]

`over` is the peak of the process (VmHWM: all pages, those of mapped files included) minus what it held after its
imports. The `bound` is twice the largest tensor + 300 MB. Every row is a process of its own, in turns. Copying is
followed by fsync, as converting is; converting also hashes what it writes. `speed` is relative to copying.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import import_paddlenlp, load_average, make_parser, report, run_in_child
from generated_model import SHARD_BYTES, SIZES, generate
from merge import compare_with_copying, measured

# Generated form -> where it goes; "fused" is Paddle's with fuse_attention_qkv and fuse_attention_ffn.
WAYS = {"paddle": "hf", "hugging_face": "paddle", "bfloat16": "paddle", "fused": "hf"}


def converted(source: Path, output: Path, to: Any, proof: bool) -> dict[str, Any]:
    from oarlock.export.convert import ConvertOptions, convert

    options = ConvertOptions(proof=proof, shard_bytes=SHARD_BYTES)
    return measured(lambda: convert(source, output, to, options).proof)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="1GB")
    parser.add_argument("--only", choices=WAYS, help="one of the forms")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="for the generated weights; by default the system's temporary folder")
    words = parser.parse_args()
    import_paddlenlp()
    import paddlenlp.transformers  # noqa: F401

    import oarlock.export.convert  # noqa: F401

    rows = []
    for form, to in WAYS.items():
        if words.only not in (None, form):
            continue
        with tempfile.TemporaryDirectory(prefix="oarlock-convert-", dir=words.folder) as name:
            source, output = (Path(name) / part for part in ("source", "output"))
            run_in_child(partial(generate, source, form, SIZES[words.size]))
            run = partial(converted, source, output, to)
            ways = {f"to {to}": partial(run, False), f"to {to}, with proof": partial(run, True)}
            rows += [{"files": form} | row for row in compare_with_copying(source, output, ways, words.repeats)]
    ways_of_ours = [row for row in rows if row["way"] != "copy"]
    report(
        "converting",
        rows,
        within_bound=all(row["over MB"] <= row["bound MB"] for row in ways_of_ours),
        half_of_copying=all(row["speed"] >= 0.5 for row in ways_of_ours if "proof" not in row["way"]),
        repeats=words.repeats,
        load_average=load_average(),
    )


if __name__ == "__main__":
    main()
