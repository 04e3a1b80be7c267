"""A training step (forward, backward, AdamW) of Llama on a CPU in float32, beside Hugging Face's on torch.

    python benchmarks/train_step.py --peer PYTHON_WITH_TORCH [--lora 8] [--sizes small medium large] [--rounds 5]

Every side runs in a process of its own, one at a time, in turns. A round's figure is the median of its steps; the table
has the median of the rounds, the spread of them, and the median of the ratios to the peer within a round. The peer is
peer_torch.py, as it is and with torch.compile, in .venv-parity/bin/python (`bash scripts/parity_env.sh`) or another
Python with torch, transformers and peft. "Products" is the part of the step that the products of the linear layers take
when they run alone on the step's shapes; attention's are not counted. "Others" is the most that other programs took of
the cores while a side ran.
Without --peer, only Oarlock's sides run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import report

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden": 256, "layers": 4, "heads": 4, "vocab": 4096, "seq": 256, "batch": 8},
    "medium": {"hidden": 512, "layers": 8, "heads": 8, "vocab": 8192, "seq": 512, "batch": 2},
    "large": {"hidden": 1024, "layers": 4, "heads": 16, "vocab": 32000, "seq": 1024, "batch": 1},
}
PEER_SCRIPT = Path(__file__).with_name("peer_torch.py")


def flags(size: str, lora: int, steps: int) -> list[str]:
    """As the peer's script takes them."""
    settings = SIZES[size] | {"steps": steps, "lora": lora}
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run_side(command: list[str], tries: int, threads: int) -> dict[str, Any]:
    """Run a side, anew while others take more than 5% of the cores; the least disturbed run's JSON line.

    Added to it: the peak memory of the process (resident), MB, and the cores' share that others took.
    """
    best: dict[str, Any] = {}
    for _ in range(tries):
        run = run_once(command, threads)
        if not best or run["others"] < best["others"]:
            best = run
        if best["others"] < 0.05:
            break
    return best


def busy_seconds() -> tuple[float, float]:
    """Of all cores since the machine started, and of this process's ended children."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq = (int(word) for word in first[1:8])
    times = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), times[2] + times[3]


def run_once(command: list[str], threads: int) -> dict[str, Any]:
    """See run_side."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    (all_before, own_before), started = busy_seconds(), time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        side = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        limit = threading.Timer(900, side.kill)
        limit.start()
        # The kernel's own account of the peak: to look while a step runs would slow it down.
        _, status, used = os.wait4(side.pid, 0)
        limit.cancel()
        side.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said = out.read()
        if side.returncode:
            sys.exit(f"{' '.join(command)}\n{err.read()[-2000:]}")
    (all_after, own_after), wall = busy_seconds(), time.perf_counter() - started
    others = (all_after - all_before - (own_after - own_before)) / (wall * len(os.sched_getaffinity(0)))
    return json.loads(said.strip().splitlines()[-1]) | {"peak_mb": used.ru_maxrss / 1e3, "others": max(0.0, others)}


def oarlock_side(options: argparse.Namespace) -> dict[str, Any]:
    """The step as Oarlock's trainer makes it, in this process."""
    from oarlock.environment.paddle_import import import_paddle, start_up_left_uncollected

    import_paddle()
    import paddle
    from paddlenlp.transformers import LlamaConfig

    from oarlock.models.build import ModelSource, build_model
    from oarlock.ops.install import defer_logits, use
    from oarlock.peft.lora import LoRA
    from oarlock.train.step.loss import TokenCrossEntropy

    size = SIZES[options.side]
    paddle.set_device("cpu")
    use(not options.plain)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=intermediate(size["hidden"]),
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        max_position_embeddings=size["seq"],
        use_flash_attention=False,
        use_fused_rms_norm=False,
        use_cache=False,
        seq_length=size["seq"],
    )
    config.use_fast_layer_norm = False
    method = LoRA(options.lora, 2 * options.lora) if options.lora else None
    model = build_model(ModelSource(Path(), config, from_weights=False), method=method)
    model.train()
    defer_logits(model)
    loss_of = TokenCrossEntropy()
    loss_of.normalizer = size["batch"] * size["seq"]
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=trained, weight_decay=0.01)
    ids = paddle.randint(0, size["vocab"], [size["batch"], size["seq"]])
    seconds, value = [], 0.0
    now = time.process_time if options.one_thread else time.perf_counter
    with start_up_left_uncollected():
        for _ in range(options.steps):
            start = now()
            loss = loss_of(model(input_ids=ids), ids)
            loss.backward()
            optimizer.step()
            optimizer.clear_grad(set_to_zero=False)
            value = loss.item()
            seconds.append(now() - start)
    step = statistics.median(seconds[2:])
    return {
        "seconds_per_step": step,
        "tokens_per_second": size["batch"] * size["seq"] / step,
        "loss": value,
        "product_seconds": product_seconds(size, options.lora, now) if options.products else None,
    }


def intermediate(hidden: int) -> int:
    """As the peer's script has it."""
    return int(hidden * 8 / 3) // 64 * 64


def product_seconds(size: dict[str, int], lora: int, now: Callable[[], float]) -> float:
    """What the products of a step's linear layers take alone: forward, for the input, and (full) for the weight."""
    import paddle

    hidden, tokens = size["hidden"], size["batch"] * size["seq"]
    inner, layers = intermediate(hidden), size["layers"]
    total = 0.0
    for width, out, count in (
        (hidden, hidden, 4 * layers),
        (hidden, inner, 2 * layers),
        (inner, hidden, layers),
        (hidden, size["vocab"], 1),
    ):
        x, weight, grad = paddle.randn([tokens, width]), paddle.randn([width, out]), paddle.randn([tokens, out])
        products = [(x, weight, False, False), (grad, weight, False, True)]
        if not lora:
            products.append((x, grad, True, False))
        for a, b, transpose_a, transpose_b in products:
            times = []
            for _ in range(5):
                start = now()
                paddle.matmul(a, b, transpose_a, transpose_b)
                times.append(now() - start)
            total += count * statistics.median(times[1:])
    return total


def compare(options: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """Rows of the table for a size."""
    common = flags(size, options.lora, options.steps)
    own = [sys.executable, __file__, "--side", size, "--lora", str(options.lora), "--steps", str(options.steps)]
    threads = len(os.sched_getaffinity(0))
    if options.one_thread:
        threads, common, own = 1, [*common, "--processor-time"], [*own, "--one-thread"]
    sides = {"Oarlock": own, "--fused_ops false": [*own, "--plain"]}
    if options.peer:
        sides["torch"] = [options.peer, str(PEER_SCRIPT), *common]
        sides["torch.compile"] = [*sides["torch"], "--compile"]
    sides = {name: command for name, command in sides.items() if name in (options.only or sides)}
    turns = range(options.rounds)
    rounds = [{name: run_side(command, options.tries, threads) for name, command in sides.items()} for _ in turns]
    alone = run_side([*own, "--products"], options.tries, threads)[
        "product_seconds"
    ]  # apart: it needs memory of its own

    def median(name: str, key: str) -> float:
        return statistics.median(one[name][key] for one in rounds)

    rows = []
    for name in sides:
        rates = [one[name]["tokens_per_second"] for one in rounds]
        row: dict[str, Any] = {"size": size, "lora": options.lora, "side": name, "tokens/s": statistics.median(rates)}
        row["from"], row["to"] = min(rates), max(rates)
        row["ms/step"] = 1e3 * median(name, "seconds_per_step")
        row["peak MB"] = median(name, "peak_mb")
        for peer in ("torch", "torch.compile"):
            if peer in sides:
                row[f"x {peer}"] = statistics.median(
                    one[name]["tokens_per_second"] / one[peer]["tokens_per_second"] for one in rounds
                )
        row["products"] = alone / median(name, "seconds_per_step") if name == "Oarlock" else ""
        row["others"] = max(one[name]["others"] for one in rounds)
        rows.append(row)
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python with torch, transformers and peft")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all parameters")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="of the table's sides: Oarlock torch ...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=3, help="of a run while others take more than 5%% of the cores")
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="one thread a side, and the processor's time in place of the clock's: where others use the machine",
    )
    parser.add_argument("--products", action="store_true", help="of --side: time the linear layers' products too")
    parser.add_argument("--steps", type=int, default=10, help="of a side in a round; the first two are left out")
    parser.add_argument("--side", choices=list(SIZES), help="run Oarlock's step of this size alone, and print JSON")
    parser.add_argument("--plain", action="store_true", help="of --side: without the fused ops")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(oarlock_side(options)))
        return
    rows = [row for size in options.sizes for row in compare(options, size)]
    report("training step" + (f", LoRA {options.lora}" if options.lora else ""), rows)


if __name__ == "__main__":
    main()
