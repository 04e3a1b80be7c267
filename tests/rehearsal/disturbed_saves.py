"""The program of test_checkpoints.py: imports Paddle once, then forks the ranks of each run, some with disturbed saves."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from helpers import make_flags

SPLIT = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2, "save_total_limit": 1}


STAGE3 = {"sharding": "stage3", "sharding_parallel_degree": 2, "stage3_min_elements": 512}


# name -> (ranks, flags, what happens to the second save, name of the output folder)
RUNS = {
    "split": (4, SPLIT, "", "split"),
    "stage3": (2, STAGE3, "", "stage3"),
    "background": (2, STAGE3 | {"async_save": 1}, "late", "background"),
    "full": (2, STAGE3, "full", "full"),
    "full_background": (2, STAGE3 | {"async_save": 1}, "full", "full_background"),
    "killed": (2, STAGE3, "killed", "killed"),
    "resumed": (2, STAGE3 | {"async_save": 1, "save_total_limit": 1}, "", "killed"),
    "removed": (2, STAGE3, "removed", "removed"),
    "removed_background": (2, STAGE3 | {"async_save": 1}, "removed", "removed_background"),
    "ids": (2, STAGE3 | {"dataloader_num_workers": 1}, "ids", "ids"),
    "ids_at_opening": (2, STAGE3, "", "ids_at_opening"),
}


def main(folder: Path) -> int:
    """In the parent: import, fork, wait."""
    from oarlock.environment.paddle_import import import_paddle

    import_paddle(1)
    from oarlock.cpu_ranks.fork_launch import launch
    from oarlock.train import pretrain  # noqa: F401

    found = {}
    for name, (ranks, options, disturbance, output) in RUNS.items():
        words = make_flags(
            model_name_or_path=folder / "model", input_dir=folder / ("foreign" if "ids" in name else "data"), output_dir=folder / output, split="100,0,0",
            max_seq_length=32, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4, save_steps=2,
            learning_rate=1e-3, logging_steps=1, do_train=1, report_to="none", device="cpu", num_threads=1,
            collective_timeout=60, disable_tqdm=1, log_level="error", **options,
        )  # fmt: skip
        main = partial(one_rank, words, disturbance)
        found[name] = launch(ranks, main, folder / "log" / name, timeout_s=90, quiet=True)
    (folder / "codes.json").write_text(json.dumps(found))
    return 0


def one_rank(words: list[str], disturbance: str) -> int:
    """Unmodified pretraining, except that the second save is disturbed on rank 1 and messages during a save are
    counted.
    """
    from oarlock.config.load import load_config
    from oarlock.config.pretrain import PretrainConfig
    from oarlock.cpu_ranks import process_group
    from oarlock.environment.ranks import rank
    from oarlock.train import pretrain_data as pretraining
    from oarlock.train.checkpoint import pending_save
    from oarlock.train.pretrain import pretrain
    from oarlock.train.trainer import OarlockTrainer

    loaded = load_config(PretrainConfig, words)
    output = Path(loaded.config.checkpoint.output_dir)
    really_save, really_write = OarlockTrainer._save_checkpoint, pending_save.write_safetensors
    trainers: list[OarlockTrainer] = []

    def sent() -> int:
        return sum(amount for group in process_group.groups() for _, amount in group.statistics().values())

    if disturbance == "ids":
        pretraining.check_token_ids = lambda *_: None

    def save(trainer, *arguments):
        trainers.append(trainer)
        if disturbance == "removed" and len(trainers) == 2 and rank() == 0:
            output.rename(output.with_name(f"away-{output.name}"))
            really_save(trainer, *arguments)
            raise AssertionError("saved into a folder that is gone")
        before = sent()
        really_save(trainer, *arguments)
        with open(output / f"sent-{rank()}.jsonl", "a") as file:
            file.write(json.dumps({"bytes": sent() - before}) + "\n")

    def write(path, *arguments):
        if disturbance == "late" and len(trainers) == 1:
            deadline = time.monotonic() + 300
            while trainers[0].state.global_step == 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            (output / "late.json").write_text(json.dumps(trainers[0].state.global_step))
        if disturbance in ("full", "killed") and len(trainers) == 2 and rank() == 1:
            path.write_bytes(b"the beginning")
            if disturbance == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return really_write(path, *arguments)

    OarlockTrainer._save_checkpoint, pending_save.write_safetensors = save, write
    return pretrain(loaded)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
