"""The other side of tests/parity/test_training_parity.py: transformers' Trainer and PEFT.

    python trainer_peer.py JOBS.json

Each job is a dictionary; see make() and train(). Does not import oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.utils import logging


def make(job: dict[str, Any]) -> None:
    """A model whose norms are not 1 and whose biases are not 0, saved as published models are, and a PEFT LoRA adapter.

    Job: "make" (the configuration), "folder", "seed", "adapter" (its folder), "targets" (PEFT's target_modules).
    """
    torch.manual_seed(job["seed"])
    about = dict(job["make"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(about.pop("model_type"), **about))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.3))
    model.save_pretrained(job["folder"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"])
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=job["targets"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # PEFT begins with zeros
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(job["adapter"])


class Recorder(TrainerCallback):
    """Records the learning rate that a step used (some versions log that of the next step)."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.rates.append(more["lr_scheduler"].get_last_lr()[0])


class RecordingTrainer(Trainer):
    """Reads the samples in file order, and keeps the losses without the rounding of the log."""

    losses: list[float]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def collate(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([sample[name] + [value] * (longest - len(sample[name])) for sample in samples])

    mask = [[1] * len(sample["input_ids"]) + [0] * (longest - len(sample["input_ids"])) for sample in samples]
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": torch.tensor(mask)}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train "folder" (with the PEFT adapter "adapter", if named) on the samples of "data"; the result is written to
    "out".

    Job: "arguments" are those of TrainingArguments.
    """
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
    if "adapter" in job:
        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    recorder = Recorder()
    trainer = RecordingTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=job["out"], use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_strategy="no", **job["arguments"],
        ),
        train_dataset=json.loads(Path(job["data"]).read_text()),
        data_collator=collate,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.losses = []
    norms: list[float] = []
    clip = trainer.accelerator.clip_grad_norm_

    def remember(*args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        norms.append(float(norm))
        return norm

    trainer.accelerator.clip_grad_norm_ = remember
    trainer.train()
    micro = job["arguments"]["gradient_accumulation_steps"]
    out = Path(job["out"])
    model.save_pretrained(out)
    return {
        "losses": [sum(trainer.losses[i : i + micro]) for i in range(0, len(trainer.losses), micro)],
        "rates": recorder.rates,
        "norms": norms,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def schedules(job: dict[str, Any]) -> list[list[float]]:
    """The rate of every step of every case (the arguments of TrainingArguments that say it, and "steps")."""
    found = []
    for case in job["schedules"]:
        about = dict(case)
        steps = about.pop("steps")
        arguments = TrainingArguments(output_dir=job["out"], use_cpu=True, report_to="none", **about)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
        warmup = arguments.get_warmup_steps(steps)
        scheduler = get_scheduler(
            arguments.lr_scheduler_type, optimizer, warmup, steps, arguments.lr_scheduler_kwargs or {}
        )
        rates = []
        for _ in range(steps):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        found.append(rates)
    return found


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results: dict[str, Any] = {}
    jobs, results_file = Path(sys.argv[1]), Path(sys.argv[2])
    for name, job in json.loads(jobs.read_text()).items():
        if "make" in job:
            make(job)
        elif "schedules" in job:
            results[name] = schedules(job)
        else:
            results[name] = train(job)
    results_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
