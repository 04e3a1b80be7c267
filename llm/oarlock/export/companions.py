"""What stands beside the weights of a converted model: tokenizer, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.data.templates import TEMPLATE_FILE
from oarlock.data.tokenizer_folder import needs_paddlenlp, read_tokenizer
from oarlock.data.tokenizers import has_tokenizer
from oarlock.environment import say
from oarlock.errors import ModelError
from oarlock.files import read_json_object, write_json
from oarlock.models.save import LOCAL_KEYS

_CONFIG, _TOKENIZER, _GENERATION = "tokenizer_config.json", "tokenizer.json", "generation_config.json"
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)
_PIECES, _PADDLE_PIECES = "tokenizer.model", "sentencepiece.bpe.model"  # of sentencepiece, there and here
# Both read a tokenizer.json as it stands; the classes of single families may build another one of its vocabulary.
_GENERIC = {"hf": "PreTrainedTokenizerFast", "paddle": "PretrainedTokenizerFast"}
# Generation settings that mean the same on both sides (max_length does not: the prompt counts there alone).
_SETTINGS = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "num_beams", "num_return_sequences", "early_stopping",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Of the pattern by which Qwen2 cuts text into words: every digit stands alone.
_QWEN2_DIGITS = "\\\\p{N}| ?[^\\\\s"


def write_companions(source: Path, layout: str, to: str, config: Any, folder: Path) -> None:
    """Carry tokenizer, template and generation settings over.

    Args:
        layout: of the source, "np" or "pt".
        to: "hf" or "paddle".
        config: PaddleNLP's of the model, for ids where there are no settings.

    Raises:
        ModelError: when the tokenizer can't be read, or is one that no tokenizer.json expresses.
    """
    if has_tokenizer(source):
        write_tokenizer(source, to, config.model_type, folder)
    else:
        say(f"{source} has no tokenizer: the converted model has none")
    _write_generation(source, layout, to, config, folder)


def write_tokenizer(source: Path, to: str, family: str, folder: Path) -> None:
    """The tokenizer and the chat template of a folder, as the readers of the other side want them.

    Args:
        family: model_type of the model.

    Raises:
        ModelError: when they can't be read, or the tokenizer is one that no tokenizer.json expresses.
    """
    _write_tokenizer(source, to, folder)
    if to == "hf" and family == "qwen2":
        _check_qwen2(folder)


def _write_tokenizer(source: Path, to: str, folder: Path) -> None:
    content = read_json_object(source / _CONFIG)
    if needs_paddlenlp(source, content):
        raise ModelError(
            f"no tokenizer.json, and nothing on the other side reads the files of "
            f"{content.get('tokenizer_class') or 'its tokenizer'}; put a tokenizer.json there (transformers' "
            "save_pretrained writes one)"
        )
    for name in (*_FILES, _PIECES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _PADDLE_PIECES).is_file():
        shutil.copyfile(source / _PADDLE_PIECES, folder / _PIECES)
    if not (folder / _TOKENIZER).is_file():
        read_tokenizer(source).save_pretrained(folder)
        content = read_json_object(folder / _CONFIG)
    content = {name: value for name, value in content.items() if name not in (*LOCAL_KEYS, "auto_map")}
    content["tokenizer_class"] = _GENERIC[to]
    content.setdefault("clean_up_tokenization_spaces", False)
    template = folder / TEMPLATE_FILE
    if template.is_file():
        content["chat_template"] = template.read_text(encoding="utf-8")
    elif isinstance(content.get("chat_template"), str):
        template.write_text(content["chat_template"], encoding="utf-8")
    elif (source / "chat_template.json").is_file():
        say(f"{source / 'chat_template.json'}: PaddleNLP's own form of a chat template is not carried over")
    write_json(folder / _CONFIG, content)


def _check_qwen2(folder: Path) -> None:
    """transformers 5 cuts text as Qwen2 does for every model of that type, whatever its tokenizer.json says."""
    path = folder / _TOKENIZER
    if path.is_file() and _QWEN2_DIGITS not in json.dumps(read_json_object(path).get("pre_tokenizer")):
        say(
            "this tokenizer does not cut text as Qwen2's own: the AutoTokenizer of transformers 5 reads that of a "
            "Qwen2 as if it did, and may give other ids; PreTrainedTokenizerFast.from_pretrained gives the right ones"
        )


def _write_generation(source: Path, layout: str, to: str, config: Any, folder: Path) -> None:
    content = read_json_object(source / _GENERATION)
    if to == "hf" and layout == "pt" and content:
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)
        return
    found = {name: content[name] for name in _SETTINGS if content.get(name) is not None}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in found and getattr(config, name, None) is not None:
            found[name] = getattr(config, name)
    write_json(folder / _GENERATION, found | _strategy(content, to))


def _strategy(content: Mapping[str, Any], to: str) -> dict[str, Any]:
    """How the next token is chosen: `do_sample` there, `decode_strategy` here."""
    if "do_sample" not in content and "decode_strategy" not in content:
        return {}
    samples = bool(content.get("do_sample")) or content.get("decode_strategy") == "sampling"
    return {"do_sample": samples} if to == "hf" else {"decode_strategy": "sampling" if samples else "greedy_search"}
