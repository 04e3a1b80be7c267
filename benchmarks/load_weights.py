"""Memory and speed of loading weights, beside PaddleNLP's own way.

    python benchmarks/load_weights.py [--size 1GB] [--ranks 4]

Memory: tensor-parallel ranks on this machine load a generated Llama, first with Oarlock, then each for itself with
PaddleNLP's from_pretrained. `over` is a rank's peak (VmHWM: all pages of the process, those of mapped files included)
above what it held just before; `beyond it` is what of that is not its part of the model, and should stay below the
`bound` of the largest tensor (two on the rank that reads) + 64 MB. Speed: one process loads the model and reads the
same files plainly (to memory that is kept, as weights are), in turn, with the same state of the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import free_of_noise, report

MB = 1 << 20
SHARD_BYTES = 400 * MB
FORMS = ("paddle", "hugging_face", "bfloat16")  # float32 in either layout; bfloat16 as on the hub
SIZES = {
    "50MB": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 12},
    "1GB": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18},
    "3GB": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 13},
}


def generate(folder: Path, form: str, sizes: dict[str, int]) -> None:
    """Random weights in shards, as people have them."""
    import ml_dtypes
    import numpy as np
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM
    from safetensors.numpy import save_file

    from oarlock.models.construct import without_values

    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=heads, architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(str(folder))
    with without_values():
        shapes = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    random = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes.items():
        if form != "paddle":
            shape = shape[::-1] if "proj" in name or "lm_head" in name else shape
            name = name.replace("llama.", "model.")
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)  # as models begin
        values += len(shape) == 1  # of norms
        values = values.astype(ml_dtypes.bfloat16) if form == "bfloat16" else values
        if sum(array.nbytes for array in shards[-1].values()) + values.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = values
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "np" if form == "paddle" else "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def build_ours(folder: Path, config: Any) -> Any:
    from oarlock.models.build import ModelSource, build_model

    return build_model(ModelSource(folder, config, from_weights=True))


def build_theirs(folder: Path, config: Any) -> Any:
    from paddlenlp.transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), config=config, dtype="float32")


def kilobytes(field: str) -> int:
    """A field of this process's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def rank_memory(folder: Path, out: Path, way: str) -> int:
    """In a rank: build the model and write down what it took."""
    import paddle
    import paddle.distributed.fleet as fleet
    from paddlenlp.transformers import AutoConfig

    from oarlock.cpu_ranks import fleet_patches, process_group
    from oarlock.environment.ranks import rank, world_size
    from oarlock.parallel.object_collectives import barrier
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
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
    before, start = kilobytes("VmHWM"), time.perf_counter()
    model = (build_ours if way == "oarlock" else build_theirs)(folder, config)
    seconds = time.perf_counter() - start
    peak = kilobytes("VmHWM")
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


def in_child(action: Callable[[], Any]) -> Any:
    """The action's result (JSON) from a process of its own, so that nothing is warm from the last time."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(write_end, json.dumps(action()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        result = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("a measurement failed, see above")
    return json.loads(result)


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
                    seconds.append(in_child(partial(seconds_of, folder, way, cold)))
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
    report("load rate of one process", rows, repeats=repeats, load_average=free_of_noise())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1GB")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--only", choices=("memory", "speed"))
    parser.add_argument("--repeats", type=int, default=5, help="of the speed measurement")
    parser.add_argument("--folder", help="for the generated weights; by default the system's temporary folder")
    words = parser.parse_args()
    from oarlock.environment.cpu import available_cores
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle(available_cores())
    import paddlenlp.transformers  # noqa: F401

    set_paddlenlp_log_level("error")
    with tempfile.TemporaryDirectory(prefix="oarlock-load-", dir=words.folder) as name:
        folders = {form: Path(name) / form for form in FORMS}
        for form, folder in folders.items():
            in_child(partial(generate, folder, form, SIZES[words.size]))
        if words.only != "speed":
            measure_memory(folders["paddle"], Path(name), words.ranks)
        if words.only != "memory":
            measure_speed(folders, words.repeats)


if __name__ == "__main__":
    main()
