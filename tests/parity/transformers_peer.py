"""The other side of tests/parity/test_convert.py: transformers, torch and peft, in the Python of scripts/parity_env.sh.

    python transformers_peer.py JOBS.json

Each job is a dictionary: "make" writes a random model of a configuration; "adapter" adds a LoRA adapter to the
model, which "peft" makes first; every model is then run, and its logits, its greedy continuation and its tokenizer's ids
are written to OUT.npz/.json. Does not import oarlock.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def make(job: dict[str, Any], folder: Path) -> None:
    """A model with weights so large (unless the job says otherwise) that its logits depend on the whole input."""
    torch.manual_seed(job.get("seed", 0))
    about = dict(job["make"])
    config = AutoConfig.for_model(about.pop("model_type"), **about)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name and "wte" not in name and "lm_head" not in name:
                parameter.add_(torch.randn_like(parameter) * (job.get("noise", 0.6) if parameter.ndim > 1 else 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # DeepSeek's; the files have it
                buffer.add_(torch.randn_like(buffer) * 0.3)
    model.to(getattr(torch, job.get("dtype", "float32")))
    model.save_pretrained(folder, max_shard_size=job.get("max_shard_size", "5GB"))
    if job.get("pickle"):
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()


def make_adapter(job: dict[str, Any], folder: Path) -> None:
    """A LoRA adapter made by PEFT, with random matrices."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    about = {**job["peft"], "base_model_name_or_path": job.get("names_base", str(folder))}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraConfig(**about))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.peft_config["default"].base_model_name_or_path = about["base_model_name_or_path"]
    model.save_pretrained(job["adapter"])


def run(job: dict[str, Any], folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    said: dict[str, Any] = {"class": type(model).__name__, "dtype": str(model.config.dtype)}
    if job.get("adapter"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"]).eval()
    ids = torch.tensor(job["ids"])
    with torch.no_grad():
        found = {"scores": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()}
        if "generate" in job:
            prompt = torch.tensor([job["generate"]])
            answer = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=32,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=0,
            )
            said["answer"] = answer[0, prompt.shape[1] :].tolist()
    if "texts" in job:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said["token_ids"] = [tokenizer(text)["input_ids"] for text in job["texts"]]
        said["decoded"] = [tokenizer.decode(ids) for ids in said["token_ids"]]
        said["tokenizer"] = type(tokenizer).__name__
        if job.get("messages"):
            said["prompt"] = tokenizer.apply_chat_template(job["messages"], tokenize=False, add_generation_prompt=True)
    return found, said


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        folder, out = Path(job["folder"]), Path(job["out"])
        if "make" in job:
            make(job, folder)
        if "peft" in job:
            make_adapter(job, folder)
        arrays, said = run(job, folder)
        np.savez(out.with_suffix(".npz"), **arrays)
        out.with_suffix(".json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
