"""Fine-tune a model and export it with Metaflow: `pip install metaflow`, then

python deploy/metaflow/flow.py run --model path/to/model --data my_questions/ --target triton

Each step is a command that can be run by hand. Metaflow adds parameters, versions and retries. The resources of the
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
    target = Parameter("target", help="target of oarlock export", default="triton")
    epochs = Parameter("epochs", default=3.0)
    rank = Parameter("rank", help="LoRA rank", default=8)
    output = Parameter("output", help="folder shared by all machines of the flow", default="output")

    @step
    def start(self) -> None:
        """Choose a folder for this run."""
        self.folder = str(Path(self.output) / f"flow-{current.run_id}")
        self.next(self.train)

    @retry(times=2)  # a killed run resumes from its last checkpoint
    @resources(gpu=1, cpu=8, memory=64_000)
    @step
    def train(self) -> None:
        """Train a LoRA adapter."""
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
        """Export for a server, and keep the manifest with its proof."""
        self.served = f"{self.folder}/{self.target}"
        words = ["--model", self.model, "--adapter", self.adapter, "--target", self.target, "--output", self.served]
        subprocess.run(["oarlock", "export", *words], check=True)
        self.manifest = json.loads((Path(self.served) / "oarlock_export.json").read_text(encoding="utf-8"))
        self.next(self.end)

    @step
    def end(self) -> None:
        """Print the result. The artifacts of the run are folder, adapter, served and manifest."""
        print(f"exported to {self.served}")


if __name__ == "__main__":
    OarlockFlow()
