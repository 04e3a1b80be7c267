"""A training step (forward, backward, AdamW) of Hugging Face's Llama on torch; prints one JSON line.

    PYTHON_WITH_TORCH benchmarks/peer_torch.py --hidden 256 --layers 4 --heads 4 --vocab 4096 --seq 256 --batch 8

For train_step.py, whose --peer names the Python (`bash scripts/parity_env.sh` makes one: .venv-parity/bin/python). It
imports nothing of Oarlock. --precision autocast multiplies in bfloat16, bfloat16 keeps the weights in it too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 256, "layers": 4, "heads": 4, "vocab": 4096, "seq": 256, "batch": 8, "steps": 12}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all parameters")
    parser.add_argument("--precision", choices=["float32", "autocast", "bfloat16"], default="float32")
    parser.add_argument("--processor-time", action="store_true", help="measure it in place of the clock's")
    parser.add_argument("--compile", action="store_true", help="the model's forward by torch.compile")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=int(options.hidden * 8 / 3) // 64 * 64,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=options.seq,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype).train()
    if options.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules=TARGETS)
        model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, options.vocab, (options.batch, options.seq), device=device)
    if options.compile:
        model = torch.compile(model)
    seconds, value = [], 0.0
    now = time.process_time if options.processor_time else time.perf_counter
    for _ in range(options.steps):
        start = now()
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "autocast"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        seconds.append(now() - start)
    step = statistics.median(seconds[2:])
    found = {"seconds_per_step": step, "tokens_per_second": options.batch * options.seq / step, "loss": value}
    print(json.dumps(found | {"torch": torch.__version__, "device": device, "precision": options.precision}))


if __name__ == "__main__":
    main()
