"""Tune a model, export it, and keep where it lies: `pip install metaflow`, then

python deploy/metaflow/flow.py run --model path/to/model --data my_questions/ --target triton

Each step is a command that can be run by hand; Metaflow adds parameters, versions and retries. The resources of the
train step are for Kubernetes or Batch (`--with kubernetes`); on one machine they are ignored.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from metaflow import FlowSpec, Parameter, current, resources, retry, step


class OarlockFlow(FlowSpec):
    """start -> train -> export -> end"""

    model = Parameter("model", help="model folder or name", required=True)
    data = Parameter("data", help="questions and answers, as finetune_generation.py takes them", required=True)
    target = Parameter("target", help="as in oarlock export", default="triton")
    epochs = Parameter("epochs", default=3.0)
    rank = Parameter("rank", help="of LoRA", default=8)
    output = Parameter("output", help="folder that all machines of the flow see", default="output")

    @step
    def start(self) -> None:
        """A folder of its own for each run."""
        self.folder = str(Path(self.output) / f"flow-{current.run_id}")
        self.next(self.train)

    @retry(times=2)  # a run that was killed goes on from its last checkpoint
    @resources(gpu=1, cpu=8, memory=64_000)
    @step
    def train(self) -> None:
        """LoRA beside the model."""
        self.adapter = f"{self.folder}/lora"
        words = {
            "model_name_or_path": self.model,
            "dataset_name_or_path": self.data,
            "output_dir": self.adapter,
            "num_train_epochs": self.epochs,
            "r": self.rank,
        }
        flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "llm/finetune_generation.py", "--lora", "--do_train", *flags], check=True)
        self.next(self.export)

    @step
    def export(self) -> None:
        """The directory that a server reads, and what was proven of it."""
        self.served = f"{self.folder}/{self.target}"
        words = ["--model", self.model, "--adapter", self.adapter, "--target", self.target, "--output", self.served]
        subprocess.run(["oarlock", "export", *words], check=True)
        self.manifest = json.loads((Path(self.served) / "oarlock_export.json").read_text(encoding="utf-8"))
        self.next(self.end)

    @step
    def end(self) -> None:
        """Artifacts of the run: folder, adapter, served, manifest."""
        print(f"exported to {self.served}")


if __name__ == "__main__":
    OarlockFlow()
