"""A training step (forward, backward, AdamW) of Llama on a CPU in float32, compared with Hugging Face's on torch.

    python benchmarks/train_step.py [--lora 8] [--sizes small medium large] [--rounds 5]

Every side runs in a process of its own, one at a time, in turns. The figure of a round is the median of its steps. The
table has the median of the rounds, their range, and the median of the ratios to torch within a round. Torch runs as it
is and with torch.compile, in the Python of --peer. Without that Python, only Oarlock's sides run.

"products" is the part of the step that the products of the linear layers take when they run alone on the step's shapes;
attention's are not counted. "others" is the largest share of the cores that other programs took while a side ran.
"""

from __future__ import annotations

import argparse
import contextlib
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

from common import add_peer_flag, make_parser, report

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden": 256, "layers": 4, "heads": 4, "vocab": 4096, "seq": 256, "batch": 8},
    "medium": {"hidden": 512, "layers": 8, "heads": 8, "vocab": 8192, "seq": 512, "batch": 2},
    "large": {"hidden": 1024, "layers": 4, "heads": 16, "vocab": 32000, "seq": 1024, "batch": 1},
}
OURS = ("Oarlock", "--fused_ops false")
TORCH = ("torch", "torch.compile")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BUSY = 0.05  # share of the cores that others may take before a run is repeated


# a side, in a process of its own


def llama_settings(size: dict[str, int]) -> dict[str, int]:
    """The model of a size, as the LlamaConfig of PaddleNLP and that of transformers name it."""
    return {
        "vocab_size": size["vocab"],
        "hidden_size": size["hidden"],
        "intermediate_size": int(size["hidden"] * 8 / 3) // 64 * 64,
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
        "max_position_embeddings": size["seq"],
    }


def make_oarlock_step(size: dict[str, int], lora: int, fused: bool) -> Callable[[], float]:
    """A step as Oarlock's trainer makes it; returns the loss."""
    from oarlock.environment.paddle_import import import_paddle

    import_paddle()
    import paddle
    from paddlenlp.transformers import LlamaConfig

    from oarlock.decoder.model import defer_logits
    from oarlock.models.build import ModelSource, build_model
    from oarlock.ops.install import use
    from oarlock.peft.lora import LoRA
    from oarlock.train.step.loss import TokenCrossEntropy

    paddle.set_device("cpu")
    use(fused)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **llama_settings(size),
        use_flash_attention=False,
        use_fused_rms_norm=False,
        use_cache=False,
        seq_length=size["seq"],
    )
    config.use_fast_layer_norm = False
    method = LoRA(lora, 2 * lora) if lora else None
    model = build_model(ModelSource(Path(), config, from_weights=False), method=method)
    model.train()
    defer_logits(model)
    criterion = TokenCrossEntropy()
    criterion.normalizer = size["batch"] * size["seq"]
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=trained, weight_decay=0.01)
    ids = paddle.randint(0, size["vocab"], [size["batch"], size["seq"]])

    def step() -> float:
        loss = criterion(model(input_ids=ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        return float(loss)

    return step


def make_torch_step(size: dict[str, int], lora: int, compiled: bool) -> Callable[[], float]:
    """A step of Hugging Face's Llama; returns the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**llama_settings(size))).train()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=LORA_TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, size["vocab"], (size["batch"], size["seq"]))
    if compiled:
        model = torch.compile(model)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of a side in this process. The first two are left out."""
    size = SIZES[options.sizes[0]]
    now = time.process_time if options.one_thread else time.perf_counter
    uncollected: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if options.side in TORCH:
        step = make_torch_step(size, options.lora, options.side == "torch.compile")
    else:
        step = make_oarlock_step(size, options.lora, options.side == "Oarlock")
        from oarlock.environment.memory import freeze_garbage_collection

        uncollected = freeze_garbage_collection()  # as in training
    seconds, loss = [], 0.0
    with uncollected:
        for _ in range(options.steps):
            start = now()
            loss = step()
            seconds.append(now() - start)
    median = statistics.median(seconds[2:])
    found = {"seconds_per_step": median, "tokens_per_second": size["batch"] * size["seq"] / median, "loss": loss}
    if options.products:
        found["product_seconds"] = time_products(size, options.lora, now)
    return found


def time_products(size: dict[str, int], lora: int, now: Callable[[], float]) -> float:
    """Seconds that the products of a step's linear layers take alone: forward, for the input, and (full) the weight."""
    import paddle

    settings, tokens = llama_settings(size), size["batch"] * size["seq"]
    hidden, inner, layers = size["hidden"], settings["intermediate_size"], size["layers"]
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


# the comparison


def measure_side(command: list[str], tries: int, threads: int) -> dict[str, Any]:
    """Run a side, again while others take more than 5% of the cores; what the least disturbed run printed.

    Added to it: the peak memory of the process (resident), MB, and the share of the cores that others took.
    """
    best: dict[str, Any] = {}
    for _ in range(tries):
        run = run_process(command, threads)
        if not best or run["others"] < best["others"]:
            best = run
        if best["others"] < BUSY:
            break
    return best


def run_process(command: list[str], threads: int) -> dict[str, Any]:
    """Run a side once."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    (all_before, own_before), started = read_busy_seconds(), time.perf_counter()
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
        printed = out.read()
        if side.returncode:
            sys.exit(f"{' '.join(command)}\n{err.read()[-2000:]}")
    (all_after, own_after), wall = read_busy_seconds(), time.perf_counter() - started
    others = (all_after - all_before - (own_after - own_before)) / (wall * len(os.sched_getaffinity(0)))
    return json.loads(printed.strip().splitlines()[-1]) | {"peak_mb": used.ru_maxrss / 1e3, "others": max(0.0, others)}


def read_busy_seconds() -> tuple[float, float]:
    """Busy seconds of all cores since the machine started, and of this process's ended children."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _, _, irq, softirq = (int(word) for word in first[1:8])
    times = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), times[2] + times[3]


def compare(options: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """Rows of the table for a size."""
    words = [__file__, "--sizes", size, "--lora", str(options.lora), "--steps", str(options.steps)]
    threads = len(os.sched_getaffinity(0))
    if options.one_thread:
        threads, words = 1, [*words, "--one-thread"]
    pythons = dict.fromkeys(OURS, sys.executable)
    if options.peer:
        pythons |= dict.fromkeys(TORCH, options.peer)
    sides = {
        name: [python, *words, f"--side={name}"]
        for name, python in pythons.items()
        if name in (options.only or pythons)
    }
    rounds = [
        {name: measure_side(command, options.tries, threads) for name, command in sides.items()}
        for _ in range(options.rounds)
    ]
    # Apart from the rounds: it needs memory of its own.
    own = [sys.executable, *words, "--side=Oarlock", "--products"]
    alone = measure_side(own, options.tries, threads)["product_seconds"]

    def median(name: str, key: str) -> float:
        return statistics.median(one[name][key] for one in rounds)

    rows = []
    for name in sides:
        rates = [one[name]["tokens_per_second"] for one in rounds]
        row: dict[str, Any] = {"size": size, "lora": options.lora, "side": name, "tokens/s": statistics.median(rates)}
        row["from"], row["to"] = min(rates), max(rates)
        row["ms/step"] = 1e3 * median(name, "seconds_per_step")
        row["peak MB"] = median(name, "peak_mb")
        for peer in TORCH:
            if peer in sides:
                row[f"x {peer}"] = statistics.median(
                    one[name]["tokens_per_second"] / one[peer]["tokens_per_second"] for one in rounds
                )
        row["products"] = alone / median(name, "seconds_per_step") if name == "Oarlock" else ""
        row["others"] = max(one[name]["others"] for one in rounds)
        rows.append(row)
    return rows


def main() -> None:
    """Compare the sides, or run one of them."""
    parser = make_parser(__doc__)
    add_peer_flag(parser, "torch, transformers and peft")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--lora", type=int, default=0, help="LoRA rank; 0 trains all parameters")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help=f"sides of the table: {', '.join((*OURS, *TORCH))}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=3, help="runs of a side while others take over 5%% of the cores")
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="one thread for each side, and processor time in place of wall time: for a machine that others use",
    )
    parser.add_argument("--steps", type=int, default=10, help="steps of a side in a round; the first two are left out")
    parser.add_argument("--side", choices=[*OURS, *TORCH], help="run this side alone on one size, and print JSON")
    parser.add_argument("--products", action="store_true", help="with --side: time the products of linear layers too")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    rows = [row for size in options.sizes for row in compare(options, size)]
    report("training step" + (f", LoRA {options.lora}" if options.lora else ""), rows)


if __name__ == "__main__":
    main()
