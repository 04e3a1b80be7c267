"""A folder's tokenizer: one rule for all of them.

The ids are those of tokenizer.json, whatever class tokenizer_config.json names. Where there is none, it is made of the
vocabulary that lies there, as transformers 5 makes it. Special tokens, added tokens and the begin and end tokens are
read from tokenizer_config.json, special_tokens_map.json and added_tokens.json as transformers 5 reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from typing_extensions import TypedDict

from oarlock.data.templates.template_files import read_template
from oarlock.data.tokenizers.fast_tokenizer import SPECIAL_NAMES, FastTokenizer
from oarlock.data.tokenizers.library_errors import library_errors
from oarlock.data.tokenizers.schema import (
    MOST_UNNAMED,
    read_added_tokens,
    read_special_tokens,
    read_tokenizer_config,
)
from oarlock.data.tokenizers.tokenizer_json import read_tokenizer_json
from oarlock.data.tokenizers.trial import try_tokenizer
from oarlock.data.tokenizers.vocabulary_files import (
    BYTE_LEVEL_CLASSES,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    tekken_tokenizer,
    tiktoken_tokenizer,
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
# sentencepiece models: Hugging Face's name, and that of PaddleNLP's Llama.
_HF_PIECES, _PADDLE_PIECES = "tokenizer.model", "sentencepiece.bpe.model"
_TIKTOKEN = "tiktoken.model"
# Classes of transformers that read the same files in the same way, and PaddleNLP's names.
_SAME_CLASS = {
    "CodeGenTokenizer": "GPT2Tokenizer",
    "GPTTokenizer": "GPT2Tokenizer",
    "GPTJTokenizer": "GPT2Tokenizer",
    "OPTTokenizer": "GPT2Tokenizer",
}
# Families whose class transformers 5 takes over what the folder names: of Qwen2's own, or none ("": the file's word).
_TAKEN = {"qwen2": "Qwen2Tokenizer", "mistral": "", "mixtral": "", "phi3": "", "glm": "", "glm4": ""}
_OF_FAMILY = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "opt", "gptj", "phi", "codegen"), "GPT2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}
# What a class has for special tokens where the folder names none.
_OWN_SPECIAL = {
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
    | {"pad_token": "<|padding|>"},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    | {"mask_token": "<mask>"},
}
# PaddleNLP's classes for tokenizers that no tokenizer.json expresses: ChatGLM and GLM look tokens up beside their
# sentencepiece model, put tokens behind a text, and tell line ends and runs of spaces from text in Python.
PADDLENLP_ALONE = (
    "ChatGLMTokenizer",
    "ChatGLMv2Tokenizer",
    "GLMGPT2Tokenizer",
    "GLMChineseTokenizer",
    "GLMBertTokenizer",
)


class _ModelWords(TypedDict, total=False):
    """What of config.json and generation_config.json a tokenizer goes by."""

    model_type: str | None
    tokenizer_class: str | None
    eos_token_id: int | list[int] | None


def needs_paddlenlp(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the tokenizer of this folder is one that only a class of PaddleNLP reads."""
    if (folder / TOKENIZER).is_file():
        return False
    named = str(config.get("tokenizer_class") or config.get("init_class") or "")
    files = [_HF_PIECES, _TIKTOKEN, "tekken.json", "vocab.json"]
    files += [_PADDLE_PIECES] if "Llama" in named or not named else []  # other families put other tokens before its own
    return named in PADDLENLP_ALONE or not any((folder / name).is_file() for name in files)


def read_tokenizer(folder: Path) -> FastTokenizer:
    """The tokenizer of a folder.

    Raises:
        ModelError: naming the file that can't be read, and why.
    """
    try:
        with library_errors(f"{folder}: the tokenizer can't be used"):
            found = _read_tokenizer(folder)
            try_tokenizer(found)
        return found
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        files = ", ".join(name for name in (CONFIG, TOKENIZER, SPECIAL, ADDED) if (folder / name).is_file())
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{folder}: something in {files} has another form than tokenizers have ({what})") from error


def _read_tokenizer(folder: Path) -> FastTokenizer:
    config = read_tokenizer_config(folder / CONFIG)
    kind = _class_of(folder, config)
    named = {} if "added_tokens_decoder" in config else read_special_tokens(folder / SPECIAL)
    told = {**config, **{name: value for name, value in named.items() if value is not None}}
    listed = _listed_tokens(folder, config, told)
    special = {name: _content(value) for name, value in told.items() if name.endswith("_token") and _content(value)}
    extra = told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        special |= {str(name): _content(value) for name, value in extra.items()}
        extra = []
    path = folder / TOKENIZER
    if path.is_file():
        backend, own = read_tokenizer_json(path, set(special.values())), _OWN_SPECIAL.get(kind, {})
    else:
        backend, pieces, own = _of_vocabulary(folder, kind, told, listed)
        extra = [*extra, *pieces]
        own = own or _OWN_SPECIAL.get(kind, {})
    vocabulary = backend.get_vocab(with_added_tokens=True)
    own = {
        name: token for name, token in own.items() if token in vocabulary and name not in told
    }  # null: there is none
    special = {**own, **special}
    special = dict(sorted(special.items(), key=lambda item: (*SPECIAL_NAMES, item[0]).index(item[0])))
    _add_tokens(backend, folder, listed, special, extra)
    if not path.is_file():
        _add_begin_and_end(backend, folder, told, special)
    else:
        _check_begin_and_end(backend, path, told, special)
    if "eos_token" not in told and "eos_token" not in special:
        special |= _end_of_the_model(folder, backend)
    return FastTokenizer(backend, config, special, str(folder), _template_files(folder))


def _template_files(folder: Path) -> dict[str, str]:
    found = [folder / "chat_template.jinja", *sorted(folder.glob("chat_templates/*.jinja"))]
    return {str(path.relative_to(folder)): read_template(path) for path in found if path.is_file()}


def _class_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The class that transformers 5 takes for a folder, "" for its generic one."""
    model = read_json_if_there(folder / "config.json", _ModelWords) or {}
    family = model.get("model_type") or ""
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if family in _TAKEN and named != _TAKEN[family]:
        return _TAKEN[family]
    return _SAME_CLASS.get(named, named) if named else _OF_FAMILY.get(family, "")


def _content(token: Any) -> str:
    """How a token of a configuration is written: a string, or an object with its flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _added(token: Any, special: bool) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(str(token), special=special, normalized=not special)
    flags = {name: bool(token[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
    return AddedToken(_content(token), special=bool(token.get("special", special)), **flags)


def _listed_tokens(folder: Path, config: Mapping[str, Any], told: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Id -> added token, of tokenizer_config.json or else of the older added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        return {
            int(id_): _added(token, special=False) for id_, token in sorted(listed.items(), key=lambda x: int(x[0]))
        }
    older = read_added_tokens(folder / ADDED)
    special = {_content(told.get(name)) for name in SPECIAL_NAMES}
    special |= {_content(token) for token in told.get("additional_special_tokens") or []}
    ordered = sorted(older.items(), key=lambda item: item[1])
    return {
        int(id_): AddedToken(text, special=text in special, normalized=text not in special) for text, id_ in ordered
    }


def _of_vocabulary(
    folder: Path, kind: str, told: Mapping[str, Any], listed: Mapping[int, AddedToken]
) -> tuple[Tokenizer, list[AddedToken], dict[str, str]]:
    """A tokenizer of what lies in a folder without tokenizer.json, tokens to add to it, and special tokens by name."""
    if (folder / "tekken.json").is_file():
        backend, special = tekken_tokenizer(folder / "tekken.json")
        return backend, [], special
    prefix = told.get("add_prefix_space")
    for name in (_HF_PIECES, _PADDLE_PIECES, _TIKTOKEN):
        path = folder / name
        if not path.is_file():
            continue
        if name == _TIKTOKEN or _is_tiktoken(path):
            return tiktoken_tokenizer(path, _behind(path, listed)), [], {}
        # PaddleNLP's own layout has sentencepiece itself read the model: the file is followed to the letter.
        plain = name == _PADDLE_PIECES
        renamed = {id_: token.content for id_, token in listed.items()}
        return sentencepiece_tokenizer(
            path, "" if plain else kind, True if plain else told.get("legacy"), prefix, renamed
        )
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelError(f"{folder}: no {TOKENIZER}, and {vocabulary.name} without {merges.name}")
    if kind not in BYTE_LEVEL_CLASSES:
        raise ModelError(
            f"{folder}: {vocabulary.name} and {merges.name} do not say how text is cut into words, and the tokenizer's "
            f"class ({kind or 'none is named'}) is none of {', '.join(BYTE_LEVEL_CLASSES)}; name the right one as "
            f"tokenizer_class in {CONFIG}, or put a {TOKENIZER} there (transformers' save_pretrained writes one)"
        )
    return byte_level_tokenizer(vocabulary, merges, kind, bool(prefix)), [], {}


def _is_tiktoken(path: Path) -> bool:
    """Whether a .model file is lines "base64 rank" (Llama 3 as Meta gives it out) and no sentencepiece model."""
    with open_regular(path) as file:
        words = file.readline(200).split()
    return len(words) == 2 and words[1].isdigit()


def _behind(path: Path, listed: Mapping[int, AddedToken]) -> list[str]:
    """The tokens behind a vocabulary of tiktoken, with a name for each id that has none."""
    with open_regular(path) as file:
        size = sum(1 for line in file if line.strip())
    last = max(listed, default=-1)
    if last - size - len(listed) > MOST_UNNAMED:
        raise ModelError(f"{path.parent / CONFIG}: the added token {last:,} is far behind the {size:,} of {path.name}")
    return [listed[i].content if i in listed else f"<|reserved_token_{i}|>" for i in range(size, last + 1)]


def _add_tokens(
    backend: Tokenizer, folder: Path, listed: Mapping[int, AddedToken], special: Mapping[str, str], extra: list[Any]
) -> None:
    """What the configuration lists, then what it names, then what it calls special beside these."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = {token.content: token for token in listed.values()}
    for content in special.values():
        if content in tokens:
            tokens[content].special = True
        elif content not in known:
            tokens[content] = AddedToken(content, special=True, normalized=False)
    for token in extra:
        content = token.content if isinstance(token, AddedToken) else _content(token)
        if content and content not in tokens and content not in known:
            tokens[content] = token if isinstance(token, AddedToken) else _added(token, special=True)
    backend.add_tokens(list(tokens.values()))
    for id_, token in listed.items():
        found = backend.token_to_id(token.content)
        if found != id_:
            log_once(f"{folder / CONFIG} gives the added token {token.content!r} the id {id_}, the vocabulary {found}")


def _add_begin_and_end(backend: Tokenizer, folder: Path, told: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """add_bos_token and add_eos_token; PaddleNLP's Llama adds the begin token where nothing is said."""
    begins = told.get("add_bos_token", (folder / _PADDLE_PIECES).is_file() and not (folder / _HF_PIECES).is_file())
    begin = [special["bos_token"]] if begins and "bos_token" in special else []
    end = [special["eos_token"]] if told.get("add_eos_token") and "eos_token" in special else []
    if begin or end:
        pair = [*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*begin, "$A", *end]),
            pair=" ".join(pair),
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*begin, *end])],
        )


def _check_begin_and_end(backend: Tokenizer, path: Path, told: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Whether tokenizer.json adds what the configuration says; the file goes first, as in transformers 5."""
    row = backend.encode("a", add_special_tokens=True).ids
    for flag, name, has in (("add_bos_token", "bos_token", row[:1]), ("add_eos_token", "eos_token", row[-1:])):
        id_ = backend.token_to_id(special.get(name, "")) if name in special else None
        if id_ is not None and isinstance(told.get(flag), bool) and told[flag] != (has == [id_]):
            adds = "adds it" if has == [id_] else "does not add it"
            log_once(f"{path.parent / CONFIG} says {flag} {told[flag]}, {path.name} {adds}: the latter holds")


def _end_of_the_model(folder: Path, backend: Tokenizer) -> dict[str, str]:
    """The end token by the model's ids, for a folder whose tokenizer says nothing of one."""
    for file in ("generation_config.json", "config.json"):
        ids = (read_json_if_there(folder / file, _ModelWords) or {}).get("eos_token_id")
        id_ = ids[0] if isinstance(ids, list) and ids else ids
        token = backend.id_to_token(id_) if isinstance(id_, int) and id_ >= 0 else None
        if token is not None:
            log_once(f"{folder}: the tokenizer names no eos_token; {token!r} is taken, the eos_token_id of {file}")
            return {"eos_token": token}
    return {}
