"""Tokens per second on a CPU in float32: Oarlock's engine compared with Hugging Face's generate, same model and tokens.

    python benchmarks/serving/generate.py [--sizes small large] [--rounds 5]

The peer makes the model (random weights, Hugging Face's layout), and both sides read that folder, each in a process of
its own. They take turns within a round. Decoding is greedy, and every answer has the requested number of tokens.

    1 client              requests one after the other
    8 clients             prompts and answers of different lengths, all at once; the peer pads on the left and runs its
                          batch until the longest answer is done; only the requested tokens count
    8 clients, one length the same with equal prompts and answers, the best case for such a batch
    8 in turn             the peer answers the 8 requests one after the other; compared with the engine's 8 clients

"first token" is the time from the request to the first token, the median of the requests. A figure is the median of the
rounds, "x peer" the median of the ratios within a round. "same tokens" tells whether all answers of both were equal.
Without the Python of --peer, Oarlock makes the model, and only its side runs.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules that all benchmarks share

from common import Peer, add_peer_flag, answer_asked, make_parser, report

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
    "large": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16},
}
VOCABULARY = 8192
PROMPTS = [32, 64, 96, 128, 48, 80, 112, 64]
ANSWERS = [48, 128, 64, 96, 128, 32, 80, 112]
CASES = {
    "1 client": [(64, 96)] * 3,
    "8 clients": list(zip(PROMPTS, ANSWERS, strict=True)),
    "8 clients, one length": [(64, 96)] * 8,
    "8 in turn": list(zip(PROMPTS, ANSWERS, strict=True)),
}


def configuration(size: str) -> dict[str, Any]:
    """Settings of a Llama, as both sides name them."""
    hidden = SIZES[size]["hidden_size"]
    return SIZES[size] | {
        "vocab_size": VOCABULARY,
        "intermediate_size": int(hidden * 8 / 3) // 64 * 64,
        "num_key_value_heads": SIZES[size]["num_attention_heads"],
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }


def requests(case: str) -> list[tuple[list[int], int]]:
    """Prompt ids and number of tokens to answer with."""
    return [
        ([(7 + 31 * i + 17 * j + j * j) % VOCABULARY for j in range(prompt)], answer)
        for i, (prompt, answer) in enumerate(CASES[case])
    ]


def oarlock_side(folder: str) -> None:
    """Answer cases until stdin ends."""
    from oarlock.environment.paddle_import import import_paddle

    import_paddle()
    from oarlock.sampling.params import SamplingParams
    from oarlock.serve.engine.engine import Engine
    from oarlock.serve.request import Prompt, TokenChunk

    def run(case: str) -> dict[str, Any]:
        wanted = requests(case)
        tokens: list[list[int]] = [[] for _ in wanted]
        first: list[float] = [0.0] * len(wanted)
        start = time.perf_counter()

        def ask(i: int) -> Any:
            asked = time.perf_counter()

            def take(chunk: TokenChunk) -> None:
                if chunk.error:
                    raise SystemExit(chunk.error)
                first[i] = first[i] or time.perf_counter() - asked
                tokens[i].extend(chunk.token_ids)

            prompt, answer = wanted[i]
            return engine.submit(Prompt(token_ids=prompt), SamplingParams(max_tokens=answer, ignore_eos=True), take)

        if case == "1 client":
            for i in range(len(wanted)):
                ask(i).wait()
        else:
            for request in [ask(i) for i in range(len(wanted))]:
                request.wait()
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "first": statistics.median(first)}

    with contextlib.redirect_stdout(sys.stderr):
        engine = Engine.load(folder)
    answer_asked(run)
    engine.close()


def peer_side(folder: str, size: str, threads: int) -> None:
    """Make the model; answer cases until stdin ends."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**configuration(size), initializer_range=0.06)).eval()
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.first = 0.0

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.first = self.first or time.perf_counter()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def generate(some: list[tuple[list[int], int]]) -> tuple[list[list[int]], float]:
        longest = max(len(prompt) for prompt, _ in some)
        ids = torch.zeros([len(some), longest], dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(some):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        clock, start = Clock(), time.perf_counter()
        most = max(answer for _, answer in some)
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=0,
                stopping_criteria=[clock],
            )  # fmt: skip
        rows = found[:, longest:].tolist()
        return [row[:answer] for row, (_, answer) in zip(rows, some, strict=True)], clock.first - start

    def run(case: str) -> dict[str, Any]:
        wanted, start = requests(case), time.perf_counter()
        if case in ("1 client", "8 in turn"):
            done = [generate([one]) for one in wanted]
            tokens, first = [rows[0] for rows, _ in done], statistics.median(seconds for _, seconds in done)
        else:
            tokens, first = generate(wanted)
        return {"seconds": time.perf_counter() - start, "tokens": tokens, "first": first}

    print(0, flush=True)  # the model is there
    answer_asked(run)


def make_model(folder: str, size: str) -> None:
    """Make a model with PaddleNLP, for runs without a peer."""
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    import_paddle()
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    set_paddlenlp_log_level("error")
    LlamaForCausalLM(LlamaConfig(**configuration(size))).save_pretrained(folder, safe_serialization=True)


def make_tokenizer(folder: str) -> None:
    """Make a tokenizer. The engine needs one, although it gets and returns ids."""
    from oarlock.data.embedded.tokenizer import train_tokenizer

    train_tokenizer(folder, 1024)


def compare(options: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """Rows of the table for a size."""
    with tempfile.TemporaryDirectory() as folder:
        words = [__file__, "--folder", folder, "--sizes", size]
        threads = str(options.threads)
        sides: dict[str, Peer] = {}
        if options.peer:
            sides["peer"] = Peer(options.peer, *words, "--side", "peer", "--threads", threads, OMP_NUM_THREADS=threads)
            sides["peer"].read_answer()
        else:
            make_model(folder, size)
        make_tokenizer(folder)
        sides["Oarlock"] = Peer(sys.executable, *words, "--side", "oarlock", OMP_NUM_THREADS=threads)
        rows = []
        for case in options.cases:
            taken = {name: "8 clients" if (name, case) == ("Oarlock", "8 in turn") else case for name in sides}
            rounds = []
            for _ in range(options.rounds + 1):  # the first one warms up
                one = {}
                for name, side in sides.items():
                    time.sleep(0.3)  # threads of the other one stop spinning
                    one[name] = side.ask(taken[name])
                rounds.append(one)
            rows += table(size, case, rounds[1:])
    return rows


def table(size: str, case: str, rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each side."""
    count = sum(answer for _, answer in CASES[case])
    rows = []
    for name in rounds[0]:
        times = [one[name]["seconds"] for one in rounds]
        row: dict[str, Any] = {"size": size, "case": case, "side": name, "tokens/s": count / statistics.median(times)}
        row["from"], row["to"] = count / max(times), count / min(times)
        row["first token ms"] = 1e3 * statistics.median(one[name]["first"] for one in rounds)
        if "peer" in rounds[0]:
            row["x peer"] = statistics.median(one["peer"]["seconds"] / one[name]["seconds"] for one in rounds)
            row["same tokens"] = all(one[name]["tokens"] == one["peer"]["tokens"] for one in rounds)
        rows.append(row)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    add_peer_flag(parser, "torch and transformers")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("oarlock", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "oarlock":
        oarlock_side(options.folder)
    elif options.side == "peer":
        peer_side(options.folder, options.sizes[0], options.threads)
    else:
        rows = [row for size in options.sizes for row in compare(options, size)]
        report("serving on the CPU, float32", rows, threads=options.threads)


if __name__ == "__main__":
    main()
