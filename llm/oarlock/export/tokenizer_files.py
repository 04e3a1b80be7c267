"""Write the tokenizer, chat template and generation settings of a converted model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarlock.data.templates.template_files import read_folder_templates, save_templates
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
_HF_SENTENCEPIECE, _PADDLE_SENTENCEPIECE = "tokenizer.model", "sentencepiece.bpe.model"
# Both read tokenizer.json as it is. The classes of single families may build another tokenizer of its vocabulary.
_GENERIC = {"hf": "PreTrainedTokenizerFast", "paddle": "PretrainedTokenizerFast"}
# Settings that only PaddleNLP has.
_PADDLE_SETTINGS = frozenset(
    {"decode_strategy", "paddlenlp_version", "trunc_input", "use_fast", "use_fp16_decoding", "fast_ptq_sampling"}
)
# Settings with another meaning in PaddleNLP (lengths without the prompt), and leftovers of training.
_OTHER_MEANING = frozenset({"max_length", "min_length", "use_cache", "_from_model_config"})
# Part of the pattern by which Qwen2 splits text into words: every digit is a word.
_QWEN2_DIGITS = "\\\\p{N}| ?[^\\\\s"


def write_tokenizer_files(source: Path, to: str, config: Any, folder: Path) -> None:
    """Convert the tokenizer, the chat template and the generation settings of a model.

    Args:
        to: "hf" or "paddle".
        config: PaddleNLP's configuration, for token ids that the settings lack.

    Raises:
        ModelError: when the tokenizer can't be read, or can't be written as tokenizer.json.
    """
    if has_tokenizer(source):
        write_tokenizer(source, to, config.model_type, folder)
    else:
        logger.info(f"{source} has no tokenizer, so the converted model has none")
    settings = dict(read_generation_config(source))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in settings and getattr(config, name, None) is not None:
            settings[name] = getattr(config, name)
    write_json(folder / GENERATION_FILE, _translate_settings(settings, to))


def write_tokenizer(source: Path, to: str, family: str, folder: Path) -> None:
    """Convert the tokenizer and the chat template of a model.

    Args:
        to: "hf" or "paddle".
        family: model_type of the model.

    Raises:
        ModelError: when they can't be read, or the tokenizer can't be written as tokenizer.json.
    """
    content = read_json_object(source / _CONFIG)
    if needs_paddlenlp(source, content):
        raise ModelError(
            f"no tokenizer.json, and no other program reads the files of "
            f"{content.get('tokenizer_class') or 'its tokenizer'}; add a tokenizer.json (transformers' "
            "save_pretrained writes one)"
        )
    for name in (*_FILES, _HF_SENTENCEPIECE):
        if (source / name).is_file():
            copy_file(source, name, folder / name)
    if (source / _PADDLE_SENTENCEPIECE).is_file():
        copy_file(source, _PADDLE_SENTENCEPIECE, folder / _HF_SENTENCEPIECE)
    if not (folder / _TOKENIZER).is_file():
        read_tokenizer(source).save_pretrained(folder)
        content = read_json_object(folder / _CONFIG)
    content = {name: value for name, value in content.items() if name not in (*LOCAL_KEYS, "auto_map")}
    content["tokenizer_class"] = _GENERIC[to]
    content.setdefault("clean_up_tokenization_spaces", False)
    content.pop("chat_template", None)
    write_json(folder / _CONFIG, content)
    save_templates(folder, read_folder_templates(source))
    path = folder / _TOKENIZER
    # transformers 5 splits text in Qwen2's way for every Qwen2 model.
    resplits = to == "hf" and FAMILIES[family].hf_resplits_text and path.is_file()
    if resplits and _QWEN2_DIGITS not in json.dumps(read_json_object(path).get("pre_tokenizer")):
        logger.info(
            "this tokenizer splits text differently from Qwen2's own. AutoTokenizer of transformers 5 ignores that and "
            "may return other ids. PreTrainedTokenizerFast.from_pretrained returns the right ones"
        )


def _translate_settings(content: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Translate generation settings. To Hugging Face, PaddleNLP's own settings are replaced."""
    if to == "paddle":
        if "do_sample" in content and "decode_strategy" not in content:
            return {**content, "decode_strategy": "sampling" if content["do_sample"] else "greedy_search"}
        return dict(content)
    theirs = "transformers_version" in content
    left_out = _PADDLE_SETTINGS | (set() if theirs else _OTHER_MEANING)
    found = {name: value for name, value in content.items() if name not in left_out}
    if "decode_strategy" in content and "do_sample" not in content:
        found["do_sample"] = content["decode_strategy"] == "sampling"
    return found
