"""Run many small plans from one warm process and say how each compares with one process: python runs.py SPEC OUT.

SPEC (JSON): a list of groups {"model", "kind", "batch", "steps", "plans": [...]}, perhaps with "flags" for all runs;
"model" has the fields that differ from SMALL, or is a full config.json if "whole" is true. A plan is {"ranks", "flags",
...}, or a chain [{...}, {...}] of plans that resume from each other's checkpoints. OUT gets one entry per plan.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "llm"))

from helpers import make_folder_nontrivial
from oarlock.config.finetune import FinetuneConfig
from oarlock.config.load import load_config
from oarlock.config.pretrain import PretrainConfig
from oarlock.environment.paddle_import import import_paddle

# See oarlock.train.rehearsal.rehearse: at 1e-8 rounding noise of gradients near zero would become whole updates.
ADAM_EPSILON = 1e-5
SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def make_config(kind: str, model: Path, output: Path, steps: int, flags: dict[str, Any]) -> Any:
    words = {
        "model_name_or_path": model, "output_dir": output, "do_train": 1, "do_eval": 1, "max_steps": steps,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "device": "cpu",
        "max_grad_norm": 0.5, "per_device_eval_batch_size": 3, "eval_steps": 1000, "disable_tqdm": 1,
        "stage3_min_elements": 512, "weight_decay": 0.3, "num_threads": 1, "adam_epsilon": ADAM_EPSILON, "collective_timeout": 60, "log_level": "error",
    }  # fmt: skip
    if kind == "pretrain":
        words |= {"max_seq_length": 32, "continue_training": 1}
    else:
        words |= {"src_length": 16, "tgt_length": 16}
    words |= flags
    config_class = PretrainConfig if kind == "pretrain" else FinetuneConfig
    return load_config(
        config_class, [word for name, value in words.items() for word in (f"--{name}", str(value))]
    ).config


def make_ordinary_model(content: dict[str, Any], folder: Path) -> int:
    """Save a random model whose norms and biases look trained."""
    from oarlock.train.rehearsal.rehearse import make_model

    code = make_model(content, folder)
    make_folder_nontrivial(folder)
    return code


def main() -> None:
    groups = json.loads(Path(sys.argv[1]).read_text())
    import_paddle(1)
    from oarlock.cpu_ranks.fork_launch import launch
    from oarlock.train.rehearsal.rank import RankReport, run_rank
    from oarlock.train.rehearsal.rehearse import TOLERANCE, find_first_difference

    results = []
    for number, group in enumerate(groups):
        folder = Path(tempfile.mkdtemp(prefix="oarlock-runs-"))
        kind, steps = group["kind"], group["steps"]
        model, one = folder / "model", folder / "one"
        model.mkdir()
        one.mkdir()
        content = group["model"] if group.get("whole") else SMALL | group["model"]
        codes = launch(1, partial(make_ordinary_model, content, model), folder / "log", 120, quiet=True)
        batch, micro = group["batch"], group.get("micro_batch", 2)
        alone = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": batch // micro}
        common = group.get("flags", {})  # of the one process and of all plans
        config = make_config(kind, model, folder / "out-one", steps, common | alone)
        codes += launch(1, partial(run_rank, config, one, None, TOLERANCE), folder / "log", 120, quiet=True)
        if any(codes):
            sys.exit((folder / "log" / "workerlog.0").read_text())
        reference = RankReport.read(one, 0)
        for position, chain in enumerate(group["plans"]):
            output = folder / f"out-{position}"
            for link, plan in enumerate(chain if isinstance(chain, list) else [chain]):
                many = folder / "many"
                shutil.rmtree(many, ignore_errors=True)
                many.mkdir()
                config = make_config(kind, model, output, steps, common | plan["flags"])
                stop_after = plan.get("stop_after")
                started = time.perf_counter()
                codes = launch(
                    plan["ranks"],
                    partial(run_rank, config, many, one, TOLERANCE, stop_after),
                    folder / "log",
                    180,
                    quiet=True,
                )
                result = {
                    "case": [number, position, link],
                    "plan": plan,
                    "codes": codes,
                    "seconds": time.perf_counter() - started,
                }
                if any(codes):
                    logs = [(folder / "log" / f"workerlog.{i}").read_text()[-2000:] for i in range(plan["ranks"])]
                    result |= {"problem": "failed", "logs": logs}
                else:
                    reports = [RankReport.read(many, i) for i in range(plan["ranks"])]
                    if stop_after:
                        for report in reports:
                            report.eval_loss = reference.eval_loss
                    result |= {
                        "problem": find_first_difference(reference, reports),
                        "steps_before": reports[0].steps_before,
                        "num_losses": len(reports[0].losses),
                        "difference": max(report.difference for report in reports),
                        "gradient_bytes": [report.gradient_bytes for report in reports],
                        "parameter_bytes": [report.parameter_bytes for report in reports],
                        "optimizer_bytes": [report.optimizer_bytes for report in reports],
                    }
                results.append(result)
                print(
                    f"{kind} {plan['ranks']} {plan['flags']} {result['problem']} {result['seconds']:.1f} s", flush=True
                )
        shutil.rmtree(folder)
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
