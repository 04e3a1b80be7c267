"""Training a byte-level BPE (GPT-2), which can encode every text without loss, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from oarlock.data.tokenizers.fast_tokenizer import SAVED_CLASS
from oarlock.files import write_json, write_text_atomically

NUM_BYTES = 256  # each byte is a token


def train_byte_level_bpe(
    texts: Iterable[str] | Iterable[list[str]],
    vocab_size: int,
    special_tokens: Sequence[str],
    splitter: Any = None,
    min_frequency: int = 0,
) -> Tokenizer:
    """Train a tokenizer. The same texts give the same tokenizer, on any number of threads.

    Args:
        vocab_size: most tokens, the special ones and the 256 bytes included. It has fewer if the texts do not suffice.
        special_tokens: they get the first ids.
        splitter: pre-tokenizer that splits text into words; by default GPT-2's. Tokens do not cross words.
        min_frequency: pairs that occur less often are not merged.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer_folder(
    folder: Path, tokenizer_json: str, end: str, chat_template: str | None, others: Sequence[str] = ()
) -> None:
    """Write tokenizer.json and the two files that assign the special tokens.

    Args:
        end: token that ends, begins and pads texts.
        others: additional special tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "tokenizer.json", tokenizer_json)
    special: dict[str, Any] = {"bos_token": end, "eos_token": end, "pad_token": end}
    if others:
        special["additional_special_tokens"] = list(others)
    config = {
        "tokenizer_class": SAVED_CLASS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **({"chat_template": chat_template} if chat_template else {}),
        **special,
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
