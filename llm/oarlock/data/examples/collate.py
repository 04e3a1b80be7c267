"""Collators from samples to batches: {"input_ids", "labels"} int64 [batch, tokens], and "num_tokens" int64 [batch].

There is no attention mask. Padding is on the right, where causal attention never sees it from a real token, and its
labels are ignored. (DataCollatorForSeq2Seq pads on the tokenizer's padding side, the left for generation.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oarlock.data.examples.labels import IGNORE_INDEX, Example
from oarlock.data.examples.packing import Pack
from oarlock.errors import DataError

Arrays = dict[str, np.ndarray]


class PretrainCollator:
    """Split samples of seq_length + 1 tokens into inputs and labels, shifted by one."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Arrays:
        """Return inputs and labels, [batch, seq_length]."""
        tokens = np.stack([sample["text"] for sample in samples])
        check_ids(tokens, self.vocab_size)
        labels = tokens[:, 1:]
        if "mask" in samples[0]:  # from the corpus' .lsm file: the tokens with a loss
            labels = np.where(np.stack([sample["mask"] for sample in samples])[:, 1:] > 0, labels, IGNORE_INDEX)
        length = np.full([len(samples)], tokens.shape[1] - 1, np.int64)
        return {"input_ids": tokens[:, :-1], "labels": np.ascontiguousarray(labels), "num_tokens": length}


class FinetuneCollator:
    """Pad examples to the longest of the batch.

    Args:
        multiple_of: divisor of the padded length (sequence parallelism splits it).
        with_positions: also return position_ids int64 [batch, longest], 0 for padding. They tell how long each example
            is, on which some rotary embeddings depend (Rope.depends_on_length).
    """

    def __init__(self, vocab_size: int, pad_id: int, multiple_of: int = 1, with_positions: bool = False) -> None:
        self.vocab_size, self.pad_id, self.multiple_of = vocab_size, pad_id, multiple_of
        self.with_positions = with_positions

    def __call__(self, examples: Sequence[Example]) -> Arrays:
        """Return inputs and labels, [batch, longest]."""
        lengths = np.asarray([len(example.input_ids) for example in examples], np.int64)
        longest = -(-int(lengths.max()) // self.multiple_of) * self.multiple_of
        input_ids = np.full([len(examples), longest], self.pad_id, np.int64)
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for row, example in enumerate(examples):
            input_ids[row, : lengths[row]] = example.input_ids
            labels[row, : lengths[row]] = example.labels
        check_ids(input_ids, self.vocab_size)
        found = {"input_ids": input_ids, "labels": labels, "num_tokens": lengths}
        if self.with_positions:
            places = np.arange(longest)
            found["position_ids"] = np.where(places < lengths[:, None], places, 0)
        return found


class PackCollator(FinetuneCollator):
    """Pad packs, and add the arrays that keep their examples apart.

    - position_ids int64 [batch, longest], starting at 0 in each example;
    - attn_mask_startend_row_indices int32 [batch, longest], the end of each token's example: later tokens don't see
      it (PaddleNLP's name, for flashmask; oarlock.models.packing makes a dense mask of it).
    """

    def __call__(self, rows: Sequence[Example] | Sequence[Pack]) -> Arrays:
        """Return the batch; without packs (in evaluation), only what FinetuneCollator returns."""
        packs = [row for row in rows if isinstance(row, tuple)]
        arrays = super().__call__([row if isinstance(row, Example) else _join(row) for row in rows])
        if not packs:
            return arrays
        positions = np.zeros_like(arrays["input_ids"])
        # Each padding token is an example of its own.
        ends = np.tile(np.arange(1, positions.shape[1] + 1, dtype=np.int32), [len(packs), 1])
        for row, pack in enumerate(packs):
            start = 0
            for example in pack:
                end = start + len(example.input_ids)
                positions[row, start:end] = np.arange(end - start)
                ends[row, start:end] = end
                start = end
        return arrays | {"position_ids": positions, "attn_mask_startend_row_indices": ends}


def _join(pack: Pack) -> Example:
    return Example(
        [token for example in pack for token in example.input_ids],
        [label for example in pack for label in example.labels],
        truncated=False,
    )


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Refuse ids without a row in the embedding. On a GPU, they would crash the process without a message.

    Raises:
        DataError: with the id.
    """
    top, lowest = int(ids.max()), int(ids.min())
    if lowest < 0:
        raise DataError(
            f"the data contains token id {lowest}, which is never valid: the data is damaged or not token ids"
        )
    if top >= vocab_size:
        raise DataError(
            f"the data contains token id {top:,}, but the model's vocabulary has {vocab_size:,} rows: the data was "
            "made with another tokenizer"
        )
