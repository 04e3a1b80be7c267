"""Schemas and limits of a tokenizer's JSON files.

Only fields that are read here are declared. Paths in the files (vocab_file, tokenizer_file, ...) and code references
(auto_map) are never followed. A class has to be in the tables of oarlock.data.tokenizers.folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen
from typing_extensions import NotRequired, TypedDict

from oarlock.data.tokenizers.growth_check import check_growth
from oarlock.errors import ModelError
from oarlock.formats.json_file import TOKENIZER_BYTES, check_content, read_json, read_json_if_there

CONFIG_BYTES = 32 << 20  # limit of a tokenizer_config.json; some list 100,000 added tokens
MAX_ID = 1 << 24
MAX_UNNAMED = 1 << 16  # ids of special tokens without a name
_MAX_TOKEN_LENGTH = 4096  # characters
_MAX_PATTERN_LENGTH = 20_000
_MAX_TEXT_LENGTH = 100_000  # of a list of characters, for example
_MAX_TABLE_LENGTH = 16 << 20  # of a normalizer (sentencepiece's tables have 400 KB)
_MAX_ADDED = 1 << 15  # added tokens; adding so many takes the `tokenizers` library seconds
_MAX_PARTS = 20_000  # values in a normalizer, a pre-tokenizer, ...
_MAX_SPLITS = 200_000_000  # sum of the squared lengths of all tokens; a vocabulary of 256,000 has 20,000,000
_SPARE_IDS = 100_000  # unused ids that any vocabulary may have
_MAX_NUMBER = 2**31 - 1
_TABLE = "precompiled_charsmap"

_Id = Annotated[int, Ge(0), Le(MAX_ID)]
_Token = Annotated[str, MaxLen(_MAX_TOKEN_LENGTH)]
_Name = Annotated[str, MaxLen(200)]


class TokenObject(TypedDict):
    """A token with flags."""

    content: _Token
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    single_word: NotRequired[bool]
    normalized: NotRequired[bool]
    special: NotRequired[bool]


class AddedTokenObject(TokenObject):
    """An entry of added_tokens in a tokenizer.json."""

    id: _Id


_AnyToken = TokenObject | _Token | None
_Tokens = Annotated[list[TokenObject | _Token], MaxLen(MAX_UNNAMED)]


class SpecialTokens(TypedDict, total=False):
    """special_tokens_map.json, and its fields in tokenizer_config.json. Other names may end in _token(s), too."""

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

    pattern: Annotated[str, MaxLen(_MAX_PATTERN_LENGTH)]
    default_vocab_size: NotRequired[_Id | None]
    default_num_special_tokens: NotRequired[Annotated[int, Ge(0), Le(MAX_UNNAMED)] | None]


class TekkenPiece(TypedDict):
    """A byte string in base64."""

    token_bytes: _Token


class TekkenSpecial(TypedDict):
    """A special token."""

    rank: _Id
    token_str: _Token


class Tekken(TypedDict):
    """The fields of Mistral's tekken.json that are read."""

    config: TekkenSettings
    vocab: list[TekkenPiece]
    special_tokens: NotRequired[list[TekkenSpecial] | None]


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, {} if there is none.

    Raises:
        ModelError: with the invalid field.
    """
    content: dict[str, Any] = dict(read_json_if_there(path, TokenizerConfig, limit=CONFIG_BYTES, extra="allow") or {})
    _check_names(content, path, tokens_only=False)
    odd = next(
        (
            id_
            for id_ in content.get("added_tokens_decoder") or {}
            if not (id_.isascii() and id_.isdigit() and int(id_) <= MAX_ID)
        ),
        None,
    )
    if odd is not None:
        raise ModelError(f"{path}: added_tokens_decoder: {odd!r} is not a token id")
    return content


def read_special_tokens(path: Path) -> dict[str, Any]:
    """Read special_tokens_map.json, {} if there is none.

    Raises:
        ModelError: with the invalid field.
    """
    content = dict(read_json_if_there(path, SpecialTokens, limit=CONFIG_BYTES, extra="allow") or {})
    _check_names(content, path, tokens_only=True)
    return content


def read_added_tokens(path: Path) -> dict[str, int]:
    """Read added_tokens.json (token -> id), {} if there is none.

    Raises:
        ModelError: for an invalid or duplicate id.
    """
    tokens = read_json_if_there(path, dict[_Token, _Id], limit=CONFIG_BYTES) or {}
    if len(set(tokens.values())) != len(tokens):
        raise ModelError(f"{path}: two tokens have the same id")
    return tokens


def read_vocabulary(path: Path) -> dict[str, int]:
    """Read vocab.json (token -> id).

    Raises:
        ModelError: for an invalid or duplicate id, or if most ids are unused.
    """
    vocabulary = read_json(path, dict[str, _Id], limit=TOKENIZER_BYTES)
    _check_ids(vocabulary, str(path))
    return vocabulary


def read_tokenizer_object(path: Path) -> dict[str, Any]:
    """Read tokenizer.json without its padding and truncation settings.

    Everything that would cost the `tokenizers` library unbounded memory or time is limited here. The library itself
    checks whether it understands the rest.

    Raises:
        ModelError: with the invalid part.
    """
    content = read_json(path, dict[str, Any], limit=TOKENIZER_BYTES)
    content |= {"truncation": None, "padding": None}
    tokens = content.get("added_tokens") or []
    check_content({"added_tokens": tokens}, str(path), _AddedTokens, extra="allow")
    if len(tokens) > _MAX_ADDED:
        raise ModelError(
            f"{path}: {len(tokens):,} added_tokens (at most {_MAX_ADDED:,}); put the others into its vocabulary"
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


def _check_names(content: Mapping[str, Any], path: Path, tokens_only: bool) -> None:
    """Refuse names that are not special tokens. Programs that read the file would set them as attributes.

    Args:
        tokens_only: whether the file contains only tokens.
    """
    for name, value in content.items():
        token = name.endswith(("_token", "_tokens"))
        if name.startswith("__") or (tokens_only and (not token or name.startswith("_"))):
            raise ModelError(f"{path}: {name[:100]!r} is not the name of a special token")
        if token and name not in TokenizerConfig.__annotations__ and not isinstance(value, (bool, int)):
            check_content({name: value}, str(path), dict[str, _AnyToken | _Tokens], extra="allow")


def check_lengths(tokens: Iterable[str | bytes], place: str) -> None:
    """Refuse vocabularies with extremely long tokens: the time to find merges grows with their squared lengths.

    Raises:
        ModelError: with the place.
    """
    lengths = [len(token) for token in tokens]
    if max(lengths, default=0) > _MAX_TOKEN_LENGTH or sum(length**2 for length in lengths) > _MAX_SPLITS:
        raise ModelError(f"{place}: tokens of up to {max(lengths):,} characters, too long or too many")


def _check_ids(vocabulary: Mapping[str, int], place: str) -> None:
    ids = set(vocabulary.values())
    if len(ids) != len(vocabulary):
        seen: dict[int, str] = {}
        for token, id_ in vocabulary.items():
            if (other := seen.setdefault(id_, token)) != token:
                raise ModelError(f"{place}: {other[:100]!r} and {token[:100]!r} have the same id, {id_}")
    largest = max(ids, default=-1)
    if largest > 2 * len(ids) + _SPARE_IDS:
        raise ModelError(f"{place}: the largest id of {len(ids):,} tokens is {largest:,}, so most ids are unused")


def _check_part(part: Any, place: str) -> None:
    """Refuse sizes and texts that no tokenizer needs, and empty patterns, which match everywhere."""
    if part is not None and not isinstance(part, dict):
        raise ModelError(f"{place} must be an object or null")
    left, count = [("", part)], 0
    while left:
        name, value = left.pop()
        if count > _MAX_PARTS:
            raise ModelError(f"{place} has more than {_MAX_PARTS:,} parts")
        count += 1
        if isinstance(value, str):
            limits = {_TABLE: _MAX_TABLE_LENGTH, "Regex": _MAX_PATTERN_LENGTH, "content": _MAX_TOKEN_LENGTH}
            limit = limits.get(name, _MAX_TOKEN_LENGTH if name == "prepend" else _MAX_TEXT_LENGTH)
            if len(value) > limit:
                raise ModelError(f"{place}: {name} is a text of {len(value):,} characters (at most {limit:,})")
            if name in ("Regex", "String") and not value:
                raise ModelError(f"{place}: an empty pattern matches between all characters")
        elif isinstance(value, dict):
            left.extend(value.items())
        elif isinstance(value, list):
            left.extend((name, item) for item in value)
        elif isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:
            raise ModelError(f"{place}: {name} is {value!r}, which is too large")
