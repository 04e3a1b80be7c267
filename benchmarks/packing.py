"""Trained tokens per second with padding and with packing, for several distributions of lengths.

    python benchmarks/packing.py [--rounds 3] [--tokens 16000]

A Llama of 5.2 million parameters (4 layers of width 256, plain attention, float32, AdamW) trains on the same examples
in both ways in turn: forward, backward and optimizer step. Padded batches have --batch-size examples in random order,
padded to the longest of each batch. Packed batches have as many packs as hold about as many tokens. A pack is as long
as the longest example, which is Oarlock's default; for alpaca 512, as in the full data set. `ratio` is the median of
the rounds.

Distributions, in tokens:

- alpaca: prompts and answers of log-normal length with the means of Stanford Alpaca in arXiv 2306.04751, table 1 (27.8
  and 64.6 tokens), 40 tokens of Alpaca's prompt text around them, cut at 512. The deviations (0.6 and 0.8 of the
  logarithm) are chosen;
- equal: 110 to 120;
- halves: 300 to 512, no two of which fit into a pack;
- outliers: 40 to 60, and one of 100 has 512, which sets the length of the packs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import load_average, make_parser, report

VOCABULARY, LONGEST = 4096, 512
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LONGEST, "use_cache": False,
    "use_fast_layer_norm": False, "use_flash_attention": False,
}  # fmt: skip


def log_normal(random: np.random.RandomState, mean: float, deviation: float, count: int) -> np.ndarray:
    """Draw from a log-normal distribution of this mean; the deviation is that of the logarithm."""
    return random.lognormal(np.log(mean) - deviation**2 / 2, deviation, count)


def alpaca(random: np.random.RandomState, count: int) -> np.ndarray:
    """Evenly spaced quantiles of 52,002, so that few examples are padded as much as all of them are."""
    lengths = 40 + log_normal(random, 27.8, 0.6, 52_002) + log_normal(random, 64.6, 0.8, 52_002)
    chosen = np.quantile(np.minimum(lengths, LONGEST), (np.arange(count) + 0.5) / count)
    return random.permutation(chosen).astype(np.int64)


def outliers(random: np.random.RandomState, count: int) -> np.ndarray:
    return np.where(np.arange(count) % 100 == 50, LONGEST, random.randint(40, 61, count))


DISTRIBUTIONS: dict[str, Callable[[np.random.RandomState, int], np.ndarray]] = {
    "alpaca": alpaca,
    "equal": lambda random, count: random.randint(110, 121, count),
    "halves": lambda random, count: random.randint(300, LONGEST + 1, count),
    "outliers": outliers,
}


def made_up(random: np.random.RandomState, length: int) -> Any:
    """A random example. Its second half is the answer."""
    from oarlock.data.examples.labels import IGNORE_INDEX, Example

    ids = random.randint(0, VOCABULARY, length + 1).tolist()
    half = length // 2
    return Example(ids[:-1], [IGNORE_INDEX] * half + ids[half + 1 :], False)


class Epoch:
    """A model, and the batches of one pass over the examples."""

    def __init__(self, collator: Any, dataset: Any, batch_size: int) -> None:
        import paddle
        from paddlenlp.transformers import LlamaConfig

        from oarlock.data.corpus.order import SampleOrder
        from oarlock.decoder.classes import make_model_class

        paddle.seed(0)
        self.model = make_model_class("llama")(LlamaConfig(**LLAMA))
        self.optimizer = paddle.optimizer.AdamW(1e-4, parameters=self.model.parameters())
        order = SampleOrder(len(dataset), 0)
        starts = range(0, len(dataset), batch_size)
        rows = [[dataset[order[i]] for i in range(start, min(start + batch_size, len(dataset)))] for start in starts]
        self.batches, self.collator = rows, collator

    def tokens_per_second(self) -> float:
        """Train for one pass; returns trained tokens per second."""
        import paddle

        from oarlock.models.packing import adapt_attention_mask
        from oarlock.train.step.loss import TokenCrossEntropy, count_trained_tokens

        criterion, tokens, started = TokenCrossEntropy(), 0, time.perf_counter()
        for rows in self.batches:
            batch = {name: paddle.to_tensor(array) for name, array in self.collator(rows).items()}
            labels, _ = batch.pop("labels"), batch.pop("num_tokens")
            criterion.normalizer = count_trained_tokens(labels)
            tokens += criterion.normalizer
            loss = criterion(self.model(**adapt_attention_mask(batch, self.model)), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.clear_grad()
        float(loss)
        return tokens / (time.perf_counter() - started)


def measure(name: str, tokens: int, batch_size: int, rounds: int) -> dict[str, Any]:
    from oarlock.data.examples.collate import FinetuneCollator, PackCollator
    from oarlock.data.examples.dataset import ExampleDataset
    from oarlock.data.examples.packing import PackedDataset, measure_padded_fill

    random = np.random.RandomState(1)
    count = max(2, round(tokens / DISTRIBUTIONS[name](random, 100).mean() / batch_size)) * batch_size
    lengths = DISTRIBUTIONS[name](random, count)
    examples = ExampleDataset([made_up(random, int(length)) for length in lengths])
    packed = PackedDataset(examples, LONGEST if name == "alpaca" else None, 0)
    packs = max(1, round(batch_size * len(packed) / count))
    ways = {
        "padded": Epoch(FinetuneCollator(VOCABULARY, 0), examples, batch_size),
        "packed": Epoch(PackCollator(VOCABULARY, 0), packed, packs),
    }
    for way in ways.values():
        way.batches, kept = way.batches[:1], way.batches
        way.tokens_per_second()  # warms up
        way.batches = kept
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for name_of_way in list(ways)[:: 1 if turn % 2 else -1]:
            found[name_of_way].append(ways[name_of_way].tokens_per_second())
    return {
        "lengths": name,
        "mean": float(lengths.mean()),
        "longest": int(lengths.max()),
        "batch": f"{batch_size} / {packs}",
        "padded full": measure_padded_fill(lengths, batch_size, 0),
        "packed full": float(lengths.sum() / (len(packed) * packed.capacity)),
        "padded tokens/s": statistics.median(found["padded"]),
        "packed tokens/s": statistics.median(found["packed"]),
        "ratio": statistics.median(b / a for a, b in zip(found["padded"], found["packed"], strict=True)),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_000, help="of the examples of a round")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lengths", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    arguments = parser.parse_args()
    from oarlock.environment.paddle_import import import_paddle, set_paddlenlp_log_level

    threads = import_paddle()
    set_paddlenlp_log_level("error")
    load = load_average()
    rows = [measure(name, arguments.tokens, arguments.batch_size, arguments.rounds) for name in arguments.lengths]
    report("packing", rows, threads=threads, load_before=load, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
