"""Reading the tokenizer of a folder, by one rule for all tokenizers.

The ids are those of tokenizer.json, whatever class tokenizer_config.json names. Without that file, the tokenizer is
made from the vocabulary in the folder, as in transformers 5. Special tokens, added tokens, BOS and EOS are read from
tokenizer_config.json, special_tokens_map.json and added_tokens.json, also as in transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from typing_extensions import TypedDict

from oarlock.data.templates.template_files import read_template
from oarlock.data.tokenizers.fast_tokenizer import SPECIAL_NAMES, FastTokenizer
from oarlock.data.tokenizers.library_errors import convert_errors
from oarlock.data.tokenizers.schema import (
    MAX_UNNAMED,
    read_added_tokens,
    read_special_tokens,
    read_tokenizer_config,
)
from oarlock.data.tokenizers.tokenizer_json import read_tokenizer_json
from oarlock.data.tokenizers.trial import try_tokenizer
from oarlock.data.tokenizers.vocabulary_files import (
    BYTE_LEVEL_CLASSES,
    make_byte_level_tokenizer,
    make_sentencepiece_tokenizer,
    make_tekken_tokenizer,
    make_tiktoken_tokenizer,
)
from oarlock.environment.console import log_once
from oarlock.errors import ModelError, first_line
from oarlock.formats.files import open_regular
from oarlock.formats.json_file import read_json_if_there

CONFIG, TOKENIZER, SPECIAL, ADDED = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Names of sentencepiece models: Hugging Face's, and that of PaddleNLP's Llama.
_HF_PIECES, _PADDLE_PIECES = "tokenizer.model", "sentencepiece.bpe.model"
_TIKTOKEN = "tiktoken.model"
# Classes of transformers that read the same files in the same way, and PaddleNLP's names for them.
_SAME_CLASS = {
    "CodeGenTokenizer": "GPT2Tokenizer",
    "GPTTokenizer": "GPT2Tokenizer",
    "GPTJTokenizer": "GPT2Tokenizer",
    "OPTTokenizer": "GPT2Tokenizer",
}
# Families for which transformers 5 overrides the class that the folder names ("": its generic class).
_FAMILY_OVERRIDES = {"qwen2": "Qwen2Tokenizer", "mistral": "", "mixtral": "", "phi3": "", "glm": "", "glm4": ""}
_FAMILY_CLASSES = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "opt", "gptj", "phi", "codegen"), "GPT2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}
# Default special tokens of a class.
_CLASS_SPECIAL = {
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
    | {"pad_token": "<|padding|>"},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    | {"mask_token": "<mask>"},
}
# PaddleNLP's classes for tokenizers that no tokenizer.json can express. ChatGLM and GLM look up tokens outside their
# sentencepiece model, add tokens after a text, and handle line ends and runs of spaces in Python.
PADDLENLP_ALONE = (
    "ChatGLMTokenizer",
    "ChatGLMv2Tokenizer",
    "GLMGPT2Tokenizer",
    "GLMChineseTokenizer",
    "GLMBertTokenizer",
)


class _ModelFields(TypedDict, total=False):
    """The fields of config.json and generation_config.json that affect the tokenizer."""

    model_type: str | None
    tokenizer_class: str | None
    eos_token_id: int | list[int] | None


def needs_paddlenlp(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether only a class of PaddleNLP can read the tokenizer of this folder."""
    if (folder / TOKENIZER).is_file():
        return False
    named = str(config.get("tokenizer_class") or config.get("init_class") or "")
    files = [_HF_PIECES, _TIKTOKEN, "tekken.json", "vocab.json"]
    files += [_PADDLE_PIECES] if "Llama" in named or not named else []  # other families add tokens before its own
    return named in PADDLENLP_ALONE or not any((folder / name).is_file() for name in files)


def read_tokenizer(folder: Path) -> FastTokenizer:
    """Read the tokenizer of a folder.

    Raises:
        ModelError: with the file that can't be read, and why.
    """
    try:
        with convert_errors(f"{folder}: the tokenizer can't be used"):
            found = _read_tokenizer(folder)
            try_tokenizer(found)
        return found
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        files = ", ".join(name for name in (CONFIG, TOKENIZER, SPECIAL, ADDED) if (folder / name).is_file())
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{folder}: unexpected content in {files} ({what})") from error


def _read_tokenizer(folder: Path) -> FastTokenizer:
    config = read_tokenizer_config(folder / CONFIG)
    kind = _choose_class(folder, config)
    named = {} if "added_tokens_decoder" in config else read_special_tokens(folder / SPECIAL)
    settings = {**config, **{name: value for name, value in named.items() if value is not None}}
    listed = _list_added_tokens(folder, config, settings)
    special = {
        name: _get_text(value) for name, value in settings.items() if name.endswith("_token") and _get_text(value)
    }
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        special |= {str(name): _get_text(value) for name, value in extra.items()}
        extra = []
    path = folder / TOKENIZER
    if path.is_file():
        backend, own = read_tokenizer_json(path, set(special.values())), _CLASS_SPECIAL.get(kind, {})
    else:
        backend, pieces, own = _make_from_vocabulary(folder, kind, settings, listed)
        extra = [*extra, *pieces]
        own = own or _CLASS_SPECIAL.get(kind, {})
    vocabulary = backend.get_vocab(with_added_tokens=True)
    # A token that the folder sets to null does not exist.
    own = {name: token for name, token in own.items() if token in vocabulary and name not in settings}
    special = {**own, **special}
    special = dict(sorted(special.items(), key=lambda item: (*SPECIAL_NAMES, item[0]).index(item[0])))
    _add_tokens(backend, folder, listed, special, extra)
    if not path.is_file():
        _add_bos_and_eos(backend, folder, settings, special)
    else:  # the file has precedence over the configuration, as in transformers 5
        row = backend.encode("a", add_special_tokens=True).ids
        for flag, name, end in (("add_bos_token", "bos_token", row[:1]), ("add_eos_token", "eos_token", row[-1:])):
            id_ = backend.token_to_id(special.get(name, "")) if name in special else None
            if id_ is not None and isinstance(settings.get(flag), bool) and settings[flag] != (end == [id_]):
                adds = "adds it" if end == [id_] else "does not add it"
                log_once(f"{folder / CONFIG} has {flag} {settings[flag]}, but {path.name} {adds}, which is used")
    if "eos_token" not in settings and "eos_token" not in special:
        special |= _find_eos_of_model(folder, backend)
    files = [folder / "chat_template.jinja", *sorted(folder.glob("chat_templates/*.jinja"))]
    templates = {str(file.relative_to(folder)): read_template(file) for file in files if file.is_file()}
    return FastTokenizer(backend, config, special, str(folder), templates)


def _choose_class(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the class that transformers 5 uses for a folder, or "" for its generic one."""
    model = read_json_if_there(folder / "config.json", _ModelFields) or {}
    family = model.get("model_type") or ""
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if family in _FAMILY_OVERRIDES and named != _FAMILY_OVERRIDES[family]:
        return _FAMILY_OVERRIDES[family]
    return _SAME_CLASS.get(named, named) if named else _FAMILY_CLASSES.get(family, "")


def _get_text(token: Any) -> str:
    """Return the text of a token in a configuration: a string, or an object with flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _make_added_token(token: Any, special: bool) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(str(token), special=special, normalized=not special)
    flags = {name: bool(token[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
    return AddedToken(_get_text(token), special=bool(token.get("special", special)), **flags)


def _list_added_tokens(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return id -> added token, from tokenizer_config.json or else the older added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        return {
            int(id_): _make_added_token(token, special=False)
            for id_, token in sorted(listed.items(), key=lambda x: int(x[0]))
        }
    older = read_added_tokens(folder / ADDED)
    special = {_get_text(settings.get(name)) for name in SPECIAL_NAMES}
    special |= {_get_text(token) for token in settings.get("additional_special_tokens") or []}
    ordered = sorted(older.items(), key=lambda item: item[1])
    return {
        int(id_): AddedToken(text, special=text in special, normalized=text not in special) for text, id_ in ordered
    }


def _make_from_vocabulary(
    folder: Path, kind: str, settings: Mapping[str, Any], listed: Mapping[int, AddedToken]
) -> tuple[Tokenizer, list[AddedToken], dict[str, str]]:
    """Make a tokenizer from the vocabulary of a folder. Also returns tokens to add, and special tokens by name."""
    if (folder / "tekken.json").is_file():
        backend, special = make_tekken_tokenizer(folder / "tekken.json")
        return backend, [], special
    prefix = settings.get("add_prefix_space")
    for name in (_HF_PIECES, _PADDLE_PIECES, _TIKTOKEN):
        path = folder / name
        if not path.is_file():
            continue
        with open_regular(path) as file:
            words = file.readline(200).split()
        # A .model file with lines "base64 rank" is one too (Llama 3 as published by Meta).
        if name == _TIKTOKEN or (len(words) == 2 and words[1].isdigit()):
            with open_regular(path) as file:
                size = sum(1 for line in file if line.strip())
            last = max(listed, default=-1)
            if last - size - len(listed) > MAX_UNNAMED:
                raise ModelError(f"{folder / CONFIG}: the added token {last:,} is far above the {size:,} of {name}")
            # The tokens after the vocabulary. Ids without a token get a generated one.
            more = [listed[i].content if i in listed else f"<|reserved_token_{i}|>" for i in range(size, last + 1)]
            return make_tiktoken_tokenizer(path, more), [], {}
        # In PaddleNLP's layout, sentencepiece itself reads the model, so the file is followed exactly.
        plain = name == _PADDLE_PIECES
        renamed = {id_: token.content for id_, token in listed.items()}
        return make_sentencepiece_tokenizer(
            path, "" if plain else kind, True if plain else settings.get("legacy"), prefix, renamed
        )
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelError(f"{folder}: no {TOKENIZER}, and no {merges.name} for {vocabulary.name}")
    if kind not in BYTE_LEVEL_CLASSES:
        raise ModelError(
            f"{folder}: {vocabulary.name} and {merges.name} do not define how text is split into words, and the class "
            f"of the tokenizer ({kind or 'not given'}) is not one of {', '.join(BYTE_LEVEL_CLASSES)}. Set "
            f"tokenizer_class in {CONFIG}, or add a {TOKENIZER} (save_pretrained of transformers writes one)"
        )
    return make_byte_level_tokenizer(vocabulary, merges, kind, bool(prefix)), [], {}


def _add_tokens(
    backend: Tokenizer, folder: Path, listed: Mapping[int, AddedToken], special: Mapping[str, str], extra: list[Any]
) -> None:
    """Add the listed tokens, then the named ones, then the other special ones."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = {token.content: token for token in listed.values()}
    for content in special.values():
        if content in tokens:
            tokens[content].special = True
        elif content not in known:
            tokens[content] = AddedToken(content, special=True, normalized=False)
    for token in extra:
        content = token.content if isinstance(token, AddedToken) else _get_text(token)
        if content and content not in tokens and content not in known:
            tokens[content] = token if isinstance(token, AddedToken) else _make_added_token(token, special=True)
    backend.add_tokens(list(tokens.values()))
    for id_, token in listed.items():
        found = backend.token_to_id(token.content)
        if found != id_:
            log_once(
                f"{folder / CONFIG}: the added token {token.content!r} has the id {id_}, but {found} in the vocabulary"
            )


def _add_bos_and_eos(backend: Tokenizer, folder: Path, settings: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Apply add_bos_token and add_eos_token. PaddleNLP's Llama adds BOS by default."""
    begins = settings.get("add_bos_token", (folder / _PADDLE_PIECES).is_file() and not (folder / _HF_PIECES).is_file())
    begin = [special["bos_token"]] if begins and "bos_token" in special else []
    end = [special["eos_token"]] if settings.get("add_eos_token") and "eos_token" in special else []
    if begin or end:
        pair = [*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*begin, "$A", *end]),
            pair=" ".join(pair),
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*begin, *end])],
        )


def _find_eos_of_model(folder: Path, backend: Tokenizer) -> dict[str, str]:
    """Return the EOS token of the model's configuration, if the tokenizer has none."""
    for file in ("generation_config.json", "config.json"):
        ids = (read_json_if_there(folder / file, _ModelFields) or {}).get("eos_token_id")
        id_ = ids[0] if isinstance(ids, list) and ids else ids
        token = backend.id_to_token(id_) if isinstance(id_, int) and id_ >= 0 else None
        if token is not None:
            log_once(f"{folder}: the tokenizer has no eos_token; using {token!r}, the eos_token_id of {file}")
            return {"eos_token": token}
    return {}
