"""What the JSON files of a tokenizer may hold.

Only the fields that are read here are described. Paths in them (vocab_file, tokenizer_file, ...) and names of code
(auto_map) are never followed; a class is one of the tables of oarlock.data.tokenizers.folder or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen
from typing_extensions import NotRequired, TypedDict

from oarlock.data.tokenizers.growth_check import check_growth
from oarlock.errors import ModelError
from oarlock.formats.json_file import TOKENIZER_BYTES, check_content, read_json, read_json_if_there

CONFIG_BYTES = 32 << 20  # of a tokenizer_config.json: some list 100,000 added tokens
LARGEST_ID = 1 << 24
MOST_UNNAMED = 1 << 16  # ids of special tokens without a name
_LONGEST_TOKEN = 4096  # characters
_LONGEST_PATTERN = 20_000
_LONGEST_TEXT = 100_000  # of a list of characters, for example
_LONGEST_TABLE = 16 << 20  # of a normaliser (sentencepiece's tables have 400 KB)
_MOST_ADDED = 1 << 15  # added tokens; the `tokenizers` library takes seconds for so many
_MOST_PARTS = 20_000  # values in a normaliser, a pre-tokenizer, ...
_MOST_CUTS = 200_000_000  # sum of the squares of the lengths of all tokens; a vocabulary of 256,000 has 20,000,000
_SPARE_IDS = 100_000  # that a vocabulary may leave out
_LARGEST_NUMBER = 2**31 - 1
_TABLE = "precompiled_charsmap"

_Id = Annotated[int, Ge(0), Le(LARGEST_ID)]
_Token = Annotated[str, MaxLen(_LONGEST_TOKEN)]
_Name = Annotated[str, MaxLen(200)]


class TokenObject(TypedDict):
    """A token with its flags, as files write it."""

    content: _Token
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    single_word: NotRequired[bool]
    normalized: NotRequired[bool]
    special: NotRequired[bool]


class AddedTokenObject(TokenObject):
    """One of the added_tokens of a tokenizer.json."""

    id: _Id


_AnyToken = TokenObject | _Token | None
_Tokens = Annotated[list[TokenObject | _Token], MaxLen(MOST_UNNAMED)]


class SpecialTokens(TypedDict, total=False):
    """special_tokens_map.json, and the same names in tokenizer_config.json; others that end in _token are alike."""

    bos_token: _AnyToken
    eos_token: _AnyToken
    unk_token: _AnyToken
    sep_token: _AnyToken
    pad_token: _AnyToken
    cls_token: _AnyToken
    mask_token: _AnyToken
    additional_special_tokens: _Tokens | None
    extra_special_tokens: _Tokens | dict[_Name, TokenObject | _Token] | None


class TokenizerConfig(SpecialTokens, total=False):
    """tokenizer_config.json."""

    tokenizer_class: _Name | None
    init_class: _Name | None
    added_tokens_decoder: dict[Annotated[str, MaxLen(9)], TokenObject] | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_prefix_space: bool | None
    legacy: bool | None
    clean_up_tokenization_spaces: bool | None
    split_special_tokens: bool | None
    padding_side: Literal["left", "right"] | None
    truncation_side: Literal["left", "right"] | None
    model_max_length: int | float | None
    model_input_names: Annotated[list[_Name], MaxLen(16)] | None


class TekkenSettings(TypedDict):
    """The config of a tekken.json."""

    pattern: Annotated[str, MaxLen(_LONGEST_PATTERN)]
    default_vocab_size: NotRequired[_Id | None]
    default_num_special_tokens: NotRequired[Annotated[int, Ge(0), Le(MOST_UNNAMED)] | None]


class TekkenPiece(TypedDict):
    """A byte string in base64."""

    token_bytes: _Token


class TekkenSpecial(TypedDict):
    """A special token."""

    rank: _Id
    token_str: _Token


class Tekken(TypedDict):
    """What is read of Mistral's tekken.json."""

    config: TekkenSettings
    vocab: list[TekkenPiece]
    special_tokens: NotRequired[list[TekkenSpecial] | None]


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; {} where there is none.

    Raises:
        ModelError: naming the field that is wrong.
    """
    content: dict[str, Any] = dict(read_json_if_there(path, TokenizerConfig, limit=CONFIG_BYTES, extra="allow") or {})
    _check_names(content, path, all_of_them=False)
    odd = next((id_ for id_ in content.get("added_tokens_decoder") or {} if not _is_id(id_)), None)
    if odd is not None:
        raise ModelError(f"{path}: added_tokens_decoder: {odd!r} is not a token id")
    return content


def read_special_tokens(path: Path) -> dict[str, Any]:
    """special_tokens_map.json; {} where there is none.

    Raises:
        ModelError: naming the field that is wrong.
    """
    content = dict(read_json_if_there(path, SpecialTokens, limit=CONFIG_BYTES, extra="allow") or {})
    _check_names(content, path, all_of_them=True)
    return content


def read_added_tokens(path: Path) -> dict[str, int]:
    """added_tokens.json: token -> id; {} where there is none.

    Raises:
        ModelError: for ids that are none, and for one that two tokens have.
    """
    tokens = read_json_if_there(path, dict[_Token, _Id], limit=CONFIG_BYTES) or {}
    if len(set(tokens.values())) != len(tokens):
        raise ModelError(f"{path}: two tokens have the same id")
    return tokens


def read_vocabulary(path: Path) -> dict[str, int]:
    """vocab.json: token -> id.

    Raises:
        ModelError: for ids that are none, that two tokens have, or that leave out most of those below them.
    """
    vocabulary = read_json(path, dict[str, _Id], limit=TOKENIZER_BYTES)
    _check_ids(vocabulary, str(path))
    return vocabulary


def read_tokenizer_object(path: Path) -> dict[str, Any]:
    """tokenizer.json without its settings for padding and truncation, which nothing here goes by.

    What of it the `tokenizers` library would take memory or time for unasked is bounded; whether it understands the
    rest is for the library.

    Raises:
        ModelError: naming the part that is wrong.
    """
    content = read_json(path, dict[str, Any], limit=TOKENIZER_BYTES)
    content |= {"truncation": None, "padding": None}
    tokens = content.get("added_tokens") or []
    check_content({"added_tokens": tokens}, str(path), _AddedTokens, extra="allow")
    if len(tokens) > _MOST_ADDED:
        raise ModelError(
            f"{path}: {len(tokens):,} added_tokens (at most {_MOST_ADDED:,}; the others are its vocabulary's)"
        )
    check_lengths([token["content"] for token in tokens], f"{path}: added_tokens")
    if len({token["id"] for token in tokens}) != len(tokens):
        raise ModelError(f"{path}: added_tokens: two of them have the same id")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        _check_part(content.get(name), f"{path}: {name}")
    check_growth(content, path)
    model = content.get("model")
    if not isinstance(model, dict):
        raise ModelError(f"{path}: not a tokenizer: its model must be an object")
    _check_part({name: value for name, value in model.items() if name not in ("vocab", "merges")}, f"{path}: model")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        check_content(vocabulary, f"{path}: model.vocab", dict[str, _Id])
        _check_ids(vocabulary, f"{path}: model.vocab")
    return content


class _AddedTokens(TypedDict):
    added_tokens: list[AddedTokenObject]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) <= LARGEST_ID


def _check_names(content: Mapping[str, Any], path: Path, all_of_them: bool) -> None:
    """Refuse names that programs reading the file would set as attributes of their tokenizer, and are none of tokens.

    Args:
        all_of_them: the file holds tokens alone.
    """
    for name, value in content.items():
        token = name.endswith(("_token", "_tokens"))
        if name.startswith("__") or (all_of_them and (not token or name.startswith("_"))):
            raise ModelError(f"{path}: {name[:100]!r} is not the name of a special token")
        if token and name not in TokenizerConfig.__annotations__ and not isinstance(value, (bool, int)):
            check_content({name: value}, str(path), dict[str, _AnyToken | _Tokens], extra="allow")


def check_lengths(tokens: Iterable[str | bytes], place: str) -> None:
    """Refuse tokens of which no vocabulary has so long ones: all the ways to cut each in two are looked at.

    Raises:
        ModelError: naming the place.
    """
    lengths = [len(token) for token in tokens]
    if max(lengths, default=0) > _LONGEST_TOKEN or sum(length**2 for length in lengths) > _MOST_CUTS:
        raise ModelError(f"{place}: tokens of up to {max(lengths):,} characters, and too many of them")


def _check_ids(vocabulary: Mapping[str, int], place: str) -> None:
    ids = set(vocabulary.values())
    if len(ids) != len(vocabulary):
        seen: dict[int, str] = {}
        for token, id_ in vocabulary.items():
            if (other := seen.setdefault(id_, token)) != token:
                raise ModelError(f"{place}: {other[:100]!r} and {token[:100]!r} have the same id, {id_}")
    largest = max(ids, default=-1)
    if largest > 2 * len(ids) + _SPARE_IDS:
        raise ModelError(f"{place}: an id of {largest:,} among {len(ids):,} tokens leaves out most of those below it")


def _check_part(part: Any, place: str) -> None:
    """Refuse sizes and texts beyond what any tokenizer has, and patterns that match nothing at every place."""
    if part is not None and not isinstance(part, dict):
        raise ModelError(f"{place} must be an object or null")
    for count, (name, value) in enumerate(_values(part)):
        if count > _MOST_PARTS:
            raise ModelError(f"{place} has more than {_MOST_PARTS:,} parts")
        if isinstance(value, str):
            limits = {_TABLE: _LONGEST_TABLE, "Regex": _LONGEST_PATTERN, "content": _LONGEST_TOKEN}
            limit = limits.get(name, _LONGEST_TOKEN if name == "prepend" else _LONGEST_TEXT)
            if len(value) > limit:
                raise ModelError(f"{place}: {name} is a text of {len(value):,} characters (at most {limit:,})")
            if name in ("Regex", "String") and not value:
                raise ModelError(f"{place}: an empty pattern matches between all characters")
        elif isinstance(value, (int, float)) and not abs(value) <= _LARGEST_NUMBER:
            raise ModelError(f"{place}: {name} is {value!r}, larger than any number of a tokenizer")


def _values(part: Any) -> Iterator[tuple[str, Any]]:
    """Every value in nested objects and lists, and the field that it (or its list) stands in."""
    left = [("", part)]
    while left:
        name, value = left.pop()
        yield name, value
        if isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((name, item) for item in value)
