"""Training a byte-level BPE tokenizer on the embedded text, in a folder that PaddleNLP's AutoTokenizer can load."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from oarlock.data.embedded.instructions import make_instruction_records
from oarlock.data.embedded.stdlib_text import read_stdlib_texts
from oarlock.data.tokenizers.byte_level_bpe import train_byte_level_bpe, write_tokenizer_folder

EOS = "<|endoftext|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"

# One round: <|user|>question<|assistant|>answer<|endoftext|>. Jinja, as in Hugging Face's tokenizer_config.json.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|endoftext|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# For a small vocabulary, every eighth file (more than 1 MB) yields the same merges in a tenth of the time.
_EVERY = 8


def train_tokenizer(folder: str | Path, vocab_size: int = 4096) -> None:
    """Train on the standard library, and for Chinese on the training instructions. Saves the tokenizer to `folder`."""
    # Repeated, so that each character becomes one token, although it is rare compared with 1 MB of code.
    instructions = (
        "\n".join((record["instruction"], record["input"], record["output"]))
        for record in make_instruction_records("train")
        for _ in range(3)
    )
    texts = chain(read_stdlib_texts(_EVERY), instructions)
    save_tokenizer(folder, train_byte_level_bpe(texts, vocab_size, [EOS, USER, ASSISTANT]).to_str(pretty=False))


def save_tokenizer(folder: str | Path, tokenizer_json: str) -> None:
    """Write the tokenizer with the chat template of the embedded instructions."""
    write_tokenizer_folder(Path(folder), tokenizer_json, EOS, CHAT_TEMPLATE)
