"""Saving a checkpoint on two ranks, in the foreground and in the background, and consolidating it into a model.

    python benchmarks/checkpoint_save.py [--saves 4] [--steps 8]

One training run (tensor parallel 2, float32, a Llama of 234 MB, checkpoints of 702 MB with AdamW's states) alternates
between the two ways. `stall s`: training waits inside the save; the longer of the two ranks. `lost s`: the stall, and
how much longer the steps take until the checkpoint exists, compared with the median step in which nothing is written
(the ranks compute on all cores, so that writing takes time from them). `exists after s`: from the start of the save to
the renamed folder.

Then `oarlock checkpoint consolidate` takes turns with `cp` of the model file that it writes, followed by `sync`, as
consolidate does too. Memory is the peak (VmHWM: mapped pages too) minus what the process held before.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import ROOT, format_range, load_average, make_parser, peak_mb, report, run_in_child

RANKS = 2
REPEATS = 3
SIZES = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
WAYS = {False: "in the foreground", True: "--async_save"}


def make_inputs(folder: Path) -> None:
    """config.json, a tokenizer and a small corpus."""
    from oarlock.data.corpus.build_corpus import BuildOptions, build_corpus
    from oarlock.data.embedded.tokenizer import train_tokenizer

    train_tokenizer(folder / "model", 1024)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 256}
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES, **heads}
    (folder / "model" / "config.json").write_text(json.dumps(content))
    sources = sorted((ROOT / "llm" / "oarlock").glob("*/*.py"))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": path.read_text()}) for path in sources))
    build_corpus(
        BuildOptions((str(folder / "text.jsonl"),), str(folder / "model"), str(folder / "data" / "c"), workers=1)
    )


def rank_main(folder: Path, saves: int, steps: int) -> int:
    """Pretraining in which every other save is in the background; what was measured goes to rank-N.json."""
    from oarlock.config.load import load_config
    from oarlock.config.pretrain import PretrainConfig
    from oarlock.environment.ranks import rank
    from oarlock.train import pretrain
    from oarlock.train.checkpoint.writer import CheckpointWriter
    from oarlock.train.trainer import OarlockTrainer

    really_save, really_report = CheckpointWriter.save, CheckpointWriter._report
    really_step = OarlockTrainer.training_step
    measured: list[dict[str, Any]] = []
    step_starts: list[float] = []

    def save(writer: Any, state: Any, *arguments: Any) -> None:
        writer.background = len(measured) % 2 == 1
        row: dict[str, Any] = {"background": writer.background, "step": state.global_step, "start": time.perf_counter()}
        measured.append(row)
        really_save(writer, state, *arguments)
        row["stall"] = time.perf_counter() - row["start"]

    def report_end(writer: Any, saved: Any, *arguments: Any) -> None:
        really_report(writer, saved, *arguments)
        row = next(row for row in measured if row["step"] == saved.manifest.step)  # the next save may have begun
        row["exists"] = time.perf_counter()

    def step(*arguments: Any, **keywords: Any) -> Any:
        step_starts.append(time.perf_counter())
        return really_step(*arguments, **keywords)

    for owner, name, replacement in (
        (CheckpointWriter, "save", save),
        (CheckpointWriter, "_report", report_end),
        (OarlockTrainer, "training_step", step),
    ):
        setattr(owner, name, replacement)
    options = {
        "model_name_or_path": folder / "model", "input_dir": folder / "data", "output_dir": folder / "out",
        "tensor_parallel_degree": RANKS, "max_seq_length": 32, "per_device_train_batch_size": 1, "split": "100,0,0",
        "max_steps": (saves + 1) * steps, "save_steps": steps, "save_total_limit": 1, "do_train": 1, "device": "cpu",
        "num_threads": 1, "report_to": "none", "logging_steps": steps, "disable_tqdm": 1, "log_level": "error",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    code = pretrain.pretrain(load_config(PretrainConfig, words))
    (folder / f"rank-{rank()}.json").write_text(json.dumps({"saves": measured, "steps": step_starts}))
    return code


def measure_saves(folder: Path, saves: int, steps: int) -> list[dict[str, Any]]:
    """A row a way; the first save of the run warms up and the last is left out, since no step follows it."""
    from oarlock.cpu_ranks.fork_launch import launch
    from oarlock.train import pretrain  # noqa: F401  (before the fork)

    codes = launch(RANKS, partial(rank_main, folder, saves, steps), folder / "log", timeout_s=1500, quiet=True)
    if any(codes):
        raise SystemExit("".join(log.read_text()[-3000:] for log in sorted((folder / "log").iterdir())))
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(RANKS)]
    starts = ranks[0]["steps"]
    found = [
        {
            "background": row["background"],
            "stall": max(rank["saves"][i]["stall"] for rank in ranks),
            "exists": row["exists"] - row["start"],
            "span": (row["start"], max(row["exists"], row["start"] + row["stall"])),
        }
        for i, row in enumerate(ranks[0]["saves"])
    ]
    spans = [row["span"] for row in found]
    durations = [
        (begin, end - begin, any(begin < last and first < end for first, last in spans))
        for begin, end in pairwise(starts)
    ]
    quiet = statistics.median(seconds for _, seconds, busy in durations if not busy)
    rows = []
    for background, name in WAYS.items():
        chosen = [row for row in found[1:-1] if row["background"] == background]
        lost = [
            row["stall"] + sum(s - quiet for b, s, _ in durations if row["span"][0] < b < row["span"][1])
            for row in chosen
        ]
        rows.append(
            {
                "save": name,
                "stall s": _median(row["stall"] for row in chosen),
                "lost s": _median(lost),
                "exists after s": _median(row["exists"] for row in chosen),
                "saves": len(chosen),
                "step s": round(quiet, 3),
            }
        )
    return rows


def _median(values: Any) -> str:
    numbers = list(values)
    return f"{statistics.median(numbers):.2f} ({format_range(numbers)})"


def measure_action(action: Callable[[], None]) -> tuple[float, float]:
    """(seconds, MB of peak above what is held before)."""
    started = time.perf_counter()
    peak = peak_mb(action)
    return time.perf_counter() - started, peak


def measure_consolidate(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """consolidate with and without checksums of the checkpoint, and cp, in turn."""
    from oarlock.train.checkpoint.inspect import consolidate
    from oarlock.train.checkpoint.manifest import list_checkpoints
    from oarlock.weights.sharded_store import ShardedStore

    checkpoint = list_checkpoints(folder / "out")[0]
    one, copy = folder / "one", folder / "copy.safetensors"
    run_in_child(partial(consolidate, checkpoint, one, 10**10))
    model = shutil.move(one / "model.safetensors", folder / "model.safetensors")
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run(["cp", model, copy], check=True)
        times.setdefault("cp", []).append((time.perf_counter() - started, 0.0))
        subprocess.run(["sync", copy], check=True)
        times.setdefault("cp and sync", []).append((time.perf_counter() - started, 0.0))
        copy.unlink()
        for name, check in (("consolidate --no-verify", False), ("consolidate", True)):
            shutil.rmtree(one)
            times.setdefault(name, []).append(
                run_in_child(partial(measure_action, partial(consolidate, checkpoint, one, 10**10, check)))
            )
    with ShardedStore.open(checkpoint) as pieces:
        sizes = [4e-6 * float(_elements(pieces.shape("model", name))) for name in pieces.names()]
    rows = [
        {
            "what": name,
            "seconds": _median(seconds for seconds, _ in values),
            "MB/s": sum(sizes) / statistics.median(seconds for seconds, _ in values),
            "peak MB above": max(peak for _, peak in values) if "consolidate" in name else "",
        }
        for name, values in times.items()
    ]
    return rows, {"model_mb": sum(sizes), "largest_tensor_mb": max(sizes)}


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--saves", type=int, default=4, help="of each way")
    parser.add_argument("--steps", type=int, default=8, help="between saves")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from oarlock.environment.paddle_import import import_paddle

    import_paddle(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        make_inputs(folder)
        rows = measure_saves(folder, 2 * arguments.saves + 1, arguments.steps)
        report("saving a checkpoint", rows, ranks=RANKS, load_average=load_average())
        rows, sizes = measure_consolidate(folder)
        report("oarlock checkpoint consolidate", rows, **sizes, load_average=load_average())


if __name__ == "__main__":
    main()
