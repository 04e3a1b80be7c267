"""Memory and time of merging a LoRA adapter into a generated Llama, compared with copying its files.

    python benchmarks/merge.py [--size 1GB]

`over` is the peak of the process (VmHWM: all pages, those of mapped files included) minus what it held after its
imports. The `bound` is twice the largest tensor (in the wider of the stored and the written type) + 300 MB. Every row
is a process of its own, in turns. Copying is followed by fsync, as merging is. `speed` is relative to copying.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import MB, import_paddlenlp, load_average, make_parser, read_status_kb, report, reset_peak, run_in_child
from generated_model import FORMS, SHARD_BYTES, SIZES, generate


def make_adapter(base: Path, folder: Path, rank: int) -> None:
    """Random LoRA matrices for every linear layer of the transformer."""
    import numpy as np
    from paddlenlp.transformers import AutoConfig

    from oarlock.model_config.load import find_model_class
    from oarlock.models.layer_offload import make_empty_model
    from oarlock.peft.adapter_folder import Base, save_adapter
    from oarlock.peft.lora import LoRA
    from oarlock.peft.method import trainable_parameters
    from oarlock.weights.safetensors_file import TensorSource

    config, method, random = AutoConfig.from_pretrained(str(base)), LoRA(rank, 2.0 * rank), np.random.default_rng(1)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    held = trainable_parameters(make_empty_model(find_model_class(config), config, method))
    tensors = [TensorSource(h.name, "float32", h.slice.shape, partial(values, h.slice.shape)) for h in held]
    save_adapter(tensors, method, Base.from_folder(str(base), base), None, None, folder)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def largest_tensor(folder: Path) -> int:
    """Bytes."""
    from oarlock.weights.safetensors_file import SafetensorsFile

    sizes = []
    for path in files_of(folder):
        with SafetensorsFile(path) as file:
            for tensor in file.tensors.values():
                size = tensor.dtype.itemsize
                for length in tensor.shape:
                    size *= length
                sizes.append(size)
    return max(sizes)


def measured(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds and peak memory of a run in this process, which does nothing else, and the difference it found."""
    import paddle

    paddle.set_device("cpu")
    reset_peak()
    before, start = read_status_kb("VmHWM"), time.perf_counter()
    found = run()
    return {
        "seconds": time.perf_counter() - start,
        "over MB": (read_status_kb("VmHWM") - before) // 1024,
        "difference": found.difference if found else "",
    }


def compare_with_copying(
    source: Path, output: Path, ways: Mapping[str, Callable[[], dict[str, Any]]], repeats: int
) -> list[dict[str, Any]]:
    """A row for copying and for each of the ways (results of measured()), in turns, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ("copy", *ways)}
    for _ in range(repeats):
        for way, found in runs.items():
            run = ways.get(way)
            found.append(run_in_child(run) if run else {"seconds": run_in_child(partial(copy, source, output))})
            shutil.rmtree(output)
    medians = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
    return [
        {
            "MB": sum(path.stat().st_size for path in files_of(source)) // MB,
            "way": way,
            "seconds": medians[way],
            "speed": medians["copy"] / medians[way],
            "over MB": max(run["over MB"] for run in found) if way in ways else "",
            "bound MB": 2 * largest_tensor(source) // MB + 300 if way in ways else "",
            "difference": found[-1].get("difference", ""),
        }
        for way, found in runs.items()
    ]


def merged(base: Path, adapter: Path, output: Path, proof: bool) -> dict[str, Any]:
    from oarlock.merge.inputs import AdapterMix
    from oarlock.merge.merge import MergeOptions, merge

    options = MergeOptions(proof=proof, max_shard_bytes=SHARD_BYTES)
    return measured(lambda: merge(base, AdapterMix.open([adapter]), output, options))


def copy(base: Path, output: Path) -> float:
    output.mkdir()
    start = time.perf_counter()
    for path in files_of(base):
        shutil.copyfile(path, output / path.name)
        descriptor = os.open(output / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="1GB")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="for the generated weights; by default the system's temporary folder")
    words = parser.parse_args()
    import_paddlenlp()
    import paddlenlp.transformers  # noqa: F401

    import oarlock.merge.merge  # noqa: F401

    rows = []
    for form in FORMS:
        with tempfile.TemporaryDirectory(prefix="oarlock-merge-", dir=words.folder) as name:
            base, adapter, output = (Path(name) / part for part in ("base", "adapter", "merged"))
            run_in_child(partial(generate, base, form, SIZES[words.size]))
            adapter.mkdir()
            run_in_child(partial(make_adapter, base, adapter, words.rank))
            run = partial(merged, base, adapter, output)
            ways = {"merge": partial(run, False), "merge and proof": partial(run, True)}
            rows += [{"files": form} | row for row in compare_with_copying(base, output, ways, words.repeats)]
    within = all(row["over MB"] <= row["bound MB"] for row in rows if row["way"] != "copy")
    report("merging", rows, within_bound=within, repeats=words.repeats, load_average=load_average())


if __name__ == "__main__":
    main()
