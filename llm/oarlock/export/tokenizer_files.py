"""What stands beside the weights of a converted model: tokenizer, chat template, generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.data.templates.template_files import save_templates, templates_in_folder
from oarlock.data.tokenizers.folder import needs_paddlenlp, read_tokenizer
from oarlock.data.tokenizers.load import has_tokenizer
from oarlock.environment.console import get_logger
from oarlock.errors import ModelError
from oarlock.families.registry import FAMILIES
from oarlock.files import GENERATION_FILE, read_json_object, write_json
from oarlock.model_config.generation_config import read_generation_config
from oarlock.weights.folder_files import copy_file
from oarlock.weights.save import LOCAL_KEYS

logger = get_logger(__name__)

_CONFIG, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_PIECES, _PADDLE_PIECES = "tokenizer.model", "sentencepiece.bpe.model"  # of sentencepiece, there and here
# Both read a tokenizer.json as it stands; the classes of single families may build another one of its vocabulary.
_GENERIC = {"hf": "PreTrainedTokenizerFast", "paddle": "PretrainedTokenizerFast"}
# What PaddleNLP's generation settings say in words of its own.
_PADDLE_SETTINGS = frozenset(
    {"decode_strategy", "paddlenlp_version", "trunc_input", "use_fast", "use_fp16_decoding", "fast_ptq_sampling"}
)
# What it means otherwise (lengths are without the prompt), or notes of a training.
_OTHERWISE_THERE = frozenset({"max_length", "min_length", "use_cache", "_from_model_config"})
# Of the pattern by which Qwen2 cuts text into words: every digit stands alone.
_QWEN2_DIGITS = "\\\\p{N}| ?[^\\\\s"


def write_companions(source: Path, to: str, config: Any, folder: Path) -> None:
    """Carry tokenizer, template and generation settings over.

    Args:
        to: "hf" or "paddle".
        config: PaddleNLP's of the model, for ids where there are no settings.

    Raises:
        ModelError: when the tokenizer can't be read, or is one that no tokenizer.json expresses.
    """
    if has_tokenizer(source):
        write_tokenizer(source, to, config.model_type, folder)
    else:
        logger.info(f"{source} has no tokenizer: the converted model has none")
    _write_generation(source, to, config, folder)


def write_tokenizer(source: Path, to: str, family: str, folder: Path) -> None:
    """The tokenizer and the chat template of a folder, as the readers of the other side want them.

    Args:
        family: model_type of the model.

    Raises:
        ModelError: when they can't be read, or the tokenizer is one that no tokenizer.json expresses.
    """
    _write_tokenizer(source, to, folder)
    if to == "hf" and FAMILIES[family].hf_resplits_text:
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
            copy_file(source, name, folder / name)
    if (source / _PADDLE_PIECES).is_file():
        copy_file(source, _PADDLE_PIECES, folder / _PIECES)
    if not (folder / _TOKENIZER).is_file():
        read_tokenizer(source).save_pretrained(folder)
        content = read_json_object(folder / _CONFIG)
    content = {name: value for name, value in content.items() if name not in (*LOCAL_KEYS, "auto_map")}
    content["tokenizer_class"] = _GENERIC[to]
    content.setdefault("clean_up_tokenization_spaces", False)
    content.pop("chat_template", None)
    write_json(folder / _CONFIG, content)
    save_templates(folder, templates_in_folder(source))


def _check_qwen2(folder: Path) -> None:
    """transformers 5 cuts text as Qwen2 does for every model of that type, whatever its tokenizer.json says."""
    path = folder / _TOKENIZER
    if path.is_file() and _QWEN2_DIGITS not in json.dumps(read_json_object(path).get("pre_tokenizer")):
        logger.info(
            "this tokenizer does not cut text as Qwen2's own: the AutoTokenizer of transformers 5 reads that of a "
            "Qwen2 as if it did, and may give other ids; PreTrainedTokenizerFast.from_pretrained gives the right ones"
        )


def _write_generation(source: Path, to: str, config: Any, folder: Path) -> None:
    content = read_generation_config(source)
    found = dict(content)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in found and getattr(config, name, None) is not None:
            found[name] = getattr(config, name)
    write_json(folder / GENERATION_FILE, _translated(found, to))


def _translated(content: Mapping[str, Any], to: str) -> dict[str, Any]:
    """With the words of the other side beside, or (to Hugging Face) in place of PaddleNLP's own."""
    if to == "paddle":
        if "do_sample" in content and "decode_strategy" not in content:
            return {**content, "decode_strategy": "sampling" if content["do_sample"] else "greedy_search"}
        return dict(content)
    theirs = "transformers_version" in content
    left_out = _PADDLE_SETTINGS | (set() if theirs else _OTHERWISE_THERE)
    found = {name: value for name, value in content.items() if name not in left_out}
    if "decode_strategy" in content and "do_sample" not in content:
        found["do_sample"] = content["decode_strategy"] == "sampling"
    return found
