"""Every fine-tuning method on the embedded instructions, from one base: parameters, memory, speed, exact match.

    python benchmarks/methods.py [--folder DIR] [--only lora prefix ...] [--picture docs/images/methods.svg]
    python benchmarks/methods.py --memory 1GB     # of the base alone, under LoRA and QLoRA

The base is a small Llama (configs/models/quickstart), pretrained as in the quickstart and then on the training records
in six forms ("Question: ... Answer: ...", ...): it knows of the tasks, as a released base model knows of the world, but
has not met the form in which it is asked from now on. Then each method learns that form, one after the other, in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, TreeMemory, free_of_noise, report
from load_weights import MB, SIZES, generate, in_child, kilobytes

# Six forms in which the base has met the tasks, and the one in which it is to answer from now on.
KNOWN_FORMS = (
    "Question: {instruction} {input}\nAnswer: ",
    "Q: {instruction} {input} A: ",
    "{instruction}\n{input}\n= ",
    "Task: {instruction}\nInput: {input}\nOutput: ",
    "User: {instruction}\n{input}\nBot: ",
    "{instruction} ({input}) -> ",
)
NEW_FORM = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% else %}Instruction: {{ message['content'] }}\nResponse: {% endif %}{% endfor %}"
)
QUIET = ("--disable_tqdm", 1, "--save_strategy", "no", "--overwrite_output_dir")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 2e-3},
    "lora": {"lora": 1, "r": 8, "learning_rate": 5e-3},
    "qlora": {"qlora": 1, "r": 8, "learning_rate": 5e-3},
    "prefix": {"prefix_tuning": 1, "num_prefix_tokens": 64, "learning_rate": 3e-2},
    "p_tuning": {"p_tuning": 1, "num_virtual_tokens": 32, "learning_rate": 5e-3},
}


def run(program: str, *words: Any) -> tuple[str, float]:
    """Run one of the programs; returns what it said, and the peak of its memory in MB."""
    command = [sys.executable, *(["-m", "oarlock"] if program == "oarlock" else [str(ROOT / "llm" / program)])]
    process = subprocess.Popen(
        [*command, *map(str, words)], cwd=ROOT / "llm", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    memory = TreeMemory(process.pid)
    output, _ = process.communicate()
    peak = memory.stop()
    if process.returncode:
        raise SystemExit(output[-4000:])
    return output, peak


def make_base(folder: Path) -> None:
    """Tokenizer, instructions and the base; what is there already is kept."""
    from oarlock.data.embedded.instructions import instruction_records

    if not (folder / "tokenizer").is_dir():
        run("oarlock", "data", "embedded", "--output", folder)
    if not (folder / "pretrained" / "model.safetensors").is_file():
        run(
            "run_pretrain.py", ROOT / "configs/quickstart/pretrain.yaml",
            "--model_name_or_path", ROOT / "configs/models/quickstart", "--input_dir", folder / "pretrain",
            "--tokenizer_name_or_path", folder / "tokenizer", "--output_dir", folder / "pretrained", *QUIET,
        )  # fmt: skip
    if (folder / "base" / "model.safetensors").is_file():
        return
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    for side in ("train", "dev"):
        rng = random.Random(side)
        rows = [{"src": rng.choice(KNOWN_FORMS).format(**r), "tgt": r["output"]} for r in instruction_records(side)]
        (folder / "questions" / f"{side}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    run(
        "finetune_generation.py", ROOT / "configs/quickstart/finetune.yaml", "--chat_template", "plain",
        "--model_name_or_path", folder / "pretrained", "--dataset_name_or_path", folder / "questions",
        "--num_train_epochs", 6, "--output_dir", folder / "base", *QUIET,
    )  # fmt: skip


def measure(folder: Path, name: str, flags: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """A row of the table, and the loss curve."""
    out, template = folder / "runs" / name, folder / "new_form.jinja"
    template.write_text(NEW_FORM, encoding="utf-8")
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    output, peak = run(
        "finetune_generation.py", ROOT / "configs/quickstart/finetune.yaml", "--model_name_or_path", folder / "base",
        "--dataset_name_or_path", folder / "instructions", "--output_dir", out, "--chat_template", template,
        *QUIET, *words,
    )  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    counts = next(line for line in output.splitlines() if "of them trainable" in line).split()
    adapter = next(out / file for file in ("peft_model.safetensors", "model.safetensors") if (out / file).is_file())
    row = {
        "method": name,
        "trained": int(counts[counts.index("of") - 1].replace(",", "")),
        "saved kB": adapter.stat().st_size // 1000,
        "peak MB": round(peak),
        "tokens/s": round(statistics.median(step["tokens_per_second"] for step in steps)),
        "eval loss": evaluations[-1]["eval_loss"],
        "exact match before": evaluations[0]["eval_exact_match"],
        "exact match": evaluations[-1]["eval_exact_match"],
        "flags": " ".join(map(str, words)),
    }
    return row, [(step["step"], step["loss"]) for step in steps]


def base_memory(folder: Path, size: str) -> None:
    """A larger base under LoRA and under QLoRA: what it takes, and the peak while it is loaded and quantised."""
    generate(folder / "large", "paddle", SIZES[size])
    rows = []
    for name, flags in (("lora", {"lora": True}), ("qlora", {"qlora": True})):
        rows.append({"method": name, **in_child(partial(_loaded, folder / "large", flags))})
    report(f"memory of a base of {size}", rows)


def _loaded(folder: Path, flags: dict[str, bool]) -> dict[str, int]:
    import paddle
    from paddlenlp.transformers import AutoConfig

    from oarlock.config.method import MethodSection
    from oarlock.models.build import ModelSource, build_model
    from oarlock.peft.method import choose_method
    from oarlock.peft.qlora import quantized_bytes

    paddle.set_device("cpu")
    source = ModelSource(folder, AutoConfig.from_pretrained(str(folder)), from_weights=True)
    before = kilobytes("VmRSS")
    model = build_model(source, method=choose_method(MethodSection(**flags)))
    rest = sum(p._numel() * p.element_size() for p in model.parameters())
    four_bits, wide = quantized_bytes(model)
    return {
        "linear layers MB": (four_bits or wide or _linear_bytes(model)) // MB,
        "all weights MB": (rest + four_bits) // MB,
        "held MB": (kilobytes("VmRSS") - before) // 1024,
        "peak MB": (kilobytes("VmHWM") - before) // 1024,
    }


def _linear_bytes(model: Any) -> int:
    return sum(p._numel() * p.element_size() for name, p in model.named_parameters() if "_proj.weight" in name)


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Loss over steps, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Embedded instructions, one base")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where base and runs are kept; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--picture", type=Path, help="draw the loss curves (.svg, .png)")
    parser.add_argument("--memory", choices=SIZES, help="measure only what a base of this size takes")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oarlock-methods-") as temporary:
        folder = Path(words.folder or temporary).resolve()
        if words.memory:
            from oarlock.environment.cpu import available_cores
            from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

            import_paddle(available_cores())
            set_paddlenlp_log_level("error")
            base_memory(folder, words.memory)
            return
        make_base(folder)
        rows, curves = [], {}
        for name in words.only:
            row, curves[name] = measure(folder, name, METHODS[name])
            rows.append(row)
            print(json.dumps(row), flush=True)
        if words.picture:
            draw(curves, words.picture)
    report("methods", rows, load_average=free_of_noise())


if __name__ == "__main__":
    main()
