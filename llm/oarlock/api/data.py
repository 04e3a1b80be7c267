"""Making training data from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from oarlock.data.tokenizers.train_tokenizer import TokenizerReport


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    chat: bool = True,
    digits: Literal["one", "three", "any"] = "one",
    min_frequency: int = 2,
    max_megabytes: float = 500.0,
    max_memory: float = 8.0,
    text_key: str = "text",
    txt_document: Literal["file", "line"] = "file",
    skip_bad: bool = False,
) -> TokenizerReport:
    """Train a byte-level BPE tokenizer on text files, and measure it on a held-out part of them.

    Args:
        inputs: files and folders, as for `oarlock data pretrain`.
        vocab_size: tokens, the 256 bytes and the special tokens included.
        output: folder to write. It must not exist yet.
        special_tokens: the first one ends texts.
        chat: add the tokens and the template of ChatML.
        digits: digits that a token may hold: one (as Qwen), up to three (as Llama 3), or any number.
        min_frequency: pairs of tokens that occur less often are not merged.
        max_megabytes: text to train on. Of more text, evenly spaced pieces are taken.
        max_memory: GB that training may take. Text with too many different words for it is refused.
        text_key: JSON field or column with the text.
        txt_document: what counts as one document of a .txt file.
        skip_bad: skip and count bad lines. By default the first one stops the training.

    Returns:
        What was read, and the bytes per token of each input, on text that was trained on and on held-out text.

    Raises:
        ConfigError: the vocabulary is too small, or a special token is wrong.
        DataError: a line is bad, or there is too little text, or too much for the memory. Nothing is left then.

    Example:
        >>> train_tokenizer(["my_texts"], 32000, "output/tokenizer").tokens
        32000
    """
    from oarlock.data.tokenizers.train_tokenizer import TokenizerOptions
    from oarlock.data.tokenizers.train_tokenizer import train_tokenizer as train

    return train(
        TokenizerOptions(
            inputs=tuple(map(str, inputs)),
            output=Path(output),
            vocab_size=vocab_size,
            special_tokens=tuple(special_tokens),
            chat=chat,
            digits=digits,
            min_frequency=min_frequency,
            max_bytes=round(max_megabytes * 1e6),
            max_memory=round(max_memory * 1e9),
            text_key=text_key,
            txt_document=txt_document,
            skip_bad=skip_bad,
        )
    )
