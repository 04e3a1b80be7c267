"""Prints the summary of the quickstart: what was measured, and what to try next."""

import json
import sys
from pathlib import Path


def rows(path: Path, key: str) -> list[float]:
    """Return the values of one key of a metrics.jsonl, in order."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[key] for row in found if key in row]


def main() -> None:
    """Read the metrics of both runs and print the summary."""
    output, seconds = Path(sys.argv[1]), int(sys.argv[2])
    perplexity = rows(output / "pretrained" / "metrics.jsonl", "eval_perplexity")
    exact = rows(output / "tuned" / "metrics.jsonl", "eval_exact_match")
    print("\n== results ==")
    print(f"perplexity    before pretraining {perplexity[0]:,.0f}, after {perplexity[-1]:,.0f}")
    print(f"exact match   before instruction tuning {exact[0]:.3f}, after {exact[-1]:.3f} (held-out prompts)")
    print((output / "answers.txt").read_text(encoding="utf-8").rstrip())
    print(f"time          {seconds // 60} min {seconds % 60} s")
    print("\nsee the loss curves:")
    print(
        f"  source .venv/bin/activate && visualdl --logdir {output} --language en    # then open http://127.0.0.1:8040"
    )
    print("train on your own text, then on your own questions and answers:")
    tokenizer = output / "data" / "tokenizer"
    print(f"  oarlock data pretrain --input YOUR_FILES --tokenizer {tokenizer} --output-prefix data/mine")
    print(
        f"  python llm/run_pretrain.py configs/quickstart/pretrain.yaml --input_dir data/mine "
        f"--tokenizer_name_or_path {tokenizer} --output_dir output/mine"
    )
    print(
        "  python llm/finetune_generation.py configs/quickstart/finetune.yaml --model_name_or_path output/mine "
        "--dataset_name_or_path YOUR.jsonl --output_dir output/mine-tuned --no_do_eval"
    )
    print("serve it until Ctrl-C, with OpenAI's interface on port 8080:")
    print(f"  oarlock serve {output / 'served'}")


if __name__ == "__main__":
    main()
