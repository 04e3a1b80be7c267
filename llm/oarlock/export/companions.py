"""What stands beside the weights of a converted model: tokenizer, chat template, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from oarlock.data.templates import TEMPLATE_FILE
from oarlock.data.tokenizers import has_tokenizer, load_tokenizer
from oarlock.environment import say
from oarlock.errors import ModelError
from oarlock.export.sentencepiece_json import llama_tokenizer_json
from oarlock.files import read_json_object, write_json
from oarlock.models.generation_config import GENERATION_FILE, generation_content
from oarlock.models.save import LOCAL_KEYS

_CONFIG, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)
_SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model")  # there, and here for Llama
# Where there is no tokenizer.json: PaddleNLP's class -> Hugging Face's that reads the same files.
_CLASSES = {
    "LlamaTokenizer": "LlamaTokenizer",
    "GemmaTokenizer": "GemmaTokenizer",
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "GPTTokenizer": "GPT2Tokenizer",
    "GPTJTokenizer": "GPT2Tokenizer",
    "OPTTokenizer": "GPT2Tokenizer",
}
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
_PLAIN_TEXTS = ("Hello, world! 3 + 4 = 7.", "  two spaces, 中文 and\n\nnew lines\t.", " naïve café 😀")
_TEXTS = (*_PLAIN_TEXTS, "a <s> </s> [INST] x")


def write_companions(source: Path, to: str, config: Any, folder: Path) -> None:
    """Carry tokenizer, template and generation settings over.

    Args:
        to: "hf" or "paddle".
        config: PaddleNLP's of the model, for ids where there are no settings.

    Raises:
        ModelError: when the tokenizer can't be read, or no class of the other side reads its files.
    """
    if has_tokenizer(source):
        write_tokenizer(source, to, config.model_type, folder)
    else:
        say(f"{source} has no tokenizer: the converted model has none")
    _write_generation(source, to, config, folder)


def write_tokenizer(source: Path, to: str, family: str, folder: Path) -> None:
    """The tokenizer and the chat template of a folder, as the readers of the other side want them.

    Args:
        family: model_type of the model.

    Raises:
        ModelError: when they can't be read, or no class of the other side reads the files.
    """
    _write_tokenizer(source, to, folder)
    if to == "hf" and family == "qwen2":
        _check_qwen2(folder)
    if (source / _TOKENIZER).is_file():
        _compare_tokenizers(source if to == "hf" else folder, folder / _TOKENIZER)


def _write_tokenizer(source: Path, to: str, folder: Path) -> None:
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    piece = next((source / name for name in _SENTENCEPIECE if (source / name).is_file()), None)
    content = read_json_object(source / _CONFIG)
    family = str(content.get("tokenizer_class", ""))
    if piece is not None:
        llama_here = to == "paddle" and "Llama" in family
        shutil.copyfile(piece, folder / _SENTENCEPIECE[1 if llama_here else 0])
    content = {name: value for name, value in content.items() if name not in (*LOCAL_KEYS, "auto_map")}
    if to == "hf" and piece is not None and not (folder / _TOKENIZER).is_file():
        _add_tokenizer_json(source, folder)
    content["tokenizer_class"] = _class_for(folder, family, to)
    content.setdefault("clean_up_tokenization_spaces", False)
    if to == "hf" and content["tokenizer_class"] == "LlamaTokenizer":
        content.setdefault("legacy", True)  # a space goes before a text that begins with one too, as in PaddleNLP
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


def _add_tokenizer_json(source: Path, folder: Path) -> None:
    """Of PaddleNLP's Llama tokenizer, where that is one which gives the same ids."""
    tokenizer = load_tokenizer(str(source))
    text = llama_tokenizer_json(tokenizer) if type(tokenizer).__name__ == "LlamaTokenizer" else None
    if text is None:
        return
    made = Tokenizer.from_str(text)
    if all(made.encode(sample).ids == list(tokenizer(sample)["input_ids"]) for sample in _PLAIN_TEXTS):
        (folder / _TOKENIZER).write_text(text, encoding="utf-8")
    else:
        say(f"{source}: no tokenizer.json gives the ids of this sentencepiece model; readers make their own of it")


def _class_for(folder: Path, family: str, to: str) -> str:
    if (folder / _TOKENIZER).is_file():
        return _GENERIC[to]
    plain = family.removesuffix("Fast")
    if to == "hf":
        found = _CLASSES.get(plain) or (plain if plain in _CLASSES.values() else None)
    else:
        found = next((here for here, there in _CLASSES.items() if plain in (here, there)), None)
    if found is None:
        raise ModelError(
            f"no tokenizer.json, and nothing on the other side reads the files of {family or 'its tokenizer'}"
            "; put a tokenizer.json there (transformers' save_pretrained writes one)"
        )
    return found


def _compare_tokenizers(folder: Path, path: Path) -> None:
    """Say so if PaddleNLP gives other ids than tokenizer.json does (what transformers goes by).

    Args:
        folder: that PaddleNLP reads.
    """
    here = load_tokenizer(str(folder))
    there = Tokenizer.from_file(str(path))
    for text in _TEXTS:
        ours, theirs = list(here(text)["input_ids"]), there.encode(text).ids
        if ours != theirs:
            say(f"tokenizer: {text!r} is {ours} in PaddleNLP and {theirs} in transformers, by the same {_TOKENIZER}")
            return


def _write_generation(source: Path, to: str, config: Any, folder: Path) -> None:
    content = generation_content(source)
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
