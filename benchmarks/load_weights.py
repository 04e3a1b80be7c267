"""Memory and speed of loading weights, compared with PaddleNLP's own loader.

    python benchmarks/load_weights.py [--size 1GB] [--ranks 4]

Memory: tensor-parallel ranks on this machine load a generated Llama, first with Oarlock, then each on its own with
PaddleNLP's from_pretrained. `over` is the peak of a rank (VmHWM: all pages of the process, those of mapped files
included) minus what it held just before. `beyond it` is the part of that which is not its shard of the model. It should
stay below the `bound`: the largest tensor (two on the rank that reads) + 64 MB. Speed: one process loads the model and
reads the same files plainly (into memory that is kept, as weights are), in turns, with the same state of the page
cache.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import MB, import_paddlenlp, load_average, make_parser, read_status_kb, report, reset_peak, run_in_child
from generated_model import FORMS, SIZES, generate


def build_ours(folder: Path, config: Any) -> Any:
    from oarlock.models.build import ModelSource, build_model

    return build_model(ModelSource(folder, config, from_weights=True))


def build_theirs(folder: Path, config: Any) -> Any:
    from paddlenlp.transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), config=config, dtype="float32")


def rank_memory(folder: Path, out: Path, way: str) -> int:
    """In a rank: build the model and write down what it took."""
    import paddle
    import paddle.distributed.fleet as fleet
    from paddle.distributed import barrier
    from paddlenlp.transformers import AutoConfig

    from oarlock.cpu_ranks import fleet_patches, process_group
    from oarlock.environment.ranks import rank, world_size
    from oarlock.weights.layout import parameter_shards

    paddle.set_device("cpu")
    process_group.install()
    fleet_patches.install()
    paddle.distributed.init_parallel_env()
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": world_size(), "pp_degree": 1, "sharding_degree": 1}
    fleet.init(is_collective=True, strategy=strategy)
    config = AutoConfig.from_pretrained(str(folder))
    config.tensor_parallel_degree, config.tensor_parallel_rank = world_size(), rank()
    barrier()
    reset_peak()
    before, start = read_status_kb("VmHWM"), time.perf_counter()
    model = (build_ours if way == "oarlock" else build_theirs)(folder, config)
    seconds = time.perf_counter() - start
    peak = read_status_kb("VmHWM")
    held = parameter_shards(model)
    part = sum(parameter.tensor._numel() * parameter.tensor.element_size() for parameter in held)
    largest = max(4 * int(paddle.to_tensor(parameter.slice.shape).prod()) for parameter in held)
    row = {
        "way": way,
        "rank": rank(),
        "before MB": before // 1024,
        "peak MB": peak // 1024,
        "over MB": (peak - before) // 1024,
        "its part MB": part // MB,
        "beyond it MB": (peak - before) // 1024 - part // MB,
        "bound MB": largest * (2 if way == "oarlock" and rank() == 0 else 1) // MB + 64,
        "seconds": round(seconds, 2),
    }
    (out / f"{way}-{rank()}.json").write_text(json.dumps(row))
    return 0


def measure_memory(folder: Path, out: Path, num_ranks: int) -> None:
    from oarlock.cpu_ranks.fork_launch import launch

    rows = []
    for way in ("oarlock", "PaddleNLP"):
        codes = launch(num_ranks, partial(rank_memory, folder, out, way), out / "log", timeout_s=600, quiet=True)
        if any(codes):
            raise SystemExit("".join(log.read_text()[-2000:] for log in sorted((out / "log").iterdir())))
        rows += [json.loads((out / f"{way}-{rank}.json").read_text()) for rank in range(num_ranks)]
    ours, theirs = rows[:num_ranks], rows[num_ranks:]
    report(
        "weights on tensor-parallel ranks",
        rows,
        within_bound=all(row["beyond it MB"] <= row["bound MB"] for row in ours),
        over_as_part_of_paddlenlps={
            "reader": round(ours[0]["over MB"] / theirs[0]["over MB"], 3),
            "others": round(max(row["over MB"] for row in ours[1:]) / max(row["over MB"] for row in theirs[1:]), 3),
        },
    )


def seconds_of(folder: Path, way: str, cold: bool) -> float:
    """Load the model, or read its files to memory that is kept (as weights are), or into one small buffer."""
    import paddle
    from paddlenlp.transformers import AutoConfig

    from oarlock.model_config.load import find_model_class

    paddle.set_device("cpu")
    config = AutoConfig.from_pretrained(str(folder))
    find_model_class(config)  # imports it; Python's modules are not what is measured
    files = sorted(folder.glob("*.safetensors"))
    buffer = bytearray(16 * MB)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            os.fsync(stream.fileno())
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and stream.readinto(buffer):
                pass
    start = time.perf_counter()
    if way == "oarlock":
        build_ours(folder, config)
    elif way == "read":
        kept = [file.read_bytes() for file in files]
        assert kept
    else:
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    return time.perf_counter() - start


def measure_speed(folders: dict[str, Path], repeats: int) -> None:
    rows = []
    for form, folder in folders.items():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for cold in (False, True):
            times: dict[str, list[float]] = {"oarlock": [], "read": [], "read again and again": []}
            for _ in range(repeats):
                for way, seconds in times.items():
                    seconds.append(run_in_child(partial(seconds_of, folder, way, cold)))
            rates = {way: size / MB / statistics.median(seconds) for way, seconds in times.items()}
            best = {way: size / MB / min(seconds) for way, seconds in times.items()}
            rows.append(
                {
                    "files": form,
                    "page cache": "cold" if cold else "warm",
                    "MB": size // MB,
                    "load MB/s": rates["oarlock"],
                    "read MB/s": rates["read"],
                    "load / read": rates["oarlock"] / rates["read"],
                    "best / best": best["oarlock"] / best["read"],
                    "read into one buffer MB/s": rates["read again and again"],
                }
            )
    report("load rate of one process", rows, repeats=repeats, load_average=load_average())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="1GB")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", choices=("memory", "speed"))
    parser.add_argument("--repeats", type=int, default=5, help="of the speed measurement")
    parser.add_argument("--folder", help="for the generated weights; by default the system's temporary folder")
    words = parser.parse_args()
    import_paddlenlp()
    import paddlenlp.transformers  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="oarlock-load-", dir=words.folder) as name:
        folders = {form: Path(name) / form for form in FORMS}
        for form, folder in folders.items():
            run_in_child(partial(generate, folder, form, SIZES[words.size]))
        if words.only != "speed":
            measure_memory(folders["paddle"], Path(name), words.ranks)
        if words.only != "memory":
            measure_speed(folders, words.repeats)


if __name__ == "__main__":
    main()
