"""Every fine-tuning method on the embedded instructions, from one base: parameters, memory, speed, exact match.

    python benchmarks/methods.py [--folder DIR] [--only lora prefix ...] [--picture docs/images/methods.svg]
    python benchmarks/methods.py --memory 1GB     # of the base alone, under LoRA and QLoRA

The base is a small Llama (configs/models/quickstart), pretrained as in the quickstart and then on the training records
in six prompt formats ("Question: ... Answer: ...", ...). So it knows the tasks, as a released base model knows the
world, but not the prompt format of the test. Then each method learns that format, one after the other, each in a
process of its own.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    MB,
    ROOT,
    TreeMemory,
    import_paddlenlp,
    load_average,
    make_parser,
    read_status_kb,
    report,
    run_in_child,
)  # fmt: skip
from generated_model import SIZES, generate

# Six prompt formats that the base is trained on, and the one that the methods learn.
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
    """Run one of the programs; returns its output, and its peak memory in MB."""
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


def make_base(folder: Path, limit: Sequence[Any]) -> None:
    """Make tokenizer, instructions and the base; existing ones are kept.

    Args:
        limit: flags that shorten each training run.
    """
    from oarlock.data.embedded.instructions import make_instruction_records

    if not (folder / "tokenizer").is_dir():
        run("oarlock", "data", "embedded", "--output", folder)
    if not (folder / "pretrained" / "model.safetensors").is_file():
        run(
            "run_pretrain.py", ROOT / "configs/quickstart/pretrain.yaml",
            "--model_name_or_path", ROOT / "configs/models/quickstart", "--input_dir", folder / "pretrain",
            "--tokenizer_name_or_path", folder / "tokenizer", "--output_dir", folder / "pretrained", *QUIET, *limit,
        )  # fmt: skip
    if (folder / "base" / "model.safetensors").is_file():
        return
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    for side in ("train", "dev"):
        rng = random.Random(side)
        rows = [
            {"src": rng.choice(KNOWN_FORMS).format(**r), "tgt": r["output"]} for r in make_instruction_records(side)
        ]
        (folder / "questions" / f"{side}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    run(
        "finetune_generation.py", ROOT / "configs/quickstart/finetune.yaml", "--chat_template", "plain",
        "--model_name_or_path", folder / "pretrained", "--dataset_name_or_path", folder / "questions",
        "--num_train_epochs", 6, "--output_dir", folder / "base", *QUIET, *limit,
    )  # fmt: skip


def measure(folder: Path, name: str, limit: Sequence[Any]) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """A row of the table, and the loss curve."""
    out, template = folder / "runs" / name, folder / "new_form.jinja"
    template.write_text(NEW_FORM, encoding="utf-8")
    words = [*(word for key, value in METHODS[name].items() for word in (f"--{key}", value)), *limit]
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
    """Memory of a larger base under LoRA and under QLoRA, and the peak while it is loaded and quantised."""
    generate(folder / "large", "paddle", SIZES[size])
    rows = []
    for name, flags in (("lora", {"lora": True}), ("qlora", {"qlora": True})):
        rows.append({"method": name, **run_in_child(partial(_loaded, folder / "large", flags))})
    report(f"memory of a base of {size}", rows)


def _loaded(folder: Path, flags: dict[str, Any]) -> dict[str, int]:
    import paddle
    from paddlenlp.transformers import AutoConfig

    from oarlock.config.method import MethodSection
    from oarlock.models.build import ModelSource, build_model
    from oarlock.peft.method import choose_method
    from oarlock.peft.qlora import count_quantized_bytes

    paddle.set_device("cpu")
    source = ModelSource(folder, AutoConfig.from_pretrained(str(folder)), from_weights=True)
    before = read_status_kb("VmRSS")
    model = build_model(source, method=choose_method(MethodSection(**flags)))
    rest = sum(p._numel() * p.element_size() for p in model.parameters())
    four_bits, wide = count_quantized_bytes(model)
    return {
        "linear layers MB": (four_bits or wide or _linear_bytes(model)) // MB,
        "all weights MB": (rest + four_bits) // MB,
        "held MB": (read_status_kb("VmRSS") - before) // 1024,
        "peak MB": (read_status_kb("VmHWM") - before) // 1024,
    }


def _linear_bytes(model: Any) -> int:
    return sum(p._numel() * p.element_size() for name, p in model.named_parameters() if "_proj.weight" in name)


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw the loss over the steps, one line per method."""
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
    parser = make_parser(__doc__)
    parser.add_argument("--folder", help="where base and runs are kept; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--picture", type=Path, help="draw the loss curves (.svg, .png)")
    parser.add_argument(
        "--max_steps", type=int, help="of each training run, to try the benchmark out; the figures mean nothing then"
    )
    parser.add_argument("--memory", choices=SIZES, help="measure only what a base of this size takes")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="oarlock-methods-") as temporary:
        folder = Path(words.folder or temporary).resolve()
        if words.memory:
            import_paddlenlp()
            base_memory(folder, words.memory)
            return
        limit = ("--max_steps", words.max_steps, "--logging_steps", 1) if words.max_steps else ()
        make_base(folder, limit)
        rows, curves = [], {}
        for name in words.only:
            row, curves[name] = measure(folder, name, limit)
            rows.append(row)
            print(json.dumps(row), flush=True)
        if words.picture:
            draw(curves, words.picture)
    report("methods", rows, load_average=load_average())


if __name__ == "__main__":
    main()
