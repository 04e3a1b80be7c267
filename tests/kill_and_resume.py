"""Kill a training run with SIGKILL at random moments, start the same command again, and compare with a run left alone.

    python tests/kill_and_resume.py --kills 20

Losses, gradient norms and the final weights must be the same to the last bit. Every third kill waits for a save to be
under way. Prints a JSON summary; exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPARED = ("step", "epoch", "loss", "learning_rate", "grad_norm", "samples", "eval_loss", "eval_exact_match")


def make_model(folder: Path) -> None:
    """Save a tiny random Llama with the embedded tokenizer from another process (this one must not import paddle)."""
    code = (
        "import sys; sys.path[:0] = [sys.argv[1] + '/llm', sys.argv[1] + '/tests']\n"
        "from helpers import make_tiny_model; make_tiny_model(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(folder)], check=True)


def command(model: Path, output: Path, steps: int) -> list[str]:
    """A fine-tuning run without dropout, with shuffled data, gradient accumulation, and log rows that span checkpoints."""
    flags = {
        "model_name_or_path": model, "output_dir": output, "max_steps": steps, "src_length": 32, "tgt_length": 16,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "logging_steps": 5, "save_steps": 2, "save_total_limit": 3, "eval_steps": 10, "max_evaluate_steps": 2,
        "warmup_steps": 3, "lr_scheduler_type": "cosine", "report_to": "none",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "llm/finetune_generation.py"), *words, "--do_train", "--do_eval"]


def read_metrics(output: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without times and rates."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in COMPARED if key in row} for row in rows]


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def count_rows(output: Path) -> int:
    """The progress of a run in rows of its metrics."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run_killed(words: list[str], output: Path, kills: int, most_rows: int, rng: random.Random) -> tuple[int, int]:
    """Run until the command ends by itself, killing it `kills` times on the way: (kills done, of them during a save).

    Each at some moment within `most_rows` new rows of metrics, so that a fast machine has as many kills as a slow one;
    one in five while it starts.
    """
    done = during_save = 0
    while True:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done < kills:
            wait_for_save = done % 3 == 2
            starting = not wait_for_save and rng.random() < 0.2
            rows = count_rows(output) + rng.randint(1, most_rows)
            last = time.monotonic() + (rng.uniform(0.5, 4.0) if starting else 120.0)
            while process.poll() is None and time.monotonic() < last and count_rows(output) < rows:
                time.sleep(0.02)
            save_by = time.monotonic() + (10 if wait_for_save else rng.uniform(0.0, 0.1))
            while process.poll() is None and time.monotonic() < save_by:
                if wait_for_save and any(output.glob(".checkpoint-*.partial")):
                    during_save += 1
                    break
                time.sleep(0.0005)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                done += 1
                continue
        _, errors = process.communicate()
        if process.returncode != 0:
            raise SystemExit(f"the run failed with code {process.returncode}:\n{errors}")
        return done, during_save


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=None, help="default: enough for the kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps = arguments.steps or 60 + 40 * arguments.kills
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_model(base / "model")
        alone, killed = base / "alone", base / "killed"
        subprocess.run(command(base / "model", alone, steps), check=True, stdout=subprocess.DEVNULL)
        most_rows = max(1, steps // 5 // (arguments.kills + 1))  # a row every 5 steps
        words = command(base / "model", killed, steps)
        done, during_save = run_killed(words, killed, arguments.kills, most_rows, random.Random(arguments.seed))
        same_figures = read_metrics(alone) == read_metrics(killed)
        same_weights = hash_file(alone / "model.safetensors") == hash_file(killed / "model.safetensors")
        leftovers = [path.name for path in killed.glob(".*")]
        summary = {
            "steps": steps,
            "kills": done,
            "kills_during_a_save": during_save,
            "same_losses": same_figures,
            "same_weights": same_weights,
            "leftovers": leftovers,
        }
        print(json.dumps(summary))
        return 0 if same_figures and same_weights and not leftovers and done >= arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
