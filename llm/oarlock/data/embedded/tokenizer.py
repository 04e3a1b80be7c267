"""Training a byte-level BPE tokenizer on the embedded text, in a folder that PaddleNLP's AutoTokenizer can load."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

from oarlock.data.embedded.instructions import make_instruction_records
from oarlock.data.embedded.stdlib_text import read_stdlib_texts

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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeated, so that each character becomes one token, although it is rare compared with 1 MB of code.
    instructions = (
        "\n".join((record["instruction"], record["input"], record["output"]))
        for record in make_instruction_records("train")
        for _ in range(3)
    )
    tokenizer.train_from_iterator(chain(read_stdlib_texts(_EVERY), instructions), trainer)
    save_tokenizer(folder, tokenizer.to_str(pretty=False))


def save_tokenizer(folder: str | Path, tokenizer_json: str) -> None:
    """Write tokenizer.json and the two files that assign the special tokens."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    special = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
    config = {
        "tokenizer_class": "PretrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
        **special,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
