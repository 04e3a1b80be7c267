"""Tokenizer folders in common layouts; small ones are trained here in the form of known families."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from oarlock.data.embedded.instructions import make_instruction_records

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
# Text as in real data and templates. {begin}, {end}: the tokenizer's own turn tokens, as a template writes them.
TEXTS = [
    "Hello, world! It's 12345 o'clock.",
    " leading space",
    "  two leading spaces, trailing  ",
    "\n\nnew lines\n\n\nand\ttabs\n",
    "",
    " ",
    "你好，世界！今天天气很好。",
    "emoji 🙂👍🏽 and naïve café, ﬁ ligature e\u0301",
    "def f(x):\n    if x:\n        return x  # done\n",
    "{begin}user\nHi {end}\n{begin}assistant\n",
    "{begin} spaces {end} beside {end}\n\n{end}",
    "a{end}b{end} c",
    "{begin}",
    "x" * 40,
]


def texts() -> Iterator[str]:
    for record in make_instruction_records("train")[:400]:
        yield f"{record['instruction']} {record['input']}\n{record['output']}"
    yield from TEXTS * 5


def save(folder: Path, tokenizer: Tokenizer | None, config: dict[str, Any], model_type: str, **files: str) -> Path:
    folder.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def _bytes(vocab_size: int = 600, special: list[str] | None = None, **model: Any) -> Tokenizer:
    found = Tokenizer(models.BPE(**model))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special or [], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found.train_from_iterator(texts(), trainer)
    return found


def _words(pattern: str) -> pre_tokenizers.Sequence:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _flags(content: str, special: bool = True, **more: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **flags, **more}


def qwen2() -> tuple[Tokenizer, dict[str, Any]]:
    found = _bytes()
    found.normalizer, found.pre_tokenizer = normalizers.NFC(), _words(QWEN2_WORDS)
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    size, turns = found.get_vocab_size(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    found.add_special_tokens(turns)
    found.add_tokens([AddedToken("<tool_call>", normalized=False)])
    listed = {str(size + i): _flags(token) for i, token in enumerate(turns)}
    listed[str(size + 3)] = _flags("<tool_call>", special=False)
    return found, {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": listed, "bos_token": None, "unk_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "errors": "replace", "split_special_tokens": False,
        "additional_special_tokens": turns[1:], "add_bos_token": False, "add_prefix_space": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 32768, "chat_template": TEMPLATE,
    }  # fmt: skip


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    found = _bytes(ignore_merges=True)
    found.pre_tokenizer = _words(LLAMA3_WORDS)
    found.add_special_tokens(["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>"])
    begin = [("<|begin_of_text|>", found.token_to_id("<|begin_of_text|>"))]
    found.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=begin,
            ),
        ]
    )
    return found, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": True, "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": TEMPLATE,
    }  # fmt: skip


def make_sentencepiece_like(scheme: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A sentencepiece-like BPE with byte fallback: Llama 2's (old and new form) and Gemma's."""
    special = ["<unk>", "<s>", "</s>"] if scheme != "gemma" else ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    found = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Replace(" ", "▁")
    if scheme == "gemma":
        found.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special + bytes_, show_progress=False)
    found.train_from_iterator((text[:60] for text in texts()), trainer)
    content = json.loads(found.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    content["model"]["vocab"] = {piece: i for i, piece in enumerate(content["model"]["vocab"])}
    found = Tokenizer.from_str(json.dumps(content))
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "prepend":
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme != "gemma":
        found.normalizer = None
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    found.decoder = decoders.Sequence(spaces if scheme == "gemma" else [*spaces, decoders.Strip(" ", 1, 0)])
    begin = special[2] if scheme == "gemma" else "<s>"
    found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    found.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B:1", special_tokens=[(begin, found.token_to_id(begin))]
    )
    names = {"bos_token": begin, "eos_token": "<eos>" if scheme == "gemma" else "</s>", "unk_token": "<unk>"}
    kind = "GemmaTokenizer" if scheme == "gemma" else "LlamaTokenizer"
    return found, {"tokenizer_class": kind, **names, "add_bos_token": True, "legacy": scheme == "always"}


def gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    found = _bytes(special=["<|endoftext|>"])
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    return found, {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}


def phi() -> tuple[Tokenizer, dict[str, Any]]:
    """Runs of spaces as non-special added tokens, and a special token that absorbs adjacent spaces."""
    found, config = gpt2()
    found.add_tokens([AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    found.add_special_tokens(
        [AddedToken("<|im_start|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True, rstrip=True)]
    )
    return found, config | {"tokenizer_class": "CodeGenTokenizer", "eos_token": "<|endoftext|>"}


def make_word_pieces() -> tuple[Tokenizer, dict[str, Any]]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.train_from_iterator(
        texts(), trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    )
    found.decoder = decoders.WordPiece()
    found.add_special_tokens([AddedToken("[MASK]", lstrip=True)])
    ends = [(token, found.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    return found, {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": True}


SHAPES: dict[str, tuple[Callable[[], tuple[Tokenizer, dict[str, Any]]], str]] = {
    "qwen2": (qwen2, "qwen2"),
    "llama3": (llama3, "llama"),
    "llama2 first": (lambda: make_sentencepiece_like("first"), "llama"),
    "llama2 always": (lambda: make_sentencepiece_like("always"), "llama"),
    "llama2 prepend": (lambda: make_sentencepiece_like("prepend"), "llama"),
    "gemma": (lambda: make_sentencepiece_like("gemma"), "gemma"),
    "gpt2": (gpt2, "gpt2"),
    "phi": (phi, "phi"),
    "word pieces": (make_word_pieces, ""),
}


def sentencepiece_model(folder: Path, kind: str, **more: Any) -> Path:
    """Train a tokenizer.model with sentencepiece."""
    import sentencepiece

    settings = {"character_coverage": 0.99, "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {
        "remove_extra_whitespaces": False,
        "vocab_size": 700,
        "user_defined_symbols": ["<|im_start|>", "<|im_end|>"],
    } | more
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(), model_writer=file, model_type=kind, minloglevel=2, **settings
        )
    return folder / "tokenizer.model"
