"""Fine-tune with LoRA under one process and tensor 2 x pipeline 2, and merge at the end: python lora_merges.py MODEL OUT.

OUT/one and OUT/four become what the runs leave. The ranks are forks of this process, which has llm/ and tests/ on its PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from helpers import make_flags
from oarlock.config.finetune import FinetuneConfig
from oarlock.config.load import load_config
from oarlock.environment.paddle_import import import_paddle

PLANS = {"one": (1, {}), "four": (4, {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2})}


def main(model: Path, folder: Path) -> int:
    records = [{"src": [f"count {i}"], "tgt": [" ".join(map(str, range(i)))]} for i in range(2, 10)]
    (folder / "train.json").write_text("\n".join(json.dumps(record) for record in records))
    import_paddle(1)
    from oarlock.cpu_ranks.fork_launch import launch
    from oarlock.train.finetune import finetune

    failed = 0
    for name, (ranks, plan) in PLANS.items():
        words = make_flags(
            model_name_or_path=model, dataset_name_or_path=folder, output_dir=folder / name, lora=1, r=4, merge_weights=1,
            max_steps=3, src_length=16, tgt_length=16, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, adam_epsilon=1e-5, save_strategy="no", do_train=1, report_to="none", device="cpu",
            num_threads=1, collective_timeout=60, disable_tqdm=1, log_level="error", **plan,
        )  # fmt: skip
        loaded = load_config(FinetuneConfig, words)
        codes = launch(ranks, partial(finetune, loaded), folder / f"log-{name}", 100, quiet=True)
        if any(codes):
            print(*(log.read_text()[-2000:] for log in sorted((folder / f"log-{name}").iterdir())), sep="\n")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
